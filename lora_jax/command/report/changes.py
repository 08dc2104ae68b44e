"""What adapters change in each parameter, in numbers: sizes and effective ranks, of pairs from their factors alone."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import sharding
from lora_jax.adapters import algebra, initializers, merging
from lora_jax.adapters.summary import summary
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, LowRank, Rows

_FEW = 8  # matrices of a stack that are shown one by one


@dataclasses.dataclass(frozen=True)
class Change:
    """One adapted matrix, or those of a stack together.

    Args:
      path: the parameter; of a matrix of a stack with its place, `layers/up_proj/kernel[3]`.
      shape: of the parameter.
      kind: what its adapter is, in a word.
      rank: of the pair, as text; empty if there is none.
      parameters: how many numbers are trained.
      size: `||dW||`, Frobenius, of each matrix, `(matrices,)`.
      weight: `||W||` of each.
      effective_rank: of each dW, exp of the entropy of its singular values; `None` where that would take dW itself.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    rank: str
    parameters: int
    size: np.ndarray
    weight: np.ndarray
    effective_rank: np.ndarray | None

    @property
    def relative(self) -> np.ndarray:
        """`||dW|| / ||W||` of each matrix; NaN where W is zero."""
        return np.divide(self.size, self.weight, out=np.full(self.size.shape, np.nan), where=self.weight > 0)


def changes(variables: Any, adapters: Mapping[str, Adapter], initial: Mapping[str, Adapter] | None = None) -> list[Change]:
    """A row for each adapted parameter, or for each matrix of a short stack. Every process has to call it.

    Args:
      variables: the base's parameters.
      adapters: those that were trained.
      initial: of a base that was changed to make up for its first adapters, those: the numbers are of the base as it was.
    """
    weights, whole = paths.flatten(variables)[0], adapters
    first = {path: adapter for path, adapter in (initial or {}).items() if isinstance(adapter, LowRank)}
    if initial is not None:
        whole = initializers.convert(adapters, initial)
    numbers = {path: _numbers(weights[path], adapter, first.get(path)) for path, adapter in whole.items()}
    found = jax.tree.map(np.asarray, sharding.gather(numbers))
    rows = sorted(zip(summary(variables, adapters).rows, adapters.values()), key=lambda pair: paths.in_order(pair[0].path))
    return [change for row, adapter in rows for change in _rows(row, adapter, *found[row.path])]


_Numbers = tuple[jax.Array, jax.Array, jax.Array | None]


@jax.jit
def _numbers(weight: Any, adapter: Any, initial: Any) -> _Numbers:
    """||dW||, ||W|| and the effective rank of dW, of each matrix; of a stack one after the other, to hold but one of them."""
    if not isinstance(adapter, LowRank) or adapter.layout.batch[:1] != (0,):
        return _numbers_at_once(weight, adapter, initial)
    one = lambda weight, *pairs: _numbers_at_once(weight, *map(_unstacked, pairs))
    found = jax.lax.map(lambda place: one(*place), (weight, adapter, initial))
    return jax.tree.map(lambda array: array.reshape(-1), found)


def _unstacked(pair: LowRank | None) -> LowRank | None:
    """A pair whose arrays have lost their first axis, with the layout that they have now."""
    if pair is None:
        return None
    return dataclasses.replace(pair, layout=pair.layout.sliced(), ranks=None)


def _numbers_at_once(weight: Any, adapter: Any, initial: Any) -> _Numbers:
    weight = quantized.dense(weight).astype(jnp.float32)
    whole = weight if initial is None else merging.merge({"w": weight}, {"w": initial})["w"]
    norm = functools.partial(_norm, batch=adapter.layout.batch if isinstance(adapter, LowRank) else ())
    if isinstance(adapter, LowRank) and adapter.magnitude is None:
        values = algebra.singular_values({"w": adapter.widened()})["w"]
        values = values.reshape(-1, values.shape[-1])
        return jnp.linalg.norm(values, axis=-1), norm(whole), algebra.effective_rank(values)
    alone = dataclasses.replace(adapter, bias=None) if isinstance(adapter, LowRank) else adapter
    return norm(merging.merge({"w": weight}, {"w": alone})["w"] - weight), norm(whole), None


def _norm(array: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    """The Frobenius norm of each matrix of a stack."""
    left = tuple(axis for axis in range(array.ndim) if axis not in batch)
    return jnp.sqrt(jnp.square(array).sum(left)).reshape(-1)


def _rows(row: Any, adapter: Adapter, size: np.ndarray, weight: np.ndarray, spread: np.ndarray | None) -> list[Change]:
    one = Change(row.path, row.shape, _kind(adapter), row.rank.strip("-"), row.trainable, size, weight, spread)
    if not isinstance(adapter, LowRank) or len(size) == 1:
        return [one]
    ranks, batch = algebra.true_ranks(adapter), adapter.a.shape[: len(adapter.layout.batch)]
    adapted = np.flatnonzero(ranks)
    if len(adapted) > _FEW:
        spread = None if spread is None else spread[adapted]
        return [dataclasses.replace(one, size=size[adapted], weight=weight[adapted], effective_rank=spread)]
    shape = tuple(length for axis, length in enumerate(row.shape) if axis not in adapter.layout.batch)
    rows = []
    for i in adapted:
        place = ", ".join(map(str, np.unravel_index(i, batch)))
        parameters = row.trainable * int(ranks[i]) // int(ranks.sum())
        own: dict[str, Any] = {"size": size[i : i + 1], "weight": weight[i : i + 1]}
        own["effective_rank"] = None if spread is None else spread[i : i + 1]
        named: Any = {"path": f"{row.path}[{place}]", "shape": shape, "rank": str(ranks[i]), "parameters": parameters}
        rows.append(dataclasses.replace(one, **named, **own))
    return rows


def _kind(adapter: Adapter) -> str:
    """What an adapter is called in the table."""
    if isinstance(adapter, LowRank):
        return "DoRA" if adapter.magnitude is not None else "VeRA" if adapter.lambda_d is not None else "LoRA"
    return f"{len(adapter.indices)} rows" if isinstance(adapter, Rows) else "whole"

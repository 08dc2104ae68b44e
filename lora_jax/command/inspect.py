"""What a run changed: what `lora-jax inspect` does."""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import algebra, merging
from lora_jax.command import run
from lora_jax.command.tasks.registry import task_module
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, Layout, LowRank
from lora_jax.core.text_table import text_table


def inspect_command(line: argparse.Namespace) -> int:
    """`lora-jax inspect`; returns the exit code."""
    titles = ("parameter", "shape", "rank", "scale", "|dW|/|W|", "effective rank")
    print(text_table([titles, *map(_cells, inspect(line.run))], "lrrrrr"))
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted parameter of a run.

    Args:
      path: the parameter; of a stacked one with the place of the matrix, `layers/up_proj/kernel[3]`.
      shape: its shape.
      rank: r of its pair; `None` if it is trained whole.
      scale: the factor of the pair; `None` if it is trained whole.
      change: ||dW|| / ||W||, Frobenius; `None` where the base is not at hand, or zero.
      effective_rank: exp of the entropy of dW's normalised singular values; `None` if dW is not known.
      values: these singular values, from the largest down; `None` likewise.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    change: float | None
    effective_rank: float | None
    values: np.ndarray | None = None


def _cells(row: Row) -> tuple[str, ...]:
    rank = "whole" if row.rank is None else str(row.rank)
    shape = "x".join(map(str, row.shape))
    return row.path, shape, rank, show(row.scale, ".4g"), show(row.change, ".4f"), show(row.effective_rank, ".2f")


def show(value: float | None, form: str) -> str:
    """A number, or what stands for one that is not known."""
    return "-" if value is None else format(value, form)


def inspect(directory: pathlib.Path) -> list[Row]:
    """What a run changed, per adapted parameter. Downloads nothing.

    Raises:
      InputError: there is no such run, it has no checkpoint yet, or its base model has changed.
    """
    config = run.read_config(directory)
    base = _base_at_hand(directory, config)
    adapters = run.load_adapters(directory, base.model.variables if base else None)
    return _rows(adapters, paths.flatten(base.model.variables)[0] if base else {})


def _rows(adapters: Mapping[str, Adapter], weights: Mapping[str, Any]) -> list[Row]:
    """What adapters change in their parameters, as far as these are known."""
    whole = ((path, adapter, quantized.dense(weights.get(path))) for path, adapter in adapters.items())
    matrices = [one for each in whole for one in _one_by_one(*each)]
    spectra = _spectra(matrices)
    spreads = jax.jit(lambda values: jax.tree.map(algebra.effective_rank, values))(spectra)
    rows = [_row(*one, spectra.get(one[0]), spreads.get(one[0])) for one in matrices]
    return sorted(rows, key=lambda row: paths.in_order(row.path))


def _base_at_hand(directory: pathlib.Path, config: run.RunConfig) -> Any:
    task = task_module(config)
    source = task.location(config)
    return task.load_base(source, config, own=run.own_base(directory)) if source.exists() else None


def _one_by_one(path: str, adapter: Adapter, weight: Any) -> Iterator[tuple[str, Adapter, Any]]:
    """Each adapted matrix of a stacked parameter, its place behind the path; any other parameter as it is."""
    if not isinstance(adapter, LowRank) or not adapter.layout.batch:
        yield path, adapter, weight
        return
    batch, left = adapter.layout.batch, sorted(adapter.layout.inputs + adapter.layout.outputs)
    inputs, outputs = (tuple(map(left.index, axes)) for axes in (adapter.layout.inputs, adapter.layout.outputs))
    stack = None if weight is None else np.moveaxis(np.asarray(weight), batch, range(len(batch)))
    ranks = algebra.true_ranks(adapter).reshape(adapter.a.shape[: len(batch)])
    arrays = jax.device_get(adapter)
    for place in zip(*ranks.nonzero()):
        own, rank = jax.tree.map(lambda leaf, place=place: jnp.asarray(leaf[place]), arrays), slice(int(ranks[place]))
        vector = None if own.lambda_d is None else own.lambda_d[rank]
        own = dataclasses.replace(own, a=own.a[..., rank], b=own.b[rank], lambda_d=vector, scale=float(own.scale), ranks=None)
        own = dataclasses.replace(own, layout=Layout((), inputs, outputs))
        yield f"{path}[{', '.join(map(str, place))}]", own, None if stack is None else stack[place]


def _spectra(matrices: Sequence[tuple[str, Adapter, Any]]) -> dict[str, Any]:
    """The singular values of each change that is known; those of the pairs by one program."""
    pairs = {path: a for path, a, _ in matrices if isinstance(a, LowRank) and a.magnitude is None}
    found: dict[str, Any] = jax.jit(algebra.singular_values)(pairs)
    for path, adapter, weight in matrices:
        if path not in found and weight is not None:
            found[path] = np.asarray(_values(_folded(weight, adapter) - np.asarray(weight, np.float64)), np.float32)
    return found


def _row(path: str, adapter: Adapter, weight: Any, values: Any, spread: Any) -> Row:
    if isinstance(adapter, LowRank):
        sizes = dict(zip(adapter.layout.inputs, adapter.a.shape)) | dict(zip(adapter.layout.outputs, adapter.b.shape[1:]))
        shape, rank, scale = tuple(sizes[axis] for axis in sorted(sizes)), adapter.rank, float(adapter.scale)
    else:
        [value] = jax.tree.leaves(adapter)
        shape, rank, scale = value.shape, None, None
    size = 0.0 if weight is None else float(np.linalg.norm(np.asarray(weight, np.float64)))
    change = None if values is None or not size else float(np.linalg.norm(values)) / size
    return Row(path, shape, rank, scale, change, None if spread is None else float(spread), values)


def _folded(weight: np.ndarray, adapter: Adapter) -> np.ndarray:
    """The parameter with its adapter folded in; a bias of the adapter goes to another parameter."""
    alone = dataclasses.replace(adapter, bias=None) if isinstance(adapter, LowRank) else adapter
    return np.asarray(merging.merge({"w": jnp.asarray(weight, jnp.float32)}, {"w": alone})["w"], np.float64)


def _values(change: np.ndarray) -> np.ndarray:
    """The singular values of a change; of a vector, its norm."""
    return np.linalg.svd(change.reshape(change.shape[0], -1), compute_uv=False)

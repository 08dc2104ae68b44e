"""`summary`: what an adapter set adds, from shapes alone."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from lora_jax.core import paths
from lora_jax.core.adapter import ADAPTER, PARTS, Adapter, LowRank, check
from lora_jax.core.collections import not_parameters
from lora_jax.core.errors import InputError
from lora_jax.core.text_table import text_table

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One adapted parameter: its shape, its adapter's kind, rank and scale, and the sizes of both.

    `trainable` counts the numbers that are trained (true ranks, where a stack is padded); `bytes` is what the arrays hold.
    """

    path: str
    shape: tuple[int, ...]
    kind: str
    rank: str
    scale: str
    parameters: int
    trainable: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts and bytes of an adapter set; prints as a table.

    Args:
      rows: one for each adapted parameter.
      parameters: numbers in the base.
      parameter_bytes: bytes of the base.
      trainable: numbers that are trained.
      adapter_bytes: bytes of all the adapters' arrays.
      optimizer_bytes: bytes of Adam's two moments for the trained arrays, in their dtype.
      unadapted: `{path: shape}` of the parameters of two axes or more without an adapter; `explain` says why a word passed one
        over.
    """

    rows: tuple[SummaryRow, ...]
    parameters: int
    parameter_bytes: int
    trainable: int
    adapter_bytes: int
    optimizer_bytes: int
    unadapted: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        table = [("parameter", "shape", "adapter", "rank", "scale", "parameters", "trainable", "bytes")]
        for r in self.rows:
            shape = "x".join(map(str, r.shape))
            table.append((r.path, shape, r.kind, r.rank, r.scale, f"{r.parameters:,}", f"{r.trainable:,}", f"{r.bytes:,}"))
        share = 100 * self.trainable / max(self.parameters, 1)
        return (
            f"{text_table(table, 'lllrrrrr')}\n"
            f"{self.trainable:,} trainable of {self.parameters:,} parameters ({share:.2f}%); "
            f"adapters {size_text(self.adapter_bytes)} beside a base of {size_text(self.parameter_bytes)}; "
            f"Adam's state {size_text(self.optimizer_bytes)}{_without_adapter(self.unadapted)}"
        )

    def folded(self) -> "Summary":
        """The same with one row for all parameters whose paths differ in their numbers alone, as those of layers do.

        >>> pair = SummaryRow("layer_0/w", (4, 4), "LowRank", "2", "1", 16, 16, 64)
        >>> pairs = (pair, dataclasses.replace(pair, path="layer_1/w"))
        >>> [row] = Summary(pairs, 32, 128, 32, 128, 256, {}).folded().rows
        >>> row.path, row.shape, row.trainable
        ('layer_*/w (2 of them)', (4, 4), 32)
        """
        alike = _alike((row.path, (row.shape, row.kind, row.rank, row.scale), row) for row in self.rows)
        return dataclasses.replace(self, rows=tuple(_together(pattern, some) for (pattern, _), some in alike.items()))


def summary(variables: Any, adapters: Mapping[str, Adapter]) -> Summary:
    """Counts and bytes, per adapted parameter and in all. Arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      variables: the base tree.
      adapters: `{path: adapter}`.

    Returns:
      A `Summary`, which prints as a table.

    Raises:
      InputError: an adapter has no parameter in the tree, or does not fit it.
      TypeError: an adapter is none.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((1266, 8)), jnp.ones((8, 64)), lj.Layout((), (0,), (1,)), scale=2.0)
    >>> print(summary({"w": jnp.ones((1266, 64))}, {"w": pair}))
    parameter  shape    adapter  rank  scale  parameters  trainable   bytes
    w          1266x64  LowRank     8      2      81,024     10,640  42,560
    10,640 trainable of 81,024 parameters (13.13%); adapters 41.6 KiB beside a base of 316.5 KiB; Adam's state 83.1 KiB
    """
    leaves = {path: leaf for path, leaf in paths.flatten(variables)[0].items() if hasattr(leaf, "shape")}
    rows, optimizer_bytes = [], 0
    for path, adapter in adapters.items():
        if path not in leaves:
            raise InputError(f"the adapter {path!r} has no parameter in this tree: it was made for another model")
        check(path, adapter, tuple(leaves[path].shape))
        rows.append(_row(path, tuple(leaves[path].shape), adapter))
        optimizer_bytes += 2 * sum(_bytes(array) for array in _trained(adapter).values())
    return Summary(
        tuple(rows),
        sum(math.prod(leaf.shape) for leaf in leaves.values()),
        sum(map(_bytes, leaves.values())),
        sum(row.trainable for row in rows),
        sum(row.bytes for row in rows),
        optimizer_bytes,
        _unadapted(variables, leaves, adapters),
    )


def _unadapted(variables: Any, leaves: Mapping[str, Any], adapters: Mapping[str, Adapter]) -> dict[str, tuple[int, ...]]:
    aside = not_parameters(variables)
    others = {path: leaf for path, leaf in leaves.items() if path not in adapters and path not in aside}
    return {path: tuple(leaf.shape) for path, leaf in others.items() if len(leaf.shape) > 1}


def _without_adapter(unadapted: Mapping[str, tuple[int, ...]]) -> str:
    """The last lines: parameters whose paths differ in their numbers alone, as those of layers do, are one line.

    >>> print(_without_adapter({"table": (9, 4), "layer_0/w": (4, 4), "layer_1/w": (4, 4)}))
    <BLANKLINE>
    without an adapter:
      table 9x4
      layer_*/w 4x4 (2 of them)
    """
    alike = _alike((path, "x".join(map(str, shape)), path) for path, shape in unadapted.items())
    lines = [
        f"\n  {some[0]} {shape}" if len(some) == 1 else f"\n  {pattern} {shape} ({len(some)} of them)"
        for (pattern, shape), some in alike.items()
    ]
    return "".join(["\nwithout an adapter:", *lines]) if lines else ""


def _alike(items: Iterable[tuple[str, Any, _T]]) -> dict[tuple[str, Any], list[_T]]:
    """Items with their paths and what they must share, together where the paths differ in their numbers alone."""
    found: dict[tuple[str, Any], list[_T]] = {}
    for path, shared, item in items:
        found.setdefault((re.sub(r"\d+", "*", path), shared), []).append(item)
    return found


def _together(pattern: str, rows: list[SummaryRow]) -> SummaryRow:
    """Rows that are alike as one, with the sums of their numbers."""
    if len(rows) == 1:
        return rows[0]
    sums = {name: sum(getattr(row, name) for row in rows) for name in ("parameters", "trainable", "bytes")}
    return dataclasses.replace(rows[0], path=f"{pattern} ({len(rows)} of them)", **sums)


def _row(path: str, shape: tuple[int, ...], adapter: Adapter) -> SummaryRow:
    rank, scale = "-", "-"
    sizes = {name: math.prod(array.shape) for name, array in _trained(adapter).items()}
    if isinstance(adapter, LowRank):
        scale = f"{adapter.scale:g}" if isinstance(adapter.scale, float) else "varies"
        rank = str(adapter.rank)
        if adapter.ranks is not None:
            rank = "/".join(map(str, dict.fromkeys(adapter.ranks)))
            sizes = {name: _of_true_ranks(name, count, adapter.ranks, adapter.rank) for name, count in sizes.items()}
    size = sum(map(_bytes, jax.tree.leaves(adapter)))
    return SummaryRow(path, shape, type(adapter).__name__, rank, scale, math.prod(shape), sum(sizes.values()), size)


def _of_true_ranks(name: str, count: int, ranks: tuple[int, ...], rank: int) -> int:
    """How many numbers of an array with `count` belong to the true ranks of the matrices of its stack."""
    if "rank" in PARTS[name]:
        return count * sum(ranks) // (rank * len(ranks))
    return count * sum(own > 0 for own in ranks) // len(ranks)


def _trained(adapter: Adapter) -> dict[str, Any]:
    labels = adapter.roles()
    return {name: getattr(adapter, name) for name in adapter.children() if getattr(labels, name) == ADAPTER}


def _bytes(array: Any) -> int:
    if paths.is_quantized(array):
        return sum(map(_bytes, jax.tree.leaves(array)))
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    return -(-math.prod(array.shape) * jax.dtypes.itemsize_bits(array.dtype) // 8)


def size_text(count: int) -> str:
    """Bytes in the largest unit that keeps them at 1 or more.

    >>> size_text(512), size_text(3 * 2**20)
    ('512 B', '3.0 MiB')
    """
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"

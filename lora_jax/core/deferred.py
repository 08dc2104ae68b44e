"""Bases that are made of other arrays where they are used, and never kept: quantised kernels."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["shape", "dtype", "make", "aligned"])
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A base that is `make(arrays)`.

    `aligned`: whether the axes of the arrays are those of the base, in blocks: `make` makes a slice along axis 0 from theirs.
    """

    arrays: Any
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[Any], Any]
    aligned: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def sliceable(self) -> bool:
        """Whether a slice along axis 0 can be made alone: not where values share a scale along it."""
        return self.aligned and all(array.shape[0] == self.shape[0] for array in jax.tree.leaves(self.arrays))


def is_deferred(value: Any) -> bool:
    return isinstance(value, Deferred)


def on_bases(fn: Callable[..., list[Any]], *operands: Any) -> list[Any]:
    """`fn(*operands)`; deferred again if an operand is."""
    if not any(map(is_deferred, operands)):
        return fn(*operands)
    make, arrays = _opened(fn, operands)
    pick = lambda i: lambda arrays: make(*arrays)[i]
    return [Deferred(arrays, spec.shape, spec.dtype, pick(i)) for i, spec in enumerate(jax.eval_shape(make, *arrays))]


def use(fn: Callable[..., Any], *operands: Any) -> Any:
    """`fn(*operands)`, with deferred ones made, for the backward pass once more."""
    if not any(map(is_deferred, operands)):
        return fn(*operands)
    make, arrays = _opened(fn, operands)
    return jax.checkpoint(make)(*arrays)


def _opened(fn: Callable[..., Any], operands: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`fn` on the arrays that deferred operands are made of, and these arrays."""
    arrays = tuple(v.arrays if is_deferred(v) else v for v in operands)
    return lambda *arrays: fn(*(v.make(a) if is_deferred(v) else a for v, a in zip(operands, arrays))), arrays


def placed(place: Callable[[Any, jax.NamedSharding], Any], base: Any, sharding: Any) -> Any:
    """A base that `place(array, sharding)` puts on a mesh: of one that is deferred the arrays are moved, which are smaller.

    Where a mesh axis does not cut an axis of theirs evenly, as blocks may be too few, that is whole.
    """
    if not (is_deferred(base) and base.aligned and isinstance(sharding, jax.NamedSharding)):
        return on_bases(lambda base: [place(base, sharding)], base)[0]

    def make(arrays: Any) -> Any:
        arrays = jax.tree.map(lambda array: place(array, where_it_divides(sharding, array.shape)), arrays)
        return place(base.make(arrays), sharding)

    return dataclasses.replace(base, make=make, aligned=False)


def where_it_divides(sharding: jax.NamedSharding, shape: tuple[int, ...]) -> jax.NamedSharding:
    """The sharding without the mesh axes that do not cut an axis of this shape evenly."""
    ways = lambda entry: math.prod(sharding.mesh.shape[name] for name in ((entry,) if isinstance(entry, str) else entry))
    free = lambda entry: entry is None or entry is jax.P.UNCONSTRAINED
    spec = (entry if free(entry) or size % ways(entry) == 0 else None for entry, size in zip(sharding.spec, shape))
    return sharding.update(spec=jax.P(*spec))


def unstack_base(base: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The arrays of a base for scanning along axis 0, and how to make the base of one slice from theirs."""
    if not is_deferred(base):
        return base, lambda array: array
    if not base.sliceable:
        return use(lambda array: array, base), lambda array: array
    return base.arrays, lambda arrays: dataclasses.replace(base, arrays=arrays, shape=base.shape[1:])

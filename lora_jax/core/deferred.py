"""Bases that are made of other arrays where they are used, and never kept: quantised kernels."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["shape", "dtype", "make", "slices"])
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A base that is `make(arrays)`.

    `slices`: whether `make` makes a slice along axis 0 from the slices of the arrays.
    """

    arrays: Any
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[Any], Any]
    slices: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def sliceable(self) -> bool:
        """Whether a slice along axis 0 can be made alone: not where values share a scale along it."""
        return self.slices and all(array.shape[0] == self.shape[0] for array in jax.tree.leaves(self.arrays))


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


def unstack_base(base: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The arrays of a base for scanning along axis 0, and how to make the base of one slice from theirs."""
    if not is_deferred(base):
        return base, lambda array: array
    if not base.sliceable:
        return use(lambda array: array, base), lambda array: array
    return base.arrays, lambda arrays: dataclasses.replace(base, arrays=arrays, shape=base.shape[1:])

"""One factor of a low-rank term: an array whose dimensions lie along axes of a weight."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

RANK = -1  # the inner axis, along which the factors of a term are summed


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes", "indexed"])
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array, and the axis of the weight (or RANK) that each of its dimensions lies along.

    `indexed`: how a dynamic index picked from its axes: `"rows"` (a gather), `"slice"` (a dynamic slice) or not at all (`""`).

    >>> a = Factor(jnp.ones((4, 2)), (0, RANK))
    >>> a.relabel({0: 1}).axes, a.along(0, lambda array, dim: lax.rev(array, (dim,))).axes
    ((1, -1), (0, -1))
    """

    array: Any
    axes: tuple[int, ...]
    indexed: str = ""

    def dim(self, axis: int) -> int:
        """The dimension that lies along an axis."""
        return self.axes.index(axis)

    def relabel(self, new: Mapping[int, int]) -> Self:
        """Give the axes new numbers; an axis without one has size 1 and is dropped."""
        gone = tuple(d for d, axis in enumerate(self.axes) if axis != RANK and axis not in new)
        axes = tuple(RANK if axis == RANK else new[axis] for axis in self.axes if axis == RANK or axis in new)
        return dataclasses.replace(self, array=lax.squeeze(self.array, gone) if gone else self.array, axes=axes)

    def along(self, axis: int, fn: Callable[[Any, int], Any]) -> Self:
        """Apply `fn(array, dim)` to the dimension along an axis, if there is one."""
        if axis not in self.axes:
            return self
        return dataclasses.replace(self, array=fn(self.array, self.dim(axis)))

    def summed(self, axis: int) -> Self:
        """The sum along an axis, if there is a dimension along it; that dimension keeps size 1."""
        return self.along(axis, lambda array, dim: jnp.sum(array, dim, keepdims=True))

    def times(self, scale: "Factor", fn: Callable[[Any, Any], Any] = jnp.multiply) -> Self:
        """The factor and another one, which lies along some of its axes, put together elementwise."""
        return dataclasses.replace(self, array=fn(self.array, scale.laid_along(self.axes, self.array.dtype)))

    def laid_along(self, labels: Sequence[int], dtype: Any) -> jax.Array:
        """The array with its dimensions in the order of `labels`, of size 1 along those that it lacks."""
        order = sorted(range(len(self.axes)), key=lambda d: list(labels).index(self.axes[d]))
        array = lax.transpose(jnp.asarray(self.array), order).astype(dtype)
        return lax.expand_dims(array, [place for place, label in enumerate(labels) if label not in self.axes])

    def explicit(self, axis: int, size: int) -> Self:
        """The factor with a dimension along an axis that it was constant along."""
        array = jnp.broadcast_to(self.array[None], (size, *self.array.shape))
        return dataclasses.replace(self, array=array, axes=(axis, *self.axes))


def scaled_along(array: Any, factors: Sequence[Factor], labels: Sequence[int]) -> Any:
    """An array whose axes have these labels, times factors that lie along some of them."""
    return functools.reduce(lambda x, factor: x * factor.laid_along(labels, x.dtype), factors, array)

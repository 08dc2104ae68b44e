"""DoRA: a trained magnitude for each output of a kernel (https://arxiv.org/abs/2402.09353), as PEFT computes it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.adapter import LowRank, wide_dtype
from lora_jax.core.contraction import contract
from lora_jax.core.deferred import is_deferred, unstack_base, use
from lora_jax.core.factor import Factor, scaled_along
from lora_jax.core.rules.products import Product
from lora_jax.core.weight import LowRankTerm, Method


@functools.partial(jax.tree_util.register_dataclass, data_fields=["gains"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Magnitude(Method):
    """`x (W + s A B) g = x W + s (x A) (B g) + (g - 1) x W`: B holds its g already, and this adds the last part.

    `gains` is `g - 1`, as a product of factors.
    """

    gains: tuple[Factor, ...]

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        return dataclasses.replace(self, gains=tuple(map(fn, self.gains)))

    def with_axis(self, axis: int, size: int) -> Self:
        if any(axis in gain.axes for gain in self.gains):
            return self
        ones = Factor(jnp.ones(size, self.gains[0].array.dtype), (axis,))
        return dataclasses.replace(self, gains=(*self.gains, ones))

    def masked(self, mask: Factor) -> Self:
        """The numbers that are put in have no magnitude."""
        return dataclasses.replace(self, gains=(*self.gains, mask))

    def after(self, term: LowRankTerm, product: Product, x: Any, y: Any) -> Any:
        return y + product.scaled_base(x, self.gains, y.dtype)

    def dense(self, value: Any, base: Any) -> Any:
        return value + scaled_along(base, self.gains, range(base.ndim))


def magnitude_gain(base: Any, adapter: LowRank) -> jax.Array:
    """`g = m / ||W + s A B||`, `(*batch, *out)`: the factor of each output; 1 where the norm is 0 (PEFT has NaN there), and
    where a stack's matrix has rank 0.

    The norm is a constant for the gradient (section 4.3 of the paper). Neither A B nor anything of W's shape is made:
    `||w_j + s A b_j||^2 = ||w_j||^2 + 2 s (W^T A)_j b_j + s^2 b_j^T (A^T A) b_j`.

    Args:
      base: W.
      adapter: a pair with a `magnitude`.

    >>> from lora_jax.core.adapter import Layout
    >>> pair = LowRank(jnp.ones((2, 1)), jnp.ones((1, 1)), Layout((), (0,), (1,)), scale=2.0, magnitude=jnp.array([10.0]))
    >>> magnitude_gain(jnp.array([[1.0], [2.0]]), pair)
    Array([2.], dtype=float32)
    """
    norm = lax.stop_gradient(column_norm(base, adapter))
    ratio = jnp.asarray(adapter.magnitude, norm.dtype) / jnp.where(norm > 0, norm, 1)
    return adapter.where_adapted(jnp.where(norm > 0, ratio, 1), 1.0)


def column_norm(base: Any, adapter: LowRank) -> jax.Array:
    """`||W + s A B||` over the in axes, `(*batch, *out)`, in float32 or wider where W or the adapter is.

    Of a quantised stack one slice after the other, so that no more of it is dense at a time.
    """
    layout = adapter.layout
    if not is_deferred(base) or not base.sliceable or 0 not in layout.batch:
        return use(lambda base: _column_norm(base, adapter), base)
    arrays, slice_of_base = unstack_base(base)
    factors = {name: getattr(adapter, name) for name in ("a", "b", "scale") if name in adapter.children()}

    def one(stack: Any) -> jax.Array:
        arrays, factors = stack
        return column_norm(slice_of_base(arrays), LowRank(**{"layout": layout.sliced(), "scale": adapter.scale, **factors}))

    return lax.map(one, (arrays, factors))


def _column_norm(base: Any, adapter: LowRank) -> jax.Array:
    base, layout, (a_axes, b_axes) = jnp.asarray(base), adapter.layout, adapter.axes()
    wide = wide_dtype(base, jnp.asarray(adapter.a))
    a, b = jnp.asarray(adapter.a, wide), adapter.scaled(jnp.asarray(adapter.b, wide))
    rank, other = -1, -2
    w_axes, kept = tuple(range(base.ndim)), (*layout.batch, *layout.outputs)
    precise: Any = {"precision": "highest", "preferred_element_type": wide}
    squares = contract(base, w_axes, base, w_axes, kept, **precise)
    if not adapter.rank:
        return jnp.sqrt(squares)
    across = contract(a, a_axes, base, w_axes, b_axes, **precise)
    mixed = contract(across, b_axes, b, b_axes, kept, **precise)
    renamed = lambda axes: tuple(other if axis == rank else axis for axis in axes)
    gram_axes = (*layout.batch, rank, other)
    gram = contract(a, a_axes, a, renamed(a_axes), gram_axes, **precise)
    twice = contract(gram, gram_axes, b, renamed(b_axes), b_axes, **precise)
    pair = contract(twice, b_axes, b, b_axes, kept, **precise)
    return jnp.sqrt(jnp.maximum(squares + 2 * mixed + pair, 0))

"""The inputs that a kernel meets, observed: their second moments come out as a gradient (for EVA, CorDA and the like)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.adapter import wide_dtype
from lora_jax.core.contraction import contract
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.interpreter import NotLowRank
from lora_jax.core.rules.products import Product
from lora_jax.core.weight import Term, WeightContext


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors", "moments"], meta_fields=["path"])
@dataclasses.dataclass(frozen=True)
class ObservedTerm(Term):
    """Changes no result, but the gradient of `moments` is the sum of `[x; 1] [x; 1]^T` over the inputs x of each product.

    Args:
      factors: an identity matrix `(*in, inputs)`, which brings the in axes into order.
      path: the parameter.
      moments: `(*batch, (inputs + 1) ** 2)`, whose gradient is wanted.
    """

    moments: Factor

    @property
    def rowwise(self) -> str:
        return "inputs to be summed up"

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        return dataclasses.replace(self, factors=tuple(map(fn, self.factors)), moments=fn(self.moments))

    def times(self, fn: Callable[[Factor], Factor], axes: Sequence[int] = ()) -> Self:
        """What scales the in axes scales the inputs; the rest is nothing to them."""
        (eye,) = self.factors
        if not set(axes) & set(eye.axes):
            return self
        if not set(axes) <= set(eye.axes):
            raise NotLowRank("it is multiplied elementwise with an array that varies along in and other axes at once")
        return dataclasses.replace(self, factors=(fn(eye),))

    def added(self, context: WeightContext, product: Product, result: Any) -> Any:
        product.rows(self.rowwise)
        (eye,), x, x_labels, into = self.factors, product.x, product.x_labels, self.moments
        inputs = [axis for axis in eye.axes if axis != RANK]
        if math.prod(eye.array.shape[eye.dim(axis)] for axis in inputs) < eye.array.shape[eye.dim(RANK)]:
            raise NotLowRank("an in axis is taken apart, so that no product meets the whole input")
        if not set(inputs) <= {*x_labels} or not set(inputs) <= {*product.contracted, *into.axes}:
            raise NotLowRank("the product does not contract all the in axes")
        batch = [axis for axis in into.axes if axis != RANK and axis in x_labels]
        rows = [label for label in x_labels if label not in [*inputs, *batch]]
        wide = wide_dtype(x)
        z = contract(x.astype(wide), x_labels, eye.array.astype(wide), eye.axes, [*batch, *rows, RANK], precision="highest")
        z = lax.stop_gradient(jnp.concatenate([z, jnp.ones((*z.shape[:-1], 1), wide)], -1))
        return _observe(result, z, into, batch, rows)


def _observe(result: Any, z: Any, into: Factor, batch: list[int], rows: list[int]) -> Any:
    """The result as it is, with a derivative of its own: that of `into` is the sum of `z z^T` over the rows."""
    labels, other = [*batch, *rows], min([*batch, *rows, RANK]) - 1  # a label that nothing else has

    def moments(z: Any) -> Any:
        second = contract(z, [*labels, RANK], z, [*labels, other], [*batch, RANK, other], precision="highest")
        flat = Factor(second.reshape(*second.shape[:-2], -1), (*batch, RANK))
        return jnp.broadcast_to(flat.laid_along(into.axes, into.array.dtype), into.array.shape)

    @jax.custom_vjp
    def observe(result: Any, z: Any, into: Any) -> Any:
        return result

    def forward(result: Any, z: Any, into: Any) -> tuple[Any, Any]:
        return result, moments(z)

    def backward(found: Any, cotangent: Any) -> tuple[Any, Any, Any]:
        return cotangent, jnp.zeros_like(z), found

    observe.defvjp(forward, backward)
    return observe(result, z, into.array)

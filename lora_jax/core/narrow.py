"""Products with a factor that is narrow on one side, whose gradients leave the wide side where it lies.

The gradients of A and B are products over tokens, `x^T dz` and `z^T dy`, of which one operand is narrow. JAX makes each with
the cotangent first and transposes the result. XLA moves that transpose into the operands, and its compiler for CPUs then makes
a transposed copy of the wide one; into the copy of dy it puts what makes dy, the derivative of an activation say, where it
takes many times as long. Here, for CPUs, the narrow operand comes first, and a transpose of the result stays outside.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from lora_jax.core.jax_compat import Primitive

Numbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def narrow_dot_general(
    x: Any, factor: Any, numbers: Numbers, precision: Any = None, preferred_element_type: Any = None, out_sharding: Any = None
) -> jax.Array:
    """`lax.dot_general` of an activation and a factor. On a mesh with explicit axes, and in `shard_map`, it is that function.

    >>> x, a = jnp.ones((3, 5, 4)), jnp.ones((4, 2))
    >>> loss = lambda a: narrow_dot_general(x, a, (((2,), (0,)), ((), ()))).sum()
    >>> jax.grad(loss)(a)[:, 0]
    Array([15., 15., 15., 15.], dtype=float32)
    """
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    if out_sharding is not None or jax.sharding.get_abstract_mesh().manual_axes:
        return lax.dot_general(x, factor, numbers, out_sharding=out_sharding, **options)
    return _product(x, factor, tuple({"dimension_numbers": numbers, **options}.items()))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _product(x: Any, factor: Any, options: tuple[Any, ...]) -> jax.Array:
    return lax.dot_general(x, factor, **dict(options))


def _product_jvp(options: tuple[Any, ...], primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    (x, factor), (dx, dfactor) = primals, tangents
    result = lax.dot_general(x, factor, **dict(options))  # which a policy of `jax.checkpoint` knows
    parts = [] if isinstance(dx, SymbolicZero) else [lax.dot_general(dx, factor, **dict(options))]
    parts += [] if isinstance(dfactor, SymbolicZero) else [_of_factor.bind(x, dfactor, **dict(options))]
    return result, sum(parts[1:], parts[0])


_product.defjvp(_product_jvp, symbolic_zeros=True)


# --- the part of the derivative that is linear in the factor


def _gradient(cotangent: Any, x: Any, factor: Any, **options: Any) -> jax.Array:
    """The factor's gradient: for CPUs with the narrow operand first, for others as JAX has it.

    TPU compilers transpose nothing wide either way, and estimate JAX's own as equal or up to 0.6% of a step faster.
    """
    shape = jax.ShapeDtypeStruct(factor.aval.shape, factor.aval.dtype)
    product = lambda x, factor: lax.dot_general(x, factor, **options)
    usual = lambda cotangent, x: jax.linear_transpose(functools.partial(product, x), shape)(cotangent)[0]
    narrow_first = functools.partial(_narrow_first, factor=shape, **options)
    return lax.platform_dependent(cotangent, x, cpu=narrow_first, default=usual)


def _narrow_first(cotangent: Any, x: Any, *, factor: Any, dimension_numbers: Numbers, **options: Any) -> jax.Array:
    """From the narrower of x and the cotangent times the other one."""
    (x_summed, summed), (x_batch, batch) = dimension_numbers
    x_free = _rest(x.ndim, x_summed, x_batch)
    free = _rest(len(factor.shape), summed, batch)
    own = [summed[list(x_summed).index(axis)] for axis in sorted(x_summed)]  # x's axes in the factor
    rows, stack = range(len(batch), len(batch) + len(x_free)), range(len(batch))
    sides = (x, x_free, x_batch, own), (cotangent, rows, stack, free)
    (first, its_rows, its_stack, left), (second, rows, stack, right) = sorted(sides, key=lambda side: side[0].size)
    result = lax.dot_general(first, second, ((its_rows, rows), (its_stack, stack)), **options)
    order = [*batch, *left, *right]
    if order != sorted(order):
        result = lax.transpose(lax.optimization_barrier(result), [order.index(axis) for axis in range(len(order))])
    return result.astype(factor.dtype)


def _rest(ndim: int, *taken: Sequence[int]) -> list[int]:
    return [axis for axis in range(ndim) if all(axis not in axes for axes in taken)]


def _x_gradient(cotangent: Any, x: Any, factor: Any, **options: Any) -> jax.Array:
    """The gradient of x, of which a derivative of the derivative may be linear."""
    shape = jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype)
    return jax.linear_transpose(lambda x: lax.dot_general(x, factor, **options), shape)(cotangent)[0]


def _batched(operands: Sequence[Any], axes: Sequence[Any], *, dimension_numbers: Numbers, **options: Any) -> tuple[Any, int]:
    (summed, batch), mapped = dimension_numbers, [axis is not None for axis in axes]
    first = [jnp.moveaxis(array, axis, 0) if m else array for array, axis, m in zip(operands, axes, mapped)]
    shifted = lambda axes: tuple(tuple(axis + m for axis in side) for side, m in zip(axes, mapped))
    summed, batch = shifted(summed), shifted(batch)
    if all(mapped):
        batch = tuple((0, *side) for side in batch)
    x_rows = operands[0].ndim - len(summed[0]) - len(batch[0])
    place = 0 if all(mapped) else len(batch[0]) + (0 if mapped[0] else x_rows)
    return _of_factor.bind(*first, dimension_numbers=(summed, batch), **options), place


def _type(x: Any, factor: Any, **options: Any) -> Any:
    return lax.dot_general_p.abstract_eval(x, factor, out_sharding=None, **options)[0]


_of_factor = Primitive("narrow_dot_general")
_of_factor.def_impl(lax.dot_general)
_of_factor.def_abstract_eval(_type)
ad.defbilinear(_of_factor, _x_gradient, _gradient)
batching.primitive_batchers[_of_factor] = _batched
mlir.register_lowering(_of_factor, mlir.lower_fun(lax.dot_general, multiple_results=False))

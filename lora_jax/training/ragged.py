"""Ragged products in a function that is vmapped over rows.

JAX cannot vmap a ragged product whose matrices all rows share (experts), and where each row picks a matrix of a stack it
gathers them. `call` walks over such a function with a vmap rule for either: the rows are joined to one ragged product, sorted
by the matrix that each needs. Everything else is evaluated as it stands.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat
from lora_jax.core.interpreter import Context, Equation, ImplicitArray, NotLowRank, Rule, evaluate, is_implicit
from lora_jax.core.rules import kernels
from lora_jax.core.rules.control_flow import CONTROL_FLOW
from lora_jax.core.tracing import is_array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stack", "number"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class IndexedMatrix(ImplicitArray):
    """`stack[number]`, zero for a number below 0, not gathered yet.

    Args:
      stack: `(matrices, ...)`.
      number: a scalar, which differs from row to row; the rows are sorted by it, those below 0 last.
    """

    stack: Any
    number: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    def value(self) -> jax.Array:
        """The matrix, gathered."""
        return _gathered(self.stack, self.number)

    def as_array(self, context: Context, eqn: Equation | None, reason: str) -> jax.Array:
        return self.value()

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """`fn` applied to each matrix."""
        return dataclasses.replace(self, stack=jax.vmap(fn)(self.stack))

    def unstack(self) -> tuple[Any, Callable[[Any], Self]]:
        """An indexed stack of layers is scanned with its layers in front."""
        return jnp.moveaxis(self.stack, 1, 0), lambda layer: dataclasses.replace(self, stack=layer)

    def in_iteration(self, index: Any) -> Self:
        return self

    def constrained(self, sharding: Any) -> jax.Array:
        return lax.with_sharding_constraint(self.value(), sharding)

    def shard_specs(self, spec: Any) -> Any:
        raise NotLowRank("a shard would need to know its place")


def _gathered(stack: Any, number: Any) -> jax.Array:
    """A number beyond the stack gives NaN."""
    found = stack.at[number].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(number < 0, jnp.zeros_like(found), found)


class RowContext(Context):
    """A walk over a function of one row: ragged products get a vmap rule wherever they are."""

    def handles(self, eqn: Equation, values: Sequence[Any]) -> bool:
        return super().handles(eqn, values) or _has_ragged(eqn)

    def apply(self, eqn: Equation, values: Sequence[Any]) -> list[Any]:
        """JAX can't vmap a kernel for grouped rows any better than its own ragged product."""
        if product := kernels.product_of(eqn):
            return evaluate(self, *kernels.traced_product(eqn, product), values)
        return super().apply(eqn, values)


def _has_ragged(eqn: Equation) -> bool:
    """Whether an equation is a ragged product, or calls a function that has one."""
    if eqn.primitive.name == "ragged_dot_general":
        return True
    if product := kernels.product_of(eqn):
        return any(map(_has_ragged, kernels.traced_product(eqn, product)[0].eqns))
    if eqn.primitive.name not in CONTROL_FLOW:
        return False
    inner = [item for value in eqn.params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    jaxprs = [jaxpr for jaxpr, _ in map(jax_compat.open_jaxpr, inner) if hasattr(jaxpr, "eqns")]
    return any(_has_ragged(sub) for jaxpr in jaxprs for sub in jaxpr.eqns)


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, of which some leaves are `IndexedMatrix`, with the rules of this module."""
    leaves, treedef = jax.tree.flatten(args, is_leaf=is_implicit)
    is_traced = [is_implicit(leaf) or is_array(leaf) for leaf in leaves]

    def flat(*arrays: Any) -> Any:
        rest = iter(arrays)
        return fn(*jax.tree.unflatten(treedef, [next(rest) if traced else x for traced, x in zip(is_traced, leaves)]))

    traced = [leaf for traced, leaf in zip(is_traced, leaves) if traced]
    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*[jax.eval_shape(_plain, leaf) for leaf in traced])
    context = RowContext(RULES)
    results = evaluate(context, *jax_compat.open_jaxpr(jaxpr), traced)
    return jax.tree.unflatten(jax.tree.structure(out), context.arrays(results, None, "the function returns it"))


def _plain(value: Any) -> Any:
    return value.value() if is_implicit(value) else value


def _move(context: Context, eqn: Equation, indexed: IndexedMatrix) -> list[Any]:
    return [indexed.map(lambda matrix: jax_compat.bind(eqn, [matrix])[0])]


def _dot_general(context: Context, eqn: Equation, lhs: Any, rhs: Any) -> list[Any]:
    """A product of an activation with an indexed matrix."""
    (lc, rc), (lb, _) = eqn.params["dimension_numbers"]
    if is_implicit(lhs) == is_implicit(rhs) or lb:
        return jax_compat.bind(eqn, [_plain(lhs), _plain(rhs)])
    x, indexed, xc, pc = (rhs, lhs, rc, lc) if is_implicit(lhs) else (lhs, rhs, lc, rc)
    x_free = [d for d in range(x.ndim) if d not in xc]
    p_shape = indexed.shape
    p_free = [d for d in range(len(p_shape)) if d not in pc]
    size = math.prod(x.shape[d] for d in xc)
    rows = lax.transpose(x, (*x_free, *xc)).reshape(-1, size)
    matrices = lax.transpose(indexed.stack, (0, *(d + 1 for d in (*pc, *p_free)))).reshape(len(indexed.stack), size, -1)
    precision, dtype = eqn.params["precision"], eqn.params["preferred_element_type"]
    if isinstance(precision, tuple) and is_implicit(lhs):
        precision = precision[::-1]
    result = _pick_and_multiply(precision, dtype)(rows, matrices, indexed.number)
    x_sizes, p_sizes = [x.shape[d] for d in x_free], [p_shape[d] for d in p_free]
    result = result.reshape(*x_sizes, *p_sizes)
    n = len(x_free)
    return [lax.transpose(result, (*range(n, result.ndim), *range(n))) if is_implicit(lhs) else result]


@functools.cache
def _pick_and_multiply(precision: Any, dtype: Any) -> Callable[..., Any]:
    """`x stack[number]`, `(rows, in)` by `(matrices, in, out)`; vmapped over x and the number, one ragged product."""

    def multiply(x: Any, stack: Any, number: Any) -> Any:
        return lax.dot(x, _gathered(stack, number), precision=precision, preferred_element_type=dtype)

    product = jax.custom_batching.custom_vmap(multiply)

    @product.def_vmap
    def _(axis_size: int, batched: Sequence[bool], x: Any, stack: Any, number: Any) -> tuple[Any, bool]:
        if list(batched) != [True, False, True]:
            return jax.vmap(multiply, in_axes=tuple(0 if b else None for b in batched))(x, stack, number), True
        count = len(stack)
        zero = jnp.concatenate([stack, jnp.zeros_like(stack[:1])])  # the matrix of rows without one
        sizes = x.shape[1] * jnp.bincount(jnp.where(number < 0, count, number), length=count + 1)
        flat = x.reshape(axis_size * x.shape[1], -1)
        result = lax.ragged_dot(flat, zero, sizes.astype(jnp.int32), precision, dtype).reshape(axis_size, x.shape[1], -1)
        return jnp.where((number < count)[:, None, None], result, jnp.full_like(result, jnp.nan)), True

    return product


def _ragged_dot(context: Context, eqn: Equation, x: Any, matrices: Any, sizes: Any, *offset: Any) -> list[Any]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, _) = numbers.dot_dimension_numbers
    group = numbers.rhs_group_dimensions
    x, matrices = _plain(x), _plain(matrices)
    if (xc, xb) != ((1,), ()) or numbers.lhs_ragged_dimensions != (0,) or len(group) != 1 or offset:
        return jax_compat.bind(eqn, [x, matrices, sizes, *offset])
    free = next(d for d in range(3) if d not in (*group, *wc))
    ordered = lax.transpose(matrices, (group[0], wc[0], free))
    return [_shared(eqn.params["precision"], eqn.params["preferred_element_type"])(x, ordered, sizes)]


@functools.cache
def _shared(precision: Any, dtype: Any) -> Callable[..., Any]:
    """`lax.ragged_dot`; vmapped over all but the matrices, one ragged product of all rows, sorted by their group.

    The derivative is written out, since JAX can't transpose a function with a vmap rule of its own.
    """

    def multiply(x: Any, matrices: Any, sizes: Any) -> Any:
        return lax.ragged_dot(x, matrices, sizes, precision, dtype)

    def gradient(x: Any, matrices: Any, sizes: Any, out: Any) -> Any:
        return jax.linear_transpose(lambda matrices: multiply(x, matrices, sizes), matrices)(out)[0]

    shared = jax.custom_batching.custom_vmap(multiply)
    of_matrices = jax.custom_batching.custom_vmap(gradient)
    product = jax.custom_vjp(shared)

    def backward(operands: Any, out: Any) -> tuple[Any, Any, None]:
        x, matrices, sizes = operands
        return _shared(precision, x.dtype)(out, matrices.mT, sizes), of_matrices(x, matrices, sizes, out), None

    product.defvjp(lambda *operands: (shared(*operands), operands), backward)

    @of_matrices.def_vmap
    def _(axis_size: int, batched: Sequence[bool], *operands: Any) -> tuple[Any, bool]:
        return jax.vmap(gradient)(*_spread(axis_size, batched, operands)), True

    @shared.def_vmap
    def _(axis_size: int, batched: Sequence[bool], x: Any, matrices: Any, sizes: Any) -> tuple[Any, bool]:
        if batched[1]:
            return jax.vmap(multiply)(*_spread(axis_size, batched, (x, matrices, sizes))), True
        x, sizes = _spread(axis_size, (batched[0], batched[2]), (x, sizes))
        places = jnp.arange(x.shape[1])
        group = jax.vmap(lambda ends: jnp.searchsorted(ends, places, side="right"))(jnp.cumsum(sizes, 1)).reshape(-1)
        order = jnp.argsort(group, stable=True)
        flat = x.reshape(axis_size * x.shape[1], -1)
        result = multiply(flat[order], matrices, sizes.sum(0, dtype=sizes.dtype))
        back = jnp.zeros_like(result).at[order].set(result, unique_indices=True)
        return back.reshape(axis_size, x.shape[1], -1), True

    return product


def _spread(axis_size: int, batched: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    """All with the mapped axis, as JAX's own rule for ragged products wants them."""
    return [x if has else jnp.broadcast_to(x, (axis_size, *x.shape)) for x, has in zip(values, batched)]


MOVES = ("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "rev", "copy", "name")
RULES: dict[str, Rule] = {
    **CONTROL_FLOW,
    "custom_jvp_call": CONTROL_FLOW["core_call"],  # the products of a pair: what they compute
    **dict.fromkeys(MOVES, _move),
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
}

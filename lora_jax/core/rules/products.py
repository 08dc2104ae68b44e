"""What each JAX primitive that uses a `Weight` as a kernel does with it: one function per primitive.

The weight meets an activation here, and its terms stay factors: `x (W + A B) = x W + (x A) B`. For a probe the rule records
which axes the product contracts instead. A rule raises `NotLowRank` where the terms cannot stay factors.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat
from lora_jax.core.adapter import wide_dtype
from lora_jax.core.weight import (
    RANK,
    Factor,
    NotLowRank,
    Term,
    Use,
    Weight,
    contract,
    dropout,
    is_weight,
    scaled_along,
    two_step,
    use,
)

Equation = jax_compat.Equation
Rule = Callable[..., list[Any]]


def note_product(weight: Weight, eqn: Equation, roles: Mapping[int, str]) -> None:
    """Record a product with an activation: for probes the role of each of the parameter's axes, and that it is used."""
    weight.reach()
    if not weight.probing:
        return
    for term in weight.terms:
        by_origin = {}
        for factor in term.factors:
            held = {roles[axis] for axis in factor.axes}
            role = next((role for role in ("in", "out", "batch") if role in held), "stack")
            by_origin |= dict.fromkeys(factor.origin, role)
        roles_in_order = tuple(by_origin[axis] for axis in sorted(by_origin))
        record(term, eqn.primitive.name, "product", roles_in_order, site=term.log.site(eqn))


def record(term: Term, primitive: str, kind: str, roles: tuple[str, ...] = (), *, site: str, reason: str = "") -> None:
    """Note a probe's use."""
    term.log.record(term.path, Use(kind, primitive, site, roles, reason))


def note_lookup(weight: Weight, eqn: Equation | None) -> None:
    """Record that picked rows of a probe are used as an activation: picked axes are in, the others out."""
    for term in weight.terms:
        roles = {axis: "in" if factor.indexed else "out" for factor in term.factors for axis in factor.origin}
        in_order = tuple(roles[axis] for axis in sorted(roles))
        primitive, site = term.log.place(eqn)
        record(term, primitive, "lookup", in_order, site=site)


def is_lookup(weight: Weight, roles: Mapping[int, str]) -> bool:
    """Whether picked rows act as an activation: in a product as `roles` says, or as an operand of anything else (no roles).

    A product whose batch axes are the picked ones, and that has in and out axes besides, uses a stack of kernels; one that
    contracts or keeps a dynamic slice uses a block of a kernel.
    """
    if not weight.picked:
        return False
    factors = [factor for term in weight.terms for factor in term.factors]
    picked = {roles.get(axis) for factor in factors if factor.indexed for axis in factor.axes}
    rest = {roles.get(axis) for factor in factors if not factor.indexed for axis in factor.axes}
    if not roles:
        return bool(picked) or len(weight.shape) <= 1
    stack = picked <= {"batch"} and {"in", "out"} <= rest
    block = any(factor.indexed == "slice" for factor in factors) and {"in", "out"} <= picked | rest
    return not (stack or block)


def as_activation(eqn: Equation | None, value: Any) -> Any:
    """Picked rows as an array, for an equation (or the return) that uses them as an activation; anything else as it is."""
    if is_weight(value) and not value.needs_product and is_lookup(value, {}):
        if value.probing:
            note_lookup(value, eqn)
        return value.value
    return value


def _roles(ndim: int, contracting: Sequence[int], batch: Sequence[int]) -> dict[int, str]:
    return {axis: "in" if axis in contracting else "batch" if axis in batch else "out" for axis in range(ndim)}


def _dot_general(eqn: Equation, lhs: Any, rhs: Any) -> list[Any]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    l_roles, r_roles = _roles(len(lhs.shape), lc, lb), _roles(len(rhs.shape), rc, rb)
    lhs, rhs = _settle(eqn, lhs, l_roles, rhs), _settle(eqn, rhs, r_roles, lhs)
    if not is_weight(lhs) and not is_weight(rhs):
        return jax_compat.bind(eqn, [lhs, rhs])
    if is_weight(lhs) and is_weight(rhs):
        return _product_of_weights(eqn, (lhs, l_roles), (rhs, r_roles))
    x_first = is_weight(rhs)
    weight, x, roles = (rhs, lhs, r_roles) if x_first else (lhs, rhs, l_roles)
    wc, xc, wb, xb = (rc, lc, rb, lb) if x_first else (lc, rc, lb, rb)
    note_product(weight, eqn, roles)
    result = use(lambda x, base: jax_compat.bind(eqn, [x, base] if x_first else [base, x])[0], x, weight.base)
    if weight.probing:
        return [result]
    n = len(weight.shape)
    shared = dict(zip((*xc, *xb), (*wc, *wb)))
    x_labels = [shared.get(d, n + d) for d in range(x.ndim)]
    x_free = [n + d for d in range(x.ndim) if d not in shared]
    w_free = [axis for axis in range(n) if roles[axis] == "out"]
    out = [*wb, *(x_free + w_free if x_first else w_free + x_free)]
    options = _precision(eqn, x_first), eqn.params["preferred_element_type"]
    einsum = functools.partial(contract, precision=options[0], preferred_element_type=options[1])
    product = lambda x, kept: use(lambda x, base: einsum(x, x_labels, base, range(n), [*kept, *out]), x, weight.base)
    plain, contracted = result, [axis for axis in range(n) if roles[axis] == "in"]
    for term in weight.terms:
        if term.tap is not None:
            result = tapped(result, x, x_labels, term, contracted)
            continue
        dropped = dropout(x, term)
        change = two_step(dropped, x_labels, term, out, *options).astype(result.dtype)
        if term.excess:
            change = change + _more_base(term, plain, product, x, dropped, x_labels, out)
        change = _with_bias(change, term, out, contracted)
        result = result + _where_active(change, term, dict(zip(x_labels, x.shape)), x_free, out)
    return [result]


def _where_active(change: Any, term: Term, sizes: Mapping[int, int], x_free: Sequence[int], out: Sequence[int]) -> Any:
    """The change for the rows of x that the term counts for: x has `(batch, tokens)` as its first free axes, or merged."""
    if term.active is None:
        return change
    mask, shape = term.active, tuple(sizes[label] for label in x_free)
    if shape[: mask.ndim] != mask.shape:
        mask = mask.reshape(-1)
    if shape[: mask.ndim] != mask.shape:
        raise NotLowRank(f"`active` has the shape {term.active.shape}, but the rows of this product's input are {shape}")
    return scaled_along(change, [Factor(mask, tuple(x_free[: mask.ndim]))], out)


def tapped(result: Any, x: Any, x_labels: Sequence[int], term: Term, contracted: Sequence[int]) -> Any:
    """The result as it is, with a derivative of its own: the tap's gradient is the sum of `[x; 1] [x; 1]^T`."""
    (eye,), tap = term.factors, term.tap
    assert tap is not None
    inputs = [axis for axis in eye.axes if axis != RANK]
    if math.prod(eye.array.shape[eye.dim(axis)] for axis in inputs) < eye.array.shape[eye.dim(RANK)]:
        raise NotLowRank("an in axis is taken apart, so that no product meets the whole input")
    if not set(inputs) <= {*x_labels} or not set(inputs) <= {*contracted, *tap.axes}:
        raise NotLowRank("the product does not contract all the in axes")
    batch = [axis for axis in tap.axes if axis != RANK and axis in x_labels]
    rows = [label for label in x_labels if label not in [*inputs, *batch]]
    wide = wide_dtype(x)
    z = contract(x.astype(wide), x_labels, eye.array.astype(wide), eye.axes, [*batch, *rows, RANK], precision="highest")
    z = lax.stop_gradient(jnp.concatenate([z, jnp.ones((*z.shape[:-1], 1), wide)], -1))
    other, labels = min(x_labels) - 2, [*batch, *rows]  # a label that nothing else has

    def moments(z: Any) -> Any:
        second = contract(z, [*labels, RANK], z, [*labels, other], [*batch, RANK, other], precision="highest")
        flat = Factor(second.reshape(*second.shape[:-2], -1), (*batch, RANK))
        return jnp.broadcast_to(flat.laid_along(tap.axes, tap.array.dtype), tap.array.shape)

    @jax.custom_vjp
    def observe(result: Any, z: Any, tap: Any) -> Any:
        return result

    forward = lambda result, z, tap: (result, moments(z))
    observe.defvjp(forward, lambda found, cotangent: (cotangent, jnp.zeros_like(z), found))
    return observe(result, z, tap.array)


def _more_base(
    term: Term, plain: Any, product: Callable[..., Any], x: Any, dropped: Any, x_labels: Sequence[int], out: Sequence[int]
) -> Any:
    """DoRA's `(g - 1) (x W)`, with the branch's dropout on x.

    A factor that lies along in axes alone scales x instead; one along in and out axes (experts that one product sums over)
    needs a product that keeps those in axes: `product(x, axes)` puts them in front.
    """
    on_x = [set(factor.axes) <= set(x_labels) - set(out) for factor in term.excess]
    before, after = ([factor for factor, on in zip(term.excess, on_x) if on == wanted] for wanted in (True, False))
    kept = sorted({axis for factor in after for axis in factor.axes} - set(out))
    changed = before or kept or dropped is not x
    base = product(scaled_along(dropped, before, x_labels), kept).astype(plain.dtype) if changed else plain
    return jnp.sum(scaled_along(base, after, [*kept, *out]), tuple(range(len(kept))))


def _with_bias(result: Any, term: Term, out: Sequence[int], contracted: Sequence[int]) -> Any:
    """A product with the bias of the branch added: it must contract all in axes at once."""
    if term.bias is None:
        return result
    others = {axis for factor in term.factors for axis in factor.axes} - {RANK, *term.bias.axes}
    if not set(term.bias.axes) <= set(out) or not others <= set(contracted):
        raise NotLowRank("the adapter's bias does not lie along the out axes of this use")
    return result + term.bias.laid_along(out, result.dtype)


def _settle(eqn: Equation, value: Any, roles: Mapping[int, str], other: Any) -> Any:
    """Picked rows become an activation where the product uses them as one."""
    if is_weight(value) and value.picked and (is_weight(other) or is_lookup(value, roles)):
        if value.probing:
            note_lookup(value, eqn)
        return value.value
    return value


def _product_of_weights(eqn: Equation, *operands: tuple[Weight, Mapping[int, str]]) -> list[Any]:
    (lhs, _), (rhs, _) = operands
    if not lhs.probing:
        raise NotLowRank("two adapted parameters are multiplied with each other: exclude one of them from the targets")
    if set(lhs.paths()) & set(rhs.paths()):
        raise NotLowRank("it is multiplied with itself")
    for weight, roles in operands:
        note_product(weight, eqn, roles)
    return jax_compat.bind(eqn, [lhs.base, rhs.base])


def _precision(eqn: Equation, x_first: bool) -> Any:
    """The equation's precision, for a product that has x on the left."""
    precision = eqn.params["precision"]
    return precision[:: 1 if x_first else -1] if isinstance(precision, tuple) else precision


def _conv(eqn: Equation, x: Any, weight: Any) -> list[Any]:
    """`conv(x, W + A B) = conv(x, W) + conv(x, A) B`: A has W's window and in-channels, B the out-channels."""
    params, x = eqn.params, as_activation(eqn, x)
    if is_weight(x):
        raise NotLowRank("it is the input of a convolution, not its kernel")
    if not is_weight(weight):
        return jax_compat.bind(eqn, [x, weight])
    if params["batch_group_count"] != 1:
        raise NotLowRank("the convolution has a batch_group_count")
    spec = params["dimension_numbers"].rhs_spec
    note_product(weight, eqn, {axis: "out" if axis == spec[0] else "in" for axis in range(len(weight.shape))})
    multiply = lambda x: use(lambda x, base: jax_compat.bind(eqn, [x, base])[0], x, weight.base)
    result = multiply(x)
    if weight.probing:
        return [result]
    out = [-1] * result.ndim
    out[params["dimension_numbers"].out_spec[1]] = spec[0]
    plain = result

    def product(x: Any, kept: Sequence[int]) -> Any:
        if kept:
            raise NotLowRank("the adapter's magnitude does not lie along the out axis of this convolution")
        return multiply(x)

    _refuse_rowwise(weight)
    for term in weight.terms:
        dropped = dropout(x, term)
        result = result + _conv_branch(eqn, dropped, term.absorbed(), weight.shape, spec).astype(result.dtype)
        if term.excess:
            result = result + _more_base(term, plain, product, x, dropped, (), out)
        result = _with_bias(result, term, out, [axis for axis in range(len(weight.shape)) if axis != spec[0]])
    return [result]


def _refuse_rowwise(weight: Weight) -> None:
    """Raise NotLowRank for a term that needs to know which row of x is which, or all of x."""
    if weight.rowwise:
        raise NotLowRank(f"it has {weight.rowwise}, which plain products alone can take")


def _conv_branch(eqn: Equation, x: Any, term: Term, shape: tuple[int, ...], spec: Sequence[int]) -> Any:
    params, out_axis = eqn.params, spec[0]
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    a, b = sorted(term.factors, key=lambda factor: out_axis in factor.axes)
    if out_axis in a.axes or set(b.axes) != {out_axis, RANK}:
        raise NotLowRank("the adapter's layout is not that of a convolution (in: window and in-channels, out: out-channels)")
    labels = [RANK if axis == out_axis else axis for axis in range(len(shape))]
    whole = lambda factor, axis: factor if axis in (*factor.axes, out_axis) else factor.explicit(axis, shape[axis])
    for axis in range(len(shape)):
        a = whole(a, axis)
    kernel = lax.transpose(a.array.astype(x.dtype), [a.dim(label) for label in labels])
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis)  # every group of in-channels meets the same A
    z = term.scaled(jax_compat.bind_with(eqn, [x, kernel], preferred_element_type=None)[0])
    channel = numbers.out_spec[1]
    rank, size = kernel.shape[out_axis] // groups, shape[out_axis] // groups
    z = z.reshape(*z.shape[:channel], groups, rank, *z.shape[channel + 1 :])
    b_array = jnp.moveaxis(b.array, b.dim(RANK), 0).astype(x.dtype).reshape(rank, groups, size)
    z_labels = list(range(z.ndim))
    out = [*z_labels[: channel + 1], z.ndim, *z_labels[channel + 2 :]]
    y = contract(z, z_labels, b_array, [channel + 1, channel, z.ndim], out, precision=_precision(eqn, True))
    return y.reshape(*y.shape[:channel], groups * size, *y.shape[channel + 2 :])


def _ragged_dot(eqn: Equation, x: Any, weight: Any, group_sizes: Any, *offset: Any) -> list[Any]:
    """Rows of x in groups, one matrix per group (grouped experts): two narrow grouped products."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, _) = numbers.dot_dimension_numbers
    group, x = numbers.rhs_group_dimensions, as_activation(eqn, x)
    if not is_weight(x) and not is_weight(weight):
        return jax_compat.bind(eqn, [x, weight, group_sizes, *offset])
    if is_weight(x) or (xc, xb) != ((1,), ()) or numbers.lhs_ragged_dimensions != (0,) or len(group) != 1 or offset:
        raise NotLowRank("only rows in groups times one matrix per group stays low-rank in a ragged product")
    roles = _roles(len(weight.shape), wc, group)
    note_product(weight, eqn, roles)
    multiply = lambda x: use(lambda x, base: jax_compat.bind(eqn, [x, base, group_sizes])[0], x, weight.base)
    result = multiply(x)
    if weight.probing:
        return [result]
    _refuse_rowwise(weight)
    plain, inner, outer = result, wc[0], next(axis for axis, role in roles.items() if role == "out")
    for term in [term.absorbed() for term in weight.terms]:
        first, second = sorted(term.factors, key=lambda factor: inner not in factor.axes)
        if outer in first.axes or inner in second.axes:
            raise NotLowRank("the adapter's layout is not that of grouped matrices (batch: group, in, out)")
        dropped = dropout(x, term)
        z = term.scaled(_grouped(dropped, first, (group[0], inner, RANK), group_sizes, eqn))
        result = result + _grouped(z, second, (group[0], RANK, outer), group_sizes, eqn).astype(result.dtype)
        per_row = lambda part: _per_row(part, (group[0], outer), x.shape[0], group_sizes, eqn).astype(result.dtype)  # noqa: B023
        if term.excess:
            base = plain if dropped is x else multiply(dropped)
            result = result + functools.reduce(jnp.multiply, map(per_row, term.excess), base)
        if term.bias is not None:
            result = result + per_row(term.bias)
    return [result]


def _per_row(part: Factor, axes: tuple[int, int], rows: int, group_sizes: Any, eqn: Equation) -> Any:
    """What a part (groups, out) says for each row, `(rows, out)`: a grouped product with ones."""
    if not set(part.axes) <= set(axes):
        raise NotLowRank("the adapter's magnitude or bias does not lie along the groups and out axes of this use")
    whole = dataclasses.replace(part, array=part.array[None], axes=(RANK, *part.axes))
    return _grouped(jnp.ones((rows, 1), part.array.dtype), whole, (axes[0], RANK, axes[1]), group_sizes, eqn)


def _grouped(x: Any, factor: Factor, axes: tuple[int, ...], group_sizes: Any, eqn: Equation) -> Any:
    """x times a factor (groups, in, out), or (in, out) where all groups share it."""
    own = [axis for axis in axes if axis in factor.axes]
    array = lax.transpose(factor.array, [factor.dim(axis) for axis in own]).astype(x.dtype)
    precision = _precision(eqn, True)
    return lax.ragged_dot(x, array, group_sizes, precision) if len(own) == 3 else lax.dot(x, array, precision=precision)


PRODUCTS: dict[str, Rule] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}

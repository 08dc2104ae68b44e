"""What each JAX primitive that moves a weight does with it: the same weight, with its axes elsewhere.

A rule takes the equation and its operands, of which at least one is a weight (or `explain`'s probe), and returns the results.
It raises `NotLowRank` where the terms cannot stay factors.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat
from lora_jax.core.deferred import is_deferred, on_bases, placed
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.interpreter import Context, Equation, NotLowRank, Rule, is_implicit
from lora_jax.core.weight import Factored, FactoredContext


def on_base(eqn: Equation, *operands: Any) -> list[Any]:
    bases = [v.base if is_implicit(v) else v for v in operands]
    return on_bases(lambda *arrays: jax_compat.bind(eqn, arrays), *bases)


def _pass(context: Context, eqn: Equation, *operands: Any) -> list[Any]:
    """The equation acts on the base alone, results one to one: name, copy, pvary, constraints, barriers."""
    results = on_base(eqn, *operands)
    return [v.move(result, _unchanged) if is_implicit(v) else result for v, result in zip(operands, results)]


def _unchanged(factor: Factor) -> Factor:
    return factor


def _cast(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    if not jnp.issubdtype(eqn.params["new_dtype"], jnp.floating):
        raise NotLowRank(f"a cast to {eqn.params['new_dtype']} is not linear")
    return _pass(context, eqn, weight)


def _stop_gradient(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    hold = lambda factor: dataclasses.replace(factor, array=lax.stop_gradient(factor.array))
    return [weight.move(on_base(eqn, weight)[0], hold)]


def _sharding_constraint(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    """The base's sharding is fixed; the factors follow."""
    place = lambda array, sharding: jax_compat.bind_with(eqn, [array], sharding=sharding)[0]
    return [weight.move(placed(place, weight.base, eqn.params["sharding"]), _unchanged)]


def _reshard(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    """On a mesh with explicit axes: each factor goes where the weight's axes that it has go."""
    to = eqn.params["dst_sharding"]
    by_axis = dict(enumerate(to.spec))
    place = lambda array, sharding: jax_compat.bind_with(eqn, [array], dst_sharding=sharding)[0]

    def follow(factor: Factor) -> Factor:
        own = jax.NamedSharding(to.mesh, jax.P(*(by_axis.get(axis) for axis in factor.axes)))
        return dataclasses.replace(factor, array=place(factor.array, own))

    return [weight.move(placed(place, weight.base, to), follow)]


def _transpose(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    new = {old: position for position, old in enumerate(eqn.params["permutation"])}
    return [weight.move(on_base(eqn, weight)[0], lambda factor: factor.relabel(new))]


def _broadcast_in_dim(context: FactoredContext, eqn: Equation, operand: Any, *dynamic: Any) -> list[Any]:
    """Of any array: one that is broadcast may scale a weight."""
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    new = {old: dim for old, dim in enumerate(dims) if jnp.shape(operand)[old] == shape[dim]}
    base, relabel = on_base(eqn, operand, *dynamic)[0], lambda factor: factor.relabel(new)
    if not is_deferred(base):
        context.add_broadcast(base, relabel(context.without_broadcast(operand.base if is_implicit(operand) else operand)))
    return [operand.move(base, relabel) if is_implicit(operand) else base]


def _squeeze(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    kept = [axis for axis in range(len(weight.shape)) if axis not in eqn.params["dimensions"]]
    new = {old: position for position, old in enumerate(kept)}
    return [weight.move(on_base(eqn, weight)[0], lambda factor: factor.relabel(new))]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which axes of a reshape become which: the finest groups of equal product, size-1 axes left out."""
    old_axes, new_axes = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (old, new))
    volume = lambda shape, axes: math.prod(shape[axis] for axis in axes)
    groups = []
    while old_axes:
        olds, news = [old_axes.pop(0)], [new_axes.pop(0)]
        while volume(old, olds) != volume(new, news):
            if volume(old, olds) < volume(new, news):
                olds.append(old_axes.pop(0))
            else:
                news.append(new_axes.pop(0))
        groups.append((olds, news))
    return groups


def _reshape(context: Context, eqn: Equation, weight: Factored, *dynamic: Any) -> list[Any]:
    """In-axes may be merged with in-axes and split again, out-axes with out-axes; not one with the other."""
    new_shape, order = eqn.params["new_sizes"], eqn.params["dimensions"]
    base = on_base(eqn, weight, *dynamic)[0]
    if order is not None:  # the axes are permuted first
        new = {old: position for position, old in enumerate(order)}
        (ordered,) = on_bases(lambda base: [lax.transpose(base, order)], weight.base)
        weight = weight.move(ordered, lambda factor: factor.relabel(new))
    groups = _groups(weight.shape, new_shape)
    weight = weight.join_axes([set(olds) for olds, _ in groups if len(olds) > 1])

    def reshape(factor: Factor) -> Factor:
        held = [(olds, news) for olds, news in groups if set(olds) & set(factor.axes)]
        for olds, _ in held:
            if not set(olds) <= set(factor.axes):
                raise NotLowRank(f"a reshape from {weight.shape} to {new_shape} merges in and out axes")
        axes = ([RANK] if RANK in factor.axes else []) + [axis for olds, _ in held for axis in olds]
        dims = [factor.dim(axis) for axis in axes]
        dims += [d for d in range(len(factor.axes)) if d not in dims]  # of size 1
        sizes = [factor.array.shape[factor.dim(RANK)]] if RANK in factor.axes else []
        labels = ([RANK] if RANK in factor.axes else []) + [axis for _, news in held for axis in news]
        sizes += [new_shape[axis] for _, news in held for axis in news]
        array = factor.array if dims == sorted(dims) else lax.transpose(factor.array, dims)
        return dataclasses.replace(factor, array=lax.reshape(array, sizes), axes=tuple(labels))

    return [weight.move(base, reshape)]


def _rev(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    def reverse(factor: Factor) -> Factor:
        for axis in eqn.params["dimensions"]:
            factor = factor.along(axis, lambda array, dim: lax.rev(array, (dim,)))
        return factor

    return [weight.move(on_base(eqn, weight)[0], reverse)]


def _slice(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(starts)
    whole = zip(starts, limits, strides, weight.shape)
    weight.divide(axis for axis, (start, limit, stride, size) in enumerate(whole) if (start, limit, stride) != (0, size, 1))

    def cut(factor: Factor) -> Factor:
        for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides)):
            if (start, limit, stride) != (0, weight.shape[axis], 1):
                factor = factor.along(axis, lambda x, d: lax.slice_in_dim(x, start, limit, stride, d))  # noqa: B023
        return factor

    return [weight.move(on_base(eqn, weight)[0], cut)]


def _split(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    axis, start, parts = eqn.params["axis"], 0, []
    weight.divide([axis])
    for base, size in zip(on_base(eqn, weight), eqn.params["sizes"]):
        cut = lambda x, d, start=start, stop=start + size: lax.slice_in_dim(x, start, stop, axis=d)
        parts.append(weight.move(base, lambda factor, cut=cut: factor.along(axis, cut)))
        start += size
    return parts


def _indexed(weight: Factored, axes: Sequence[int], factor: Factor, how: str) -> Factor:
    """Mark a factor that an index into these axes picks from."""
    picks = set(axes) & set(factor.axes) and weight.can_index(axes)
    return dataclasses.replace(factor, indexed=how) if picks else factor


def _dynamic_slice(context: Context, eqn: Equation, weight: Factored, *starts: Any) -> list[Any]:
    sizes = eqn.params["slice_sizes"]
    cut_axes = [axis for axis, size in enumerate(sizes) if size != weight.shape[axis]]
    weight.divide(cut_axes)

    def cut(factor: Factor) -> Factor:
        factor = _indexed(weight, cut_axes, factor, "slice")
        for axis in cut_axes:
            slice_one = lambda x, d, axis=axis: lax.dynamic_slice_in_dim(x, starts[axis], sizes[axis], d)
            factor = factor.along(axis, slice_one)
        return factor

    return [weight.move(on_base(eqn, weight, *starts)[0], cut)]


def _gather(context: Context, eqn: Equation, weight: Factored, indices: Any) -> list[Any]:
    """`w[indices]`: each factor is gathered along the axes that it has.

    An index into a batch axis picks matrices of a stack; one into an in or out axis looks rows up, and ends the weight.
    """
    if is_implicit(indices):
        raise NotLowRank("it is used as an index")
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    removed = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    offsets = dict(zip([axis for axis in range(len(sizes)) if axis not in removed], numbers.offset_dims))
    picked = {axis for axis, size in enumerate(sizes) if size != weight.shape[axis]} | set(removed)
    indexed = [axis for axis in numbers.start_index_map if axis in picked]
    one_row = [axis for axis in indexed if axis in removed]  # `w[i, 2:5]`: rows by i, a window by the slice
    weight.divide(picked)
    base = on_base(eqn, weight, indices)[0]
    index_labels = [d for d in range(base.ndim) if d not in numbers.offset_dims]

    def pick(factor: Factor) -> Factor:
        if not picked & set(factor.axes):
            return factor.relabel(offsets)
        array, labels = _gather_factor(eqn, factor, indices, index_labels, offsets)
        factor = _indexed(weight, one_row or indexed, factor, "rows")
        return dataclasses.replace(factor, array=array, axes=labels)

    return [weight.move(base, pick).settled(context)]


def _gather_factor(
    eqn: Equation, factor: Factor, indices: Any, index_labels: Sequence[int], offsets: Mapping[int, int]
) -> tuple[Any, tuple[int, ...]]:
    """The gather restricted to a factor's own dimensions; index batch dimensions come first in the result."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    own = lambda axes: [axis for axis in axes if axis in factor.axes]
    batched = own(numbers.operand_batching_dims)
    batch_dims = [d for a, d in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims) if a in batched]
    columns = [k for k, axis in enumerate(numbers.start_index_map) if axis in factor.axes]
    kept = [axis for axis in factor.axes if axis == RANK or axis in offsets]
    count = len(index_labels)
    sizes = [factor.array.shape[d] if axis == RANK else params["slice_sizes"][axis] for d, axis in enumerate(factor.axes)]
    dims = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(count, count + len(kept))),
        collapsed_slice_dims=tuple(sorted(factor.dim(axis) for axis in own(numbers.collapsed_slice_dims))),
        start_index_map=tuple(factor.dim(axis) for axis in own(numbers.start_index_map)),
        operand_batching_dims=tuple(factor.dim(axis) for axis in batched),
        start_indices_batching_dims=tuple(batch_dims),
    )
    order = sorted(range(len(batched)), key=lambda i: dims.operand_batching_dims[i])
    dims = dims._replace(
        operand_batching_dims=tuple(dims.operand_batching_dims[i] for i in order),
        start_indices_batching_dims=tuple(batch_dims[i] for i in order),
    )
    own_indices = jnp.concatenate([indices[..., k : k + 1] for k in columns], -1) if columns else indices[..., :0]
    # Out of range the base alone holds the fill value.
    array = lax.gather(factor.array, own_indices, dims, tuple(sizes), mode=params["mode"], fill_value=0)
    return array, (*index_labels, *(axis if axis == RANK else offsets[axis] for axis in kept))


def _join(eqn: Equation, operands: Sequence[Any], axis: int, base: Any) -> list[Any]:
    """Terms of weights laid end to end along an axis: each is zero outside its own place."""
    total, start, terms = sum(v.shape[axis] for v in operands), 0, []
    for v in operands:
        size = v.shape[axis]
        if is_implicit(v):
            terms += [_padded(term, axis, size, (start, total - start - size, 0)) for term in v.terms]
        start += size
    first = next(filter(is_implicit, operands))
    return [first.joined(base, terms, alone=all(map(is_implicit, operands)))]


def _padded(term: Any, axis: int, size: int, config: tuple[int, int, int]) -> Any:
    """A term of `size` along an axis with zeros around it (and between)."""

    def pad(x: Any, dim: int) -> Any:
        return lax.pad(x, jnp.zeros((), x.dtype), [config if d == dim else (0, 0, 0) for d in range(x.ndim)])

    return term.with_axis(axis, size).map(lambda part: part.along(axis, pad))


def _pad(context: Context, eqn: Equation, weight: Any, value: Any) -> list[Any]:
    """The base takes the padding value, the terms take zeros."""
    if is_implicit(value):
        raise NotLowRank("it is the value that something is padded with")
    terms = weight.terms
    for axis, config in enumerate(eqn.params["padding_config"]):
        if config != (0, 0, 0):
            terms = tuple(_padded(term, axis, weight.shape[axis], config) for term in terms)
    return [weight.with_terms(on_base(eqn, weight, value)[0], terms)]


def _joined_operands(context: Context, eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Rows that were looked up, beside something else, are arrays; a stack of looked-up rows of weights is one of weights."""
    if all(is_implicit(v) and v.gathered for v in operands):
        return list(operands)
    return [v.as_activation(context, eqn) if is_implicit(v) else v for v in operands]


def _concatenate(context: Context, eqn: Equation, *operands: Any) -> list[Any]:
    parts = _joined_operands(context, eqn, operands)
    if not any(map(is_implicit, parts)):
        return jax_compat.bind(eqn, parts)
    return _join(eqn, parts, eqn.params["dimension"], on_base(eqn, *parts)[0])


def _stack(context: Context, eqn: Equation, *operands: Any) -> list[Any]:
    parts, axis = _joined_operands(context, eqn, operands), eqn.params["axis"]
    if not any(map(is_implicit, parts)):
        return jax_compat.bind(eqn, parts)

    def expand(v: Any) -> Any:
        if not is_implicit(v):
            return jnp.expand_dims(v, axis)
        new = {old: old + (old >= axis) for old in range(len(v.shape))}
        (base,) = on_bases(lambda base: [jnp.expand_dims(base, axis)], v.base)
        return v.move(base, lambda factor: factor.relabel(new))

    return _join(eqn, [expand(v) for v in parts], axis, on_base(eqn, *parts)[0])


def _reduce_sum(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    """`w.sum(axes)`: of each term the one factor that lies along an axis is summed; looked-up rows are an activation."""
    rows, gone, terms = weight.as_activation(context, eqn), eqn.params["axes"], weight.terms
    if rows is not weight:
        return jax_compat.bind(eqn, [rows])
    summed = [axis for axis in gone if weight.shape[axis] != 1]
    weight.divide(summed)
    for axis in summed:
        terms = [_summed(term, axis, weight.shape[axis]) for term in terms]
    kept = [axis for axis in range(len(weight.shape)) if axis not in gone]
    new = {old: position for position, old in enumerate(kept)}
    terms = [term.map(lambda factor: factor.relabel(new)) for term in terms]
    return [weight.with_terms(on_base(eqn, weight)[0], terms)]


def _summed(term: Any, axis: int, size: int) -> Any:
    """A term summed along an axis, which then has size 1; `size` times itself where none of its arrays lies along the axis."""
    along = [part for part in term.parts if axis in part.axes]
    if len(along) > 1:
        raise NotLowRank("it is summed over an axis along which several arrays of its adapter lie")
    repeated = lambda factor: dataclasses.replace(factor, array=factor.array * size)
    return term.map(lambda part: part.summed(axis)) if along else term.times(repeated)


def _all_gather(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    if not eqn.params["tiled"]:
        raise NotLowRank("an untiled all_gather adds an axis")
    axis = eqn.params["all_gather_dimension"]
    gather = lambda x, d: jax_compat.bind_with(eqn, [x], all_gather_dimension=d)[0]
    return [weight.move(on_base(eqn, weight)[0], lambda factor: factor.along(axis, gather))]


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("copy", "copy_p", "name", "pvary", "pcast", "mesh_cast"), _pass),
    **dict.fromkeys(("optimization_barrier", "reduce_precision"), _pass),
    "convert_element_type": _cast,
    "sharding_constraint": _sharding_constraint,
    "reshard": _reshard,
    "stop_gradient": _stop_gradient,
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast_in_dim,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "split": _split,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "reduce_sum": _reduce_sum,
    "all_gather": _all_gather,
}

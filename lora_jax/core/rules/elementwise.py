"""What elementwise arithmetic does with a weight: scaled or masked along in axes or along out axes alone, it stays one.

`diag(s) W` and `W diag(t)` scale the factor that lies along the axis.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax.core.factor import Factor
from lora_jax.core.interpreter import Context, Equation, NotLowRank, Rule, is_implicit
from lora_jax.core.rules.moves import on_base
from lora_jax.core.weight import Factored, FactoredContext


def _scale(context: FactoredContext, eqn: Equation, lhs: Any, rhs: Any) -> list[Any]:
    """`w * s`, `s * w` and `w / s` with a scalar s, or with an array that lies along in axes or along out axes alone."""
    weight = rhs if not is_implicit(lhs) or (is_implicit(rhs) and _can_scale(lhs, rhs)) else lhs
    other, divides = rhs if weight is lhs else lhs, eqn.primitive.name == "div"
    if divides and weight is rhs:
        raise NotLowRank("something is divided by it")
    if is_implicit(other):
        if not _can_scale(other, weight):
            raise NotLowRank("it is multiplied elementwise with itself, or with another parameter")
        (other,) = context.arrays([other], eqn, "it scales another parameter")
    scale = _scale_of(context, weight, other)
    fn = lambda factor: factor.times(scale, jnp.divide if divides else jnp.multiply)
    base = on_base(eqn, *((weight, other) if weight is lhs else (other, weight)))[0]
    return [weight.with_terms(base, [term.times(fn, scale.axes) for term in weight.terms])]


def _can_scale(scale: Factored, weight: Factored) -> bool:
    """Whether a parameter is constant along an axis that another one varies along."""
    return {axis for axis in scale.varies if scale.shape[axis] != 1} < weight.varies


def _scale_of(context: FactoredContext, weight: Factored, other: Any) -> Factor:
    """An array that enters elementwise arithmetic with a weight, and is constant along an axis that the weight varies along."""
    if jnp.broadcast_shapes(jnp.shape(other), weight.shape) == weight.shape:
        scale = context.without_broadcast(other)
        if not scale.axes or set(scale.axes) < weight.varies:
            return scale
    raise NotLowRank("it enters elementwise arithmetic with an array that is not seen to lie along in or out axes alone")


def _select(context: FactoredContext, eqn: Equation, which: Any, *cases: Any) -> list[Any]:
    """`where(mask, w, other)` with a mask of whole rows or columns: the base takes the other numbers, the terms take zeros."""
    if len(cases) != 2 or all(map(is_implicit, cases)):
        raise NotLowRank("it is one of several arrays that are chosen from")
    weight = next(filter(is_implicit, cases))
    mask = _scale_of(context, weight, which)
    if weight is cases[0]:  # which is chosen where the mask is false
        mask = dataclasses.replace(mask, array=jnp.logical_not(mask.array))
    fn = lambda factor: factor.times(mask, lambda array, keep: jnp.where(keep != 0, array, 0))
    return [weight.with_terms(on_base(eqn, which, *cases)[0], [term.masked(mask, fn) for term in weight.terms])]


def _neg(context: Context, eqn: Equation, weight: Factored) -> list[Any]:
    negative = lambda factor: dataclasses.replace(factor, array=lax.neg(factor.array))
    return [weight.with_terms(on_base(eqn, weight)[0], [term.times(negative) for term in weight.terms])]


ELEMENTWISE: dict[str, Rule] = {"mul": _scale, "div": _scale, "select_n": _select, "neg": _neg}

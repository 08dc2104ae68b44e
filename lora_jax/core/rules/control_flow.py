"""Calls and loops: entered, and emitted again around what the walk makes of their bodies. For any kind of implicit array."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat
from lora_jax.core.interpreter import Context, Equation, Rule, evaluate, is_implicit
from lora_jax.core.rules import kernels


def _jit(context: Context, eqn: Equation, *values: Any) -> list[Any]:
    """Shardings that the call fixes are kept as constraints."""
    if product := kernels.product_of(eqn):
        return kernels.call(context, eqn, product, values)
    params = eqn.params
    operands = list(map(_constrained, values, params.get("in_shardings", (None,) * len(values))))
    results = context.enter(_body, eqn, operands)
    return list(map(_constrained, results, params.get("out_shardings", (None,) * len(results))))


def _body(context: Context, eqn: Equation, *values: Any) -> list[Any]:
    jaxpr, consts = jax_compat.open_jaxpr(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
    with context.inside(eqn):
        return evaluate(context, jaxpr, consts, values)


def _constrained(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    return value.constrained(sharding) if is_implicit(value) else lax.with_sharding_constraint(value, sharding)


def _remat(context: Context, eqn: Equation, *values: Any) -> list[Any]:
    jaxpr, consts = jax_compat.open_jaxpr(eqn.params["jaxpr"])

    def body(*args: Any) -> list[Any]:
        return evaluate(context, jaxpr, consts, args)

    with context.inside(eqn):
        return jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*values)


def _cond(context: Context, eqn: Equation, index: Any, *operands: Any) -> list[Any]:
    def branch(closed: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = jax_compat.open_jaxpr(closed)
        return lambda *args: context.arrays(evaluate(context, jaxpr, consts, args), eqn, "a branch returns it")

    with context.inside(eqn):
        return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *operands)


def _split_carry(
    context: Context, eqn: Equation, carry: Sequence[Any], body: Any, first: int
) -> tuple[list[bool], list[Any], list[Any]]:
    """Which carries are implicit arrays that the loop passes on unchanged; these, and the others as arrays.

    `first` is where the carry begins among the operands of the body.
    """
    outs, ins = body.outvars[: len(carry)], body.invars[first:]
    fixed = [is_implicit(value) and out is into for value, out, into in zip(carry, outs, ins)]
    held = [value for value, hold in zip(carry, fixed) if hold]
    moving = [value for value, hold in zip(carry, fixed) if not hold]
    return fixed, held, context.arrays(moving, eqn, "the loop carries it and changes it")


def _merge_carry(fixed: Sequence[bool], held: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
    """The whole carry from its fixed and its moving parts."""
    rest_held, rest_moving = iter(held), iter(moving)
    return [next(rest_held) if hold else next(rest_moving) for hold in fixed]


def _moving(fixed: Sequence[bool], carry: Sequence[Any]) -> list[Any]:
    return [value for value, hold in zip(carry, fixed) if not hold]


def _in_iteration(values: Sequence[Any], index: Any) -> list[Any]:
    return [value.in_iteration(index) if is_implicit(value) else value for value in values]


def _unstacked(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    return value.unstack() if is_implicit(value) else (value, lambda array: array)


def _scan(context: Context, eqn: Equation, *values: Any) -> list[Any]:
    """Implicit constants and unchanged carries are closed over; a scanned one is scanned array by array."""
    parts = jax_compat.scan_parts(eqn, values)
    jaxpr, consts = jax_compat.open_jaxpr(parts.jaxpr)
    fixed, held, moving = _split_carry(context, eqn, parts.carry, jaxpr, len(parts.consts))
    scanned = list(map(_unstacked, parts.xs))

    def body(moving: Any, slices: Any) -> Any:
        index, arrays = slices
        xs = [rebuild(array) for (_, rebuild), array in zip(scanned, arrays)]
        args = _in_iteration([*parts.consts, *_merge_carry(fixed, held, moving), *xs], index)
        results = evaluate(context, jaxpr, consts, args)
        carry, ys = results[: len(fixed)], results[len(fixed) :]
        return (
            context.arrays(_moving(fixed, carry), eqn, "the loop carries it"),
            context.arrays(ys, eqn, "the loop stacks it up"),
        )

    index = jnp.arange(parts.length) if any(is_implicit(value) and value.keyed for value in values) else None
    options = {"length": parts.length, "reverse": parts.reverse, "unroll": parts.unroll}
    with context.inside(eqn):
        moving, ys = lax.scan(body, moving, (index, [arrays for arrays, _ in scanned]), **options)
    return [*_merge_carry(fixed, held, moving), *ys]


def _while(context: Context, eqn: Equation, *values: Any) -> list[Any]:
    params = eqn.params
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = values[:n], values[n:m], values[m:]
    cond, cond_closed = jax_compat.open_jaxpr(params["cond_jaxpr"])
    body, body_closed = jax_compat.open_jaxpr(params["body_jaxpr"])
    fixed, held, moving = _split_carry(context, eqn, carry, body, len(body_consts))

    def operands(consts: Sequence[Any], state: Any) -> list[Any]:
        index, moving = state
        return _in_iteration([*consts, *_merge_carry(fixed, held, moving)], index)

    def step(state: Any) -> Any:
        results = evaluate(context, body, body_closed, operands(body_consts, state))
        return state[0] + 1, context.arrays(_moving(fixed, results), eqn, "the loop carries it")

    def proceed(state: Any) -> Any:
        return evaluate(context, cond, cond_closed, operands(cond_consts, state))[0]

    with context.inside(eqn):
        _, moving = lax.while_loop(proceed, step, (jnp.int32(0), moving))
    return _merge_carry(fixed, held, moving)


def _shard_map(context: Context, eqn: Equation, *values: Any) -> list[Any]:
    params = eqn.params
    specs = [v.shard_specs(spec) if is_implicit(v) else spec for v, spec in zip(values, params["in_specs"])]
    jaxpr, consts = jax_compat.open_jaxpr(params["jaxpr"])

    def body(*args: Any) -> tuple[Any, ...]:
        return tuple(context.arrays(evaluate(context, jaxpr, consts, args), eqn, "a shard returns it"))

    with context.inside(eqn):
        mapped = jax.shard_map(
            body, mesh=params["mesh"], in_specs=tuple(specs), out_specs=tuple(params["out_specs"]),
            axis_names=params["newly_manual_axes"], check_vma=params["check_vma"],
        )  # fmt: skip
        return list(mapped(*values))


def _compiled_eagerly(rule: Rule) -> Rule:
    """JAX compiles a loop that it meets outside a trace, once for its body; inside one the loop becomes part of that."""

    def apply(context: Context, eqn: Equation, *values: Any) -> list[Any]:
        inside_a_trace = jax_compat.is_traced(jnp.zeros(()))
        return rule(context, eqn, *values) if inside_a_trace else context.enter(rule, eqn, values)

    return apply


CONTROL_FLOW: dict[str, Rule] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _jit),
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _compiled_eagerly(_remat)),
    "scan": _compiled_eagerly(_scan),
    "while": _compiled_eagerly(_while),
    "cond": _compiled_eagerly(_cond),
    "shard_map": _shard_map,
}

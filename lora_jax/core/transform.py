"""The core idea: `lora(fn)` runs any JAX function on a tree whose adapted parameters are never added up.

`fn` is traced once with plain parameters. The jaxpr is then evaluated equation by equation with a `Weight` in each adapted
parameter's place: an equation that no weight reaches is evaluated as it stands; one that a weight reaches is evaluated by its
rule (`moves`, `products`); control flow is entered and emitted again. What no rule covers is an error that names the primitive,
the parameter and the call site, never a silent `W + AB`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core import jax_compat, paths, quantized
from lora_jax.core.adapter import FROZEN, Adapted, Adapter, Full, check, is_adapted
from lora_jax.core.errors import InputError
from lora_jax.core.methods.terms import term
from lora_jax.core.paths import is_quantized
from lora_jax.core.rules.moves import MOVES
from lora_jax.core.rules.products import PRODUCTS, as_activation, record
from lora_jax.core.weight import Factor, Log, NotLowRank, Weight, is_deferred, is_weight, on_bases, unstack_base

Equation = jax_compat.Equation
RULES = MOVES | PRODUCTS
JOINS = ("concatenate", "stack")


class NotLowRankError(InputError):
    """A function uses an adapted parameter in a way that needs `W + AB` as one array."""


@dataclasses.dataclass(eq=False)
class Walk(Log):
    """A walk over a jaxpr: what it finds out, and what it does where no rule applies."""

    materialize: bool = False


def lora(
    fn: Callable[..., Any],
    *,
    key: jax.Array | None = None,
    active: jax.Array | None = None,
    freeze: bool = True,
    unused: Literal["error", "ignore"] = "error",
    on_unsupported: Literal["error", "materialize"] = "error",
) -> Callable[..., Any]:
    """`fn` on an attached tree: `x W + s (x A) B` in every place where `fn` computes `x W`.

    `lora(fn)(attach(variables, adapters), x)` equals `fn(merge(variables, adapters), x)`, in value and gradient, without
    anything of W's shape but W. It composes with `jit`, `grad`, `vmap`, `jax.checkpoint`, `jax.export` and the rest.
    (LoRA: https://arxiv.org/abs/2106.09685)

    Args:
      fn: any function whose first argument is the parameter tree; every other argument passes as it is.
      key: a PRNG key that turns dropout on the low-rank branches on, with a mask of its own for each use.
      active: for adapters with an invocation sequence, where in the input they act: booleans `(batch, tokens)`, as
        `active_from` makes them, or one for all. The input of each adapted product must have these as its first axes, in this
        order, or merged to one.
      freeze: stop the gradient at every frozen leaf, so that differentiating the whole tree costs no more than
        differentiating the adapters.
      unused: what to do with an adapter that `fn` does not use: `"error"`, or `"ignore"` for a call of part of a model.
      on_unsupported: what to do where the parameter is used in a way that is not low-rank: `"error"`, or `"materialize"`
        (form `W + s A B` for that use).

    Raises:
      NotLowRankError: an adapted parameter is used in a way that is not low-rank; see `explain`.
      InputError: the tree has no adapters, an adapter does not fit, or `fn` does not use it.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> x = jnp.ones((5, 3))
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["up"]), model, params, x)
    >>> lj.lora(model)(lj.attach(params, adapters), x).shape
    (5, 2)
    """
    for option, value, choices in (
        ("unused", unused, ("error", "ignore")),
        ("on_unsupported", on_unsupported, ("error", "materialize")),
    ):
        if value not in choices:
            raise InputError(f"{option} must be one of {', '.join(map(repr, choices))}, not {value!r}")

    @functools.wraps(fn)
    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        nodes, treedef = paths.flatten(params, is_leaf=is_adapted)
        adapted = [path for path, node in nodes.items() if is_adapted(node)]
        if not adapted and not any(map(is_quantized, nodes.values())):
            raise InputError("the parameters have no adapters: pass lora(fn) the tree that `attach` returns")
        _check_active({path: nodes[path].adapter for path in adapted}, active)
        walk = Walk(key=key, active=active, materialize=on_unsupported == "materialize")
        traced = trace(fn, treedef, [_base(node) for node in nodes.values()], args, kwargs)
        values = [_value(path, node, walk, freeze) for path, node in nodes.items()]
        out = traced.run(values, walk)
        inputs = traced.reached_inputs(list(nodes))
        idle = [path for path in adapted if path not in (inputs if _is_full(nodes[path]) else walk.reached)]
        if idle and unused == "error":
            raise InputError(
                f"the function does not use these adapted parameters: {', '.join(idle)}. "
                "Leave their adapters out, or say lora(fn, unused='ignore') for a call of part of a model"
            )
        return out

    return apply


def _is_full(node: Adapted) -> bool:
    return isinstance(node.adapter, Full)


def _base(node: Any) -> Any:
    return node.base if is_adapted(node) else node


def _check_active(adapters: dict[str, Any], active: Any) -> None:
    """An adapter that acts from an invocation sequence on needs to know where; others have no use for it."""
    invoked = [path for path, adapter in adapters.items() if getattr(adapter, "invocation", None) is not None]
    if invoked and active is None:
        raise InputError(
            f"the adapters of {', '.join(invoked)} act from an invocation sequence on (aLoRA): say where with "
            "lora(fn, active=active_from(input_ids, invocation_tokens))"
        )
    dtype, shape = getattr(active, "dtype", type(active).__name__), getattr(active, "shape", None)
    if active is not None and (dtype != jnp.bool_ or shape is None or len(shape) not in (0, 2)):
        wanted = "an array of booleans (batch, tokens), as active_from makes it, or one boolean for all"
        raise InputError(f"`active` must be {wanted}, not {dtype} of the shape {shape}")
    if active is not None and not invoked:
        raise InputError("`active` is given, but no adapter has an invocation sequence: leave it out")


def _value(path: str, node: Any, walk: Walk, freeze: bool) -> Any:
    """What stands in a parameter's place: an array, or a `Weight`."""
    hold = _stop_gradient if freeze else lambda leaf: leaf
    if not is_adapted(node):
        return quantized.frozen(hold(node))
    check(path, node.adapter, node.base.shape)
    adapter, base = _hold_frozen(node.adapter), quantized.base(hold(node.base))
    if isinstance(adapter, Full):
        return adapter.value.astype(base.dtype)
    return Weight(base, (term(path, base, adapter, walk),))


def _stop_gradient(leaf: Any) -> Any:
    hold = lambda array: lax.stop_gradient(array) if is_array(array) and jnp.issubdtype(array.dtype, jnp.inexact) else array
    return jax.tree.map(hold, leaf)  # a quantised leaf has several arrays


def _hold_frozen(adapter: Adapter) -> Adapter:
    """An adapter with the gradient stopped at its frozen arrays."""
    hold = lambda label, leaf: lax.stop_gradient(leaf) if label == FROZEN else leaf
    return jax.tree.map(hold, adapter.roles(), adapter)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; anything else (a string, a function, a Python number) is static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or is_quantized(leaf)


@dataclasses.dataclass
class Traced:
    """A function's jaxpr over the arrays of its parameter tree, and how to put its results together."""

    jaxpr: Any
    traced: list[bool]
    unflatten: Callable[[list[Any]], Any]

    def run(self, values: Sequence[Any], walk: Walk) -> Any:
        """Evaluate with a value for each leaf of the parameter tree."""
        jaxpr, consts = jax_compat.open_jaxpr(self.jaxpr)
        results = evaluate(jaxpr, consts, [v for v, traced in zip(values, self.traced) if traced], walk)
        return self.unflatten([_as_array(v, walk, "the function returns it") for v in results])

    def reached_inputs(self, names: Sequence[str]) -> set[str]:
        """The leaves that some equation or result uses."""
        jaxpr, _ = jax_compat.open_jaxpr(self.jaxpr)
        used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
        inputs = [name for name, traced in zip(names, self.traced) if traced]
        return {name for name, v in zip(inputs, jaxpr.invars) if id(v) in used}


def trace(fn: Callable[..., Any], treedef: Any, leaves: Sequence[Any], args: Sequence[Any], kwargs: Any) -> Traced:
    """Trace `fn(tree, *args, **kwargs)` over the arrays of the tree, closing over everything else."""
    traced = [is_array(leaf) for leaf in leaves]
    result: dict[str, Any] = {}

    def flat(*arrays: Any) -> list[Any]:
        rest = iter(arrays)
        tree = jax.tree.unflatten(treedef, [next(rest) if t else leaf for t, leaf in zip(traced, leaves)])
        out, result["tree"] = jax.tree.flatten(fn(tree, *args, **kwargs))
        result["static"] = [None if is_array(leaf) else (leaf,) for leaf in out]
        return [leaf for leaf in out if is_array(leaf)]

    jaxpr = jax.make_jaxpr(flat)(*[quantized.dense_shape(leaf) for t, leaf in zip(traced, leaves) if t])

    def unflatten(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        return jax.tree.unflatten(result["tree"], [next(rest) if s is None else s[0] for s in result["static"]])

    return Traced(jaxpr, traced, unflatten)


# --- the walk ---------------------------------------------------------------------------------------------------------


def evaluate(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], walk: Walk) -> list[Any]:
    """Evaluate an open jaxpr on values of which some are weights; results may be weights too."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
    read = lambda v: v.val if isinstance(v, jax_compat.Literal) else env[v]
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, jax_compat.Literal)}
    kept = {v for v in jaxpr.outvars if not isinstance(v, jax_compat.Literal)}
    for i, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        with jax_compat.source_scope(eqn):
            results = _apply(eqn, values, walk) if any(map(is_weight, values)) else jax_compat.bind(eqn, values)
        env.update(zip(eqn.outvars, results))
        for v in {v for v in eqn.invars if not isinstance(v, jax_compat.Literal)}:
            if last[v] == i and v not in kept:
                del env[v]  # so that an eager run holds no more than the function itself would
    return [read(v) for v in jaxpr.outvars]


def _apply(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    name = eqn.primitive.name
    try:
        if name in CONTROL:
            walk.entered.append(eqn)
            try:
                return CONTROL[name](eqn, values, walk)
            finally:
                walk.entered.pop()
        if name in JOINS and not all(is_weight(v) and v.picked for v in values):
            values = [as_activation(eqn, v) for v in values]  # rows that were looked up, beside something else
            if not any(map(is_weight, values)):
                return jax_compat.bind(eqn, values)
        if name in RULES:
            return RULES[name](eqn, *values)
        raise NotLowRank(_REASONS.get(name, "no rule keeps it low-rank"))
    except NotLowRank as error:
        return jax_compat.bind(eqn, [_as_array(v, walk, str(error), eqn) for v in values])


_OWN_RULE = "the function has a derivative rule of its own, which takes the whole weight"
_REASONS: dict[str, str] = {
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), _OWN_RULE),
    **dict.fromkeys(("add", "sub"), "it is added to something, not multiplied with it"),
}


def _as_array(value: Any, walk: Walk, reason: str, eqn: Equation | None = None) -> Any:
    """A weight as one array, where the caller allowed that."""
    value = as_activation(eqn, value)
    if not is_weight(value):
        return value
    if not value.terms:  # a quantised parameter without an adapter
        return value.value
    name, site = walk.place(eqn)
    if walk.probing:
        for term in value.terms:
            record(term, name, "other", site=site, reason=reason)
    elif not walk.materialize:
        raise NotLowRankError(
            f"{' and '.join(value.paths())} (shape {value.shape}) cannot stay low-rank in `{name}` at {site}: {reason}. "
            "Exclude it from the targets, train it whole (LoraConfig(train=[...])), or form W + AB for such uses with "
            "lora(fn, on_unsupported='materialize'); explain(fn, params, ...) shows every use"
        )
    elif value.needs_product:
        raise NotLowRankError(
            f"{' and '.join(value.paths())} (shape {value.shape}): `{name}` at {site} needs the whole weight, which can't hold "
            f"{value.needs_product}: {reason}"
        )
    return value.value


# --- control flow -----------------------------------------------------------------------------------------------------


def _jit(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    """Evaluated in place; shardings that the call fixes are kept as constraints."""
    params = eqn.params
    jaxpr, consts = jax_compat.open_jaxpr(params.get("jaxpr", params.get("call_jaxpr")))
    values = [_constrain(v, s) for v, s in zip(values, params.get("in_shardings", (None,) * len(values)))]
    results = evaluate(jaxpr, consts, values, walk)
    return [_constrain(v, s) for v, s in zip(results, params.get("out_shardings", (None,) * len(results)))]


def _constrain(value: Any, sharding: Any) -> Any:
    if not isinstance(sharding, jax.sharding.Sharding):
        return value
    if is_weight(value):
        base = on_bases(lambda base: [lax.with_sharding_constraint(base, sharding)], value.base)[0]
        return value.move(base, lambda factor: factor)
    return lax.with_sharding_constraint(value, sharding)


def _remat(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    jaxpr, consts = jax_compat.open_jaxpr(eqn.params["jaxpr"])
    body = lambda *args: evaluate(jaxpr, consts, args, walk)
    return jax.checkpoint(body, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"])(*values)


def _cond(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    index, *operands = values

    def branch(closed: Any) -> Callable[..., list[Any]]:
        jaxpr, consts = jax_compat.open_jaxpr(closed)
        return lambda *args: _arrays(evaluate(jaxpr, consts, args, walk), walk, eqn, "a branch returns it")

    return lax.switch(index, [branch(closed) for closed in eqn.params["branches"]], *operands)


def _arrays(values: Sequence[Any], walk: Walk, eqn: Equation, reason: str) -> list[Any]:
    return [_as_array(v, walk, reason, eqn) for v in values]


def _hoist(carry: list[Any], jaxpr: Any, first: int, walk: Walk, eqn: Equation) -> tuple[list[bool], list[Any]]:
    """Which carries are weights that the loop passes on unchanged; the others as arrays."""
    outs = jaxpr.outvars[: len(carry)]
    fixed = [is_weight(v) and out is into for v, out, into in zip(carry, outs, jaxpr.invars[first:])]
    reason = "the loop carries it and changes it"
    return fixed, [v if hold else _as_array(v, walk, reason, eqn) for v, hold in zip(carry, fixed)]


def _weave(fixed: Sequence[bool], held: Sequence[Any], moving: Sequence[Any]) -> list[Any]:
    """The whole carry from its fixed and its moving parts."""
    rest_held, rest_moving = iter(held), iter(moving)
    return [next(rest_held) if hold else next(rest_moving) for hold in fixed]


def _scan(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    """Weights among the constants and unchanged carries are closed over; a scanned weight is scanned factor by factor."""
    parts = jax_compat.scan_parts(eqn, values)
    jaxpr, consts = jax_compat.open_jaxpr(parts.jaxpr)
    fixed, carry = _hoist(parts.carry, jaxpr, len(parts.consts), walk, eqn)
    held = [v for v, hold in zip(carry, fixed) if hold]
    sliced = [_unstack(v) if is_weight(v) else (v, lambda x: x) for v in parts.xs]

    def body(moving: Any, scanned: Any) -> Any:
        index, xs = scanned
        xs = [rebuild(x) for (_, rebuild), x in zip(sliced, xs)]
        args = [*parts.consts, *_weave(fixed, held, moving), *xs]
        results = evaluate(jaxpr, consts, [_iterate(v, index) for v in args], walk)
        out, ys = results[: len(fixed)], results[len(fixed) :]
        moved = [v for v, hold in zip(out, fixed) if not hold]
        return _arrays(moved, walk, eqn, "the loop carries it"), _arrays(ys, walk, eqn, "the loop stacks it up")

    moving = [v for v, hold in zip(carry, fixed) if not hold]
    index = jnp.arange(parts.length) if any(is_weight(v) and v.keyed for v in values) else None
    options = {"length": parts.length, "reverse": parts.reverse, "unroll": parts.unroll}
    moving, ys = lax.scan(body, moving, (index, [x for x, _ in sliced]), **options)
    return [*_weave(fixed, held, moving), *ys]


def _iterate(value: Any, index: Any) -> Any:
    """A value inside one iteration: weights get dropout keys of its own (and are new objects)."""
    if not is_weight(value):
        return value
    return value.fold_key(index) if value.keyed else jax.tree.map(lambda leaf: leaf, value)


def _unstack(weight: Weight) -> tuple[Any, Callable[[Any], Weight]]:
    """A weight's arrays with axis 0 in front, for scanning, and how to make the weight of one slice from theirs.

    A factor without that axis is the same in every iteration and is closed over.
    """
    weight.divide([0])
    base, rebuild_base = unstack_base(weight.base)
    factors = [part for term in weight.terms for part in term.parts]
    stacked = [jnp.moveaxis(f.array, f.dim(0), 0) if 0 in f.axes else None for f in factors]

    def rebuild(slices: Any) -> Weight:
        slice_of_base, arrays = slices
        rest = iter(arrays)

        def one(factor: Factor) -> Factor:
            array = next(rest)
            axes = tuple(axis - 1 if axis > 0 else axis for axis in factor.axes if axis != 0)
            return dataclasses.replace(factor, array=factor.array if array is None else array, axes=axes)

        return weight.move(rebuild_base(slice_of_base), one)

    return (base, stacked), rebuild


def _while(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    params = eqn.params
    n, m = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = values[:n], values[n:m], values[m:]
    cond, cond_closed = jax_compat.open_jaxpr(params["cond_jaxpr"])
    body, body_closed = jax_compat.open_jaxpr(params["body_jaxpr"])
    fixed, carry = _hoist(carry, body, len(body_consts), walk, eqn)
    held = [v for v, hold in zip(carry, fixed) if hold]

    def inside(consts: list[Any], state: Any) -> list[Any]:
        index, moving = state
        return [_iterate(v, index) for v in [*consts, *_weave(fixed, held, moving)]]

    def step(state: Any) -> Any:
        results = evaluate(body, body_closed, inside(body_consts, state), walk)
        moved = [v for v, hold in zip(results, fixed) if not hold]
        return state[0] + 1, _arrays(moved, walk, eqn, "the loop carries it")

    proceed = lambda state: evaluate(cond, cond_closed, inside(cond_consts, state), walk)[0]
    moving = [v for v, hold in zip(carry, fixed) if not hold]
    _, moving = lax.while_loop(proceed, step, (jnp.int32(0), moving))
    return _weave(fixed, held, moving)


def _shard_map(eqn: Equation, values: list[Any], walk: Walk) -> list[Any]:
    """Each factor is laid out as the weight's axes that it has."""
    params = eqn.params
    for v, spec in zip(values, params["in_specs"]):
        if is_weight(v) and (v.rowwise or is_deferred(v.base)):
            raise NotLowRank(f"it has {v.rowwise or 'quantised blocks'}, for which a shard would need to know its place")
        if is_weight(v):
            v.divide(axis for axis, mesh_axis in enumerate(spec) if mesh_axis is not None)
    jaxpr, consts = jax_compat.open_jaxpr(params["jaxpr"])
    specs = [_factor_specs(v, s) if is_weight(v) else s for v, s in zip(values, params["in_specs"])]
    body = lambda *args: tuple(_arrays(evaluate(jaxpr, consts, args, walk), walk, eqn, "a shard returns it"))
    mapped = jax.shard_map(
        body, mesh=params["mesh"], in_specs=tuple(specs), out_specs=tuple(params["out_specs"]),
        axis_names=params["newly_manual_axes"], check_vma=params["check_vma"],
    )  # fmt: skip
    return list(mapped(*values))


def _factor_specs(weight: Weight, spec: Any) -> Weight:
    """The weight's `PartitionSpec`s, in the weight's own structure."""
    by_axis = dict(enumerate(spec))
    place = lambda f: dataclasses.replace(f, array=jax.P(*(by_axis.get(axis) for axis in f.axes)))
    keyless = lambda term: term if term.key is None else dataclasses.replace(term, key=jax.P())
    moved = weight.move(spec, place)
    return Weight(moved.base, tuple(map(keyless, moved.terms)))


CONTROL: dict[str, Callable[[Equation, list[Any], Walk], list[Any]]] = {
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _jit),
    **dict.fromkeys(("remat2", "checkpoint", "remat"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}

"""The core idea: `lora(fn)` runs any JAX function on a tree whose adapted parameters are never added up.

`fn` is traced once with plain parameters. Its jaxpr is then evaluated equation by equation, with a `Weight` (a base and two
small factors) in each adapted parameter's place. For `fn = lambda p, x: jnp.tanh(x @ p["w"].T)` the jaxpr

    { lambda w:f32[6,8] x:f32[5,8]. let
        t:f32[8,6] = transpose[permutation=(1, 0)] w
        y:f32[5,6] = dot_general[dimension_numbers=(([1], [0]), ([], []))] x t
        z:f32[5,6] = tanh y
      in (z,) }

becomes, for a pair A `(8, 2)` and B `(2, 6)`,

    { lambda w:f32[6,8] a:f32[8,2] b:f32[2,6] x:f32[5,8]. let
        t:f32[8,6] = transpose[permutation=(1, 0)] w        the weight is (t, a, b): its factors are relabelled, not touched
        p:f32[5,6] = dot_general x t                        the product with the base, as it was
        u:f32[5,2] = dot_general x a
        v:f32[5,2] = mul u 2.0                              alpha / r, on the smallest array
        q:f32[5,6] = dot_general v b
        y:f32[5,6] = add p q
        z:f32[5,6] = tanh y                                 no weight reaches it: evaluated as it stands
      in (z,) }

Read next: `weight.py` (what a `Weight` is), then one rule: `rules/moves.py` for an equation that moves a weight, or
`dot_general` in `rules/products.py` for one that uses it. What no rule covers is an error that names the primitive, the
parameter and the call site, never a silent `W + AB`.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import paths, quantized
from lora_jax.core.adapter import FROZEN, Adapter, Full, check, is_adapted
from lora_jax.core.errors import InputError
from lora_jax.core.methods.terms import term
from lora_jax.core.paths import is_quantized
from lora_jax.core.rules import RULES
from lora_jax.core.tracing import check_function, is_array, walk
from lora_jax.core.weight import Weight, WeightContext


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

    Jit it: outside of `jit` Python runs `fn` at each call, as without `lora`, and what it does is traced. What `fn` calls
    through `jit` or in loops is compiled once.

    Args:
      fn: any function whose first argument is the parameter tree; every other argument passes as it is. What it changes in
        NNX objects among them it changes in the caller's.
      key: a PRNG key that turns dropout on the low-rank branches on, with a mask of its own for each use.
      active: for adapters with an invocation sequence, where in the input they act: booleans `(batch, tokens)`, as
        `active_from` makes them, or one for all. The input of each adapted product must have these as its first axes, in this
        order, or merged to one.
      freeze: stop the gradient at every frozen leaf, so that differentiating the whole tree costs no more than
        differentiating the adapters.
      unused: what to do with an adapter that no result of `fn` depends on: `"error"`, or `"ignore"` for a call of part of a
        model.
      on_unsupported: what to do where the parameter is used in a way that is not low-rank: `"error"`, or `"materialize"`
        (form `W + s A B` for that use).

    Raises:
      NotLowRankError: an adapted parameter is used in a way that is not low-rank; see `explain`.
      InputError: the tree has no adapters, an adapter does not fit, or `fn` does not use it.
      TypeError: `fn` is no function, but a Flax module, say.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> def model(params, x):
    ...     return jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((3, 4)), "down": jnp.ones((4, 2))}
    >>> x = jnp.ones((5, 3))
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["up"]), model, params, x)
    >>> lj.lora(model)(lj.attach(params, adapters), x).shape
    (5, 2)
    """
    check_function(fn)
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
        context = WeightContext(RULES, materialize=on_unsupported == "materialize")
        bases = [_base(node) for node in nodes.values()]
        values = [_value(path, node, freeze, key, active) for path, node in nodes.items()]
        out, used = walk(context, fn, treedef, bases, values, args, kwargs)
        idle = [path for path, use in zip(nodes, used) if path in adapted and not use]
        if idle and unused == "error":
            raise InputError(
                f"the function does not use these adapted parameters: {', '.join(idle)}. "
                "Leave their adapters out, or say lora(fn, unused='ignore') for a call of part of a model"
            )
        return out

    return apply


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


def _value(path: str, node: Any, freeze: bool, key: Any, active: Any) -> Any:
    """What stands in a parameter's place: an array, or a `Weight`."""
    hold = _stop_gradient if freeze else lambda leaf: leaf
    if not is_adapted(node):
        return quantized.frozen(hold(node))
    check(path, node.adapter, node.base.shape)
    adapter, base = _hold_frozen(node.adapter), quantized.base(hold(node.base))
    if isinstance(adapter, Full):
        return adapter.value.astype(base.dtype)
    return Weight(base, (term(path, base, adapter, key, active),))


def _stop_gradient(leaf: Any) -> Any:
    hold = lambda array: lax.stop_gradient(array) if is_array(array) and jnp.issubdtype(array.dtype, jnp.inexact) else array
    return jax.tree.map(hold, leaf) if is_quantized(leaf) else hold(leaf)


def _hold_frozen(adapter: Adapter) -> Adapter:
    """An adapter with the gradient stopped at its frozen arrays."""
    hold = lambda label, leaf: lax.stop_gradient(leaf) if label == FROZEN else leaf
    return jax.tree.map(hold, adapter.roles(), adapter)

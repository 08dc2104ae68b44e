"""Flax NNX modules as plain functions of their parameters."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import jax
from flax import nnx

from lora_jax.core import paths
from lora_jax.core.errors import InputError


@overload
def functional(
    model: nnx.Module, *, state: Literal["closed"] = "closed", method: str = "__call__"
) -> tuple[Callable[..., Any], nnx.State]: ...


@overload
def functional(
    model: nnx.Module, *, state: Literal["returned"], method: str = "__call__"
) -> tuple[Callable[..., Any], nnx.State, nnx.State]: ...


def functional(model: nnx.Module, *, state: Literal["closed", "returned"] = "closed", method: str = "__call__") -> Any:
    """A module as a function of its `nnx.Param`s, for `init` and `lora`; the module itself is left as it is.

    What else a module holds (batch statistics, random streams, caches) is its state. A closed state is that of the
    module now, at every call: batch statistics don't move, and dropout draws the same mask each time, so train such
    modules with a returned one.

    Args:
      model: the module.
      state: `"closed"`: `fn(params, *args, **kwargs)` closes over the state and drops what the call changes in it;
        `"returned"`: `fn(params, state, *args, **kwargs) -> (out, new_state)`.
      method: the name of the method to call.

    Returns:
      `(fn, params)`, or `(fn, params, state)`. Both trees are `nnx.State`s of arrays; `nnx.update(model, params)` puts
      (merged) parameters back into the module.

    Raises:
      TypeError: `model` is not an NNX module, or has no such method.
      InputError: `state` is neither word; or, in a call, the module made or dropped variables.

    >>> import jax.numpy as jnp
    >>> import lora_jax as lj
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    >>> fn, params = functional(model)
    >>> x = jnp.ones((5, 3))
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, params, x)
    >>> list(adapters)
    ['layers/0/kernel', 'layers/2/kernel']
    >>> lj.lora(fn)(lj.attach(params, adapters), x).shape
    (5, 2)
    """
    if state not in ("closed", "returned"):
        raise InputError(f"state must be 'closed' or 'returned', not {state!r}")
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, not a {type(model).__name__}")
    if not callable(getattr(model, method, None)):
        raise TypeError(f"{type(model).__name__} has no method {method!r} to call")
    graph, *split = nnx.split(model, nnx.Param, ...)
    params, rest = map(nnx.as_pure, split)

    def run(params: Any, rest: Any, args: Any, kwargs: Any) -> tuple[Any, nnx.Module]:
        model = nnx.merge(graph, params, rest)
        return getattr(model, method)(*args, **kwargs), model

    def closed(params: Any, *args: Any, **kwargs: Any) -> Any:
        return run(params, rest, args, kwargs)[0]

    def returned(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, nnx.State]:
        out, model = run(params, state, args, kwargs)
        new = nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))
        _check_same_variables(state, new)
        return out, new

    return (closed, params) if state == "closed" else (returned, params, rest)


def _check_same_variables(old: Any, new: Any) -> None:
    if jax.tree.structure(old) != jax.tree.structure(new):
        before, after = (set(paths.flatten(tree)[0]) for tree in (old, new))
        raise InputError(
            f"the call made new variables ({', '.join(sorted(after - before)) or 'none'}) or dropped some "
            f"({', '.join(sorted(before - after)) or 'none'}), so the state can't be given to the next call. Make them "
            "before `functional` (a cache, for instance, with init_cache), or use state='closed'"
        )


def any_object(*trees: Any) -> bool:
    """Whether there is an NNX object in any of these trees."""
    return any(map(_is_object, jax.tree.leaves(trees, is_leaf=_is_object)))


@contextlib.contextmanager
def lent(args: Any, kwargs: Any) -> Iterator[tuple[Callable[..., Any], Callable[[Any], None]]]:
    """How to call a function in a trace with arguments that hold NNX objects, and how to bring home what it changed in them.

    NNX lets no trace change an object from outside, so the function gets copies.

    Yields:
      `call(fn, tree) -> (fn(tree, *args, **kwargs), state)`, for inside the trace, and `give_back(state)`, for outside.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    places = [place for place, leaf in enumerate(leaves) if _is_object(leaf)]
    objects, tag = [leaves[place] for place in places], object()
    graph, changed = nnx.graphdef(objects), False
    with nnx.update_context(tag):
        with nnx.split_context(tag) as context:
            links, state = context.split(objects)
        before, structure = jax.tree.flatten(state)

        def call(fn: Callable[..., Any], tree: Any) -> tuple[Any, Any]:
            nonlocal links, changed
            with nnx.merge_context(tag, inner=True) as context:
                copies = context.merge(links, jax.tree.unflatten(structure, before))
            found = dict(zip(places, copies))
            args, kwargs = jax.tree.unflatten(treedef, [found.get(place, leaf) for place, leaf in enumerate(leaves)])
            out = fn(tree, *args, **kwargs)
            with nnx.split_context(tag) as context:
                links, state = context.split(copies)
            same = all(old is new for old, new in zip(before, jax.tree.leaves(state)))
            changed = not same or nnx.graphdef(copies) != graph
            return out, state

        def give_back(state: Any) -> None:
            if changed:  # objects that are only read may come from another trace
                nnx.update(objects, nnx.state(objects))  # NNX refuses here, with all objects whole, what it must refuse
                with nnx.merge_context(tag, inner=False) as context:
                    context.merge(links, state)

        yield call, give_back


def _is_object(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)

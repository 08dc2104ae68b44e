"""Flax NNX modules as plain functions of their parameters."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import jax
from flax import nnx

from lora_jax.core import jax_compat, paths
from lora_jax.core.errors import InputError

__all__ = ["functional"]


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
    module now, at every call, so a call that changes it (batch statistics that move, dropout that draws) is an error:
    call `model.eval()` before, or train with a returned state.

    Args:
      model: the module.
      state: `"closed"`: `fn(params, *args, **kwargs)` closes over the state;
        `"returned"`: `fn(params, state, *args, **kwargs) -> (out, new_state)`.
      method: the name of the method to call.

    Returns:
      `(fn, params)`, or `(fn, params, state)`. Both trees are `nnx.State`s of arrays; `nnx.update(model, params)` puts
      (merged) parameters back into the module.

    Raises:
      TypeError: `model` is not an NNX module, or has no such method.
      InputError: `state` is neither word; or, in a call, the module changed a closed state, or made or dropped variables
        of a returned one.

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

    counts = set(paths.flatten(nnx.as_pure(nnx.state(model, nnx.RngCount)))[0])

    def run(params: Any, state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, nnx.State]:
        model = nnx.merge(graph, params, state)
        out = getattr(model, method)(*args, **kwargs)
        return out, nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    def closed(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        out, new = run(params, rest, *args, **kwargs)
        if _changed(rest, new):  # or is only given back by a `jit` or `remat` inside, as its jaxpr shows
            _check_closed(lambda state: run(params, state, *args, **kwargs), rest, counts)
        return out

    def returned(params: Any, state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, nnx.State]:
        out, new = run(params, state, *args, **kwargs)
        _check_same_variables(state, new)
        return out, new

    return (closed, params) if state == "closed" else (returned, params, rest)


def _changed(old: Any, new: Any) -> set[str]:
    """The paths of the leaves that are not the same objects in the new tree."""
    before, after = (paths.flatten(tree)[0] for tree in (old, new))
    return {path for path, leaf in before.items() if after.get(path) is not leaf}


def _check_closed(step: Callable[[Any], tuple[Any, Any]], state: Any, counts: set[str]) -> None:
    """An error where a step from a state to (what it returns, the new state) changes a leaf.

    A count of draws may go on if nothing that is returned depends on it, as where `nnx.split_rngs` splits a stream in vain.
    """

    def arrays(state: Any) -> tuple[list[Any], Any]:
        out, new = step(state)
        return [leaf for leaf in jax.tree.leaves(out) if jax_compat.is_traced(leaf)], new

    jaxpr, (out, new) = jax.make_jaxpr(arrays, return_shape=True)(state)
    jaxpr = jax_compat.open_jaxpr(jaxpr)[0]
    needed = dict(zip(paths.flatten(state)[0], jax_compat.needed_inputs(jaxpr, len(out))))
    before = jax.tree.unflatten(jax.tree.structure(state), jaxpr.invars)
    after = jax.tree.unflatten(jax.tree.structure(new), [_origin(jaxpr, var) for var in jaxpr.outvars[len(out) :]])
    if changed := {path for path in _changed(before, after) if path not in counts or needed[path]}:
        raise InputError(
            f"the call changes {', '.join(sorted(changed))}, which a closed state would drop: batch statistics would not "
            "move, and dropout would draw the same mask in each call. Call the module's eval() before `functional`, or "
            "use state='returned' and give the state to the next call"
        )


def _origin(jaxpr: Any, var: Any) -> Any:
    """The variable that another one is, where calls (`jit`, `remat`, `scan`) give back what they are given."""
    for eqn in reversed(jaxpr.eqns):
        if var in eqn.outvars:
            inner = jax_compat.open_jaxpr(eqn.params.get("jaxpr"))[0]
            if inner is None or len(inner.invars) != len(eqn.invars) or len(inner.outvars) != len(eqn.outvars):
                return var
            origin = _origin(inner, inner.outvars[eqn.outvars.index(var)])
            if origin not in inner.invars:
                return var
            var = eqn.invars[inner.invars.index(origin)]
    return var


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

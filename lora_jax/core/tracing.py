"""A function's jaxpr over the arrays of its parameter tree, walked."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core import jax_compat, quantized
from lora_jax.core.interpreter import Context, evaluate
from lora_jax.core.paths import is_quantized


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; anything else (a string, a function, a Python number) is static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or is_quantized(leaf)


def check_function(fn: Any) -> None:
    """Raise a TypeError for a module in the place of its function."""
    of = lambda library: library in sys.modules and isinstance(fn, sys.modules[library].Module)
    if of("flax.nnx"):
        raise TypeError(
            f"{type(fn).__name__} is an NNX module, not a function of parameters: make one by "
            "`fn, params = lora_jax.nnx.functional(module)`"
        )
    if of("flax.linen"):
        raise TypeError(f"{type(fn).__name__} is a Linen module, not a function of parameters: give its `apply`")
    if not callable(fn):
        raise TypeError(f"a function of parameters is needed, not a {type(fn).__name__}")


def walk(
    context: Context,
    fn: Callable[..., Any],
    treedef: Any,
    leaves: Sequence[Any],
    values: Sequence[Any],
    args: Sequence[Any],
    kwargs: Any,
) -> tuple[Any, list[bool]]:
    """`fn(tree, *args, **kwargs)`, with `values` in the place of the tree's arrays.

    It is traced over these arrays and closes over everything else.

    Args:
      context: says what becomes of an implicit value.
      fn: the function.
      treedef: the structure of its tree.
      leaves: the leaves of its tree.
      values: what stands in the place of each leaf, where that is an array.
      args: what follows the tree.
      kwargs: the same by name.

    Returns:
      What the function returns, and for each leaf whether a result, or an effect, depends on it.
    """
    traced = [is_array(leaf) for leaf in leaves]
    structure, static = None, []

    with _lent(args, kwargs) as (call, give_back):

        def flat(*arrays: Any) -> list[Any]:
            nonlocal structure, static
            rest = iter(arrays)
            tree = jax.tree.unflatten(treedef, [next(rest) if t else leaf for t, leaf in zip(traced, leaves)])
            out, structure = jax.tree.flatten(call(fn, tree))
            static = [None if jax_compat.is_traced(leaf) else (leaf,) for leaf in out]
            return [leaf for leaf in out if jax_compat.is_traced(leaf)]

        closed = jax.make_jaxpr(flat)(*[quantized.dense_shape(leaf) for t, leaf in zip(traced, leaves) if t])
        jaxpr, consts = jax_compat.open_jaxpr(closed)
        jaxpr = jax_compat.without_dead_code(jaxpr)
        results = evaluate(context, jaxpr, consts, [value for value, t in zip(values, traced) if t])
        rest = iter(context.arrays(results, None, "the function returns it"))
        out, lent = jax.tree.unflatten(structure, [next(rest) if s is None else s[0] for s in static])
        give_back(lent)

    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    inputs = iter(jaxpr.invars)
    return out, [t and id(next(inputs)) in used for t in traced]


@contextlib.contextmanager
def _lent(args: Sequence[Any], kwargs: Any) -> Iterator[tuple[Callable[..., Any], Callable[[Any], None]]]:
    """How to call a function with these arguments inside a trace, and what then brings home what it changed in them."""
    if "flax.nnx" in sys.modules:
        from lora_jax.core import nnx

        if nnx.any_object(args, kwargs):
            with nnx.lent(args, kwargs) as loan:
                yield loan
            return
    yield lambda fn, tree: (fn(tree, *args, **kwargs), None), lambda state: None

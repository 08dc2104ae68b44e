"""A function's jaxpr over the arrays of its parameter tree."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.core import jax_compat, quantized
from lora_jax.core.interpreter import Context, evaluate
from lora_jax.core.paths import is_quantized


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced; anything else (a string, a function, a Python number) is static."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or is_quantized(leaf)


@dataclasses.dataclass
class Traced:
    """A function's jaxpr over the arrays of its parameter tree, and how to put its results together."""

    jaxpr: Any
    traced: list[bool]
    unflatten: Callable[[list[Any]], Any]

    def run(self, context: Context, values: Sequence[Any]) -> Any:
        """Evaluate with a value for each leaf of the parameter tree."""
        jaxpr, consts = jax_compat.open_jaxpr(self.jaxpr)
        results = evaluate(context, jaxpr, consts, [value for value, traced in zip(values, self.traced) if traced])
        return self.unflatten(context.arrays(results, None, "the function returns it"))

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

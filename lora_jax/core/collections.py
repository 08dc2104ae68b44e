"""Which leaves of a tree are parameters, where the tree itself says so: Linen's collections, NNX's variables."""

import sys
from typing import Any

from lora_jax.core import paths
from lora_jax.core.adapter import is_adapted

PARAMS = "params"


def not_parameters(tree: Any) -> dict[str, str]:
    """The leaves that are no parameters, and what they are: `{path: what}`.

    Beside a node `params` that holds others, as Linen's collections lie; or in an `nnx.Variable` that is no `nnx.Param`.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> not_parameters({"params": {"w": jnp.ones((2, 2))}, "constants": {"fourier": jnp.ones((2, 2))}})
    {'constants/fourier': 'the collection `constants`'}
    >>> not_parameters({"w": nnx.Param(jnp.ones(2)), "mean": nnx.BatchStat(jnp.ones(2))})
    {'mean': 'an nnx.BatchStat'}
    """
    leaves = list(paths.flatten(tree, is_leaf=is_adapted)[0])
    nnx = sys.modules.get("flax.nnx")  # where nobody has imported it, there is none of its states and variables
    if nnx is None:
        return _beside_params(leaves)
    # A state has no collections: what is called `params` in it is part of a module.
    found = {} if isinstance(tree, nnx.State) else _beside_params(leaves)
    return found | _other_variables(nnx, tree, leaves)


def _beside_params(leaves: list[str]) -> dict[str, str]:
    split = {path: path.split("/") for path in leaves}
    holders = {tuple(names[:i]) for names in split.values() for i, name in enumerate(names[:-1]) if name == PARAMS}
    found = {}
    for path, names in split.items():
        beside = [name for i, name in enumerate(names) if tuple(names[:i]) in holders and name != PARAMS]
        if beside:
            found[path] = f"the collection `{beside[0]}`"
    return found


def _other_variables(nnx: Any, tree: Any, leaves: list[str]) -> dict[str, str]:
    is_variable = lambda node: isinstance(node, nnx.Variable)
    nodes, _ = paths.flatten(tree, is_leaf=is_variable)
    others = {path: node for path, node in nodes.items() if is_variable(node) and not isinstance(node, nnx.Param)}
    found = {}
    for path, node in others.items():  # a variable may hold several arrays
        inside = [leaf for leaf in leaves if leaf == path or leaf.startswith(f"{path}/")]
        found |= dict.fromkeys(inside, f"an nnx.{type(node).__name__}")
    return found

"""Compiled steps on trees that hold more than arrays, as the models of Equinox do."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core import paths, tracing
from lora_jax.core.errors import InputError


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an argument of a compiled step, which may also be traced on shapes; all others are parts of it."""
    return tracing.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["structure", "static"])
@dataclasses.dataclass(frozen=True)
class Filtered:
    """A tree as a compiled program takes it.

    Args:
      arrays: its arrays, in order.
      structure: of the tree.
      static: all other leaves, a part of the program: the place, type and value of each (`True` equals `1`).
    """

    arrays: list[Any]
    structure: Any
    static: tuple[tuple[int, type, Any], ...]

    @classmethod
    def of(cls, tree: Any) -> Any:
        """The tree apart; itself if there are only arrays in it, so that its program takes it without this module, too.

        Raises:
          InputError: a leaf is neither an array nor hashable.
        """
        leaves, structure = jax.tree.flatten(tree)
        static = tuple((i, type(leaf), leaf) for i, leaf in enumerate(leaves) if not is_array(leaf))
        if not static:
            return tree
        if not _is_hashable(static):
            path, odd = next((path, leaf) for path, leaf in paths.flatten(tree)[0].items() if not _is_hashable(leaf))
            raise InputError(
                f"{path}: a leaf of the type {type(odd).__name__} is no array and has no hash, so it can't be a part of a "
                "compiled step: make it an array, or keep it out of the variables"
            )
        return cls([leaf for leaf in leaves if is_array(leaf)], structure, static)

    def tree(self) -> Any:
        """The tree as it was."""
        leaves = list(self.arrays)
        for place, _, leaf in self.static:
            leaves.insert(place, leaf)
        return jax.tree.unflatten(self.structure, leaves)


def _whole(tree: Any) -> Any:
    return tree.tree() if isinstance(tree, Filtered) else tree


def _is_hashable(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return is_array(leaf)
    return True


class CompiledStep:
    """A compiled `(state, variables, batch)`; leaves of `variables` that are no arrays (numbers of Python, strings,
    functions) are a part of the program, as under `equinox.filter_jit`: another value is compiled anew.

    Args:
      step: a function of the three.
      compile: `jax.jit` or `jax.pmap`, with its options.
    """

    def __init__(self, step: Callable[[Any, Any, Any], Any], compile: Callable[[Callable[..., Any]], Any]):
        self._compiled = compile(lambda state, variables, batch: step(state, _whole(variables), batch))

    def __call__(self, state: Any, variables: Any, batch: Any) -> Any:
        """Take the step."""
        return self._compiled(state, Filtered.of(variables), batch)

    def trace(self, state: Any, variables: Any, batch: Any) -> Any:
        """As `jax.jit` has it, of arrays or shapes."""
        return self._compiled.trace(state, Filtered.of(variables), batch)

    def lower(self, state: Any, variables: Any, batch: Any) -> Any:
        """As `jax.jit` has it, of arrays or shapes."""
        return self._compiled.lower(state, Filtered.of(variables), batch)

    def _cache_size(self) -> int:
        return self._compiled._cache_size()

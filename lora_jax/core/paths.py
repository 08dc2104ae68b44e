"""Parameter paths as strings, and patterns that select them.

A path is a parameter's key path joined by `/`: `params/layer_0/attn/query/kernel`. Inside one key `%`, `.` and `/` are
written `%25`, `%2E` and `%2F`, so that a path splits at its slashes alone and is a safe file or JSON key. What names nothing
is dropped from its end: the `value` attribute of boxed Linen and NNX leaves, and the number of an only child without a name
(Haliax's arrays), where nothing else is below.
"""

import collections
import difflib
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from lora_jax.core.errors import InputError

__all__ = ["components", "escape", "flatten", "matches", "normalize", "select"]

_ESCAPES = {"%": "%25", ".": "%2E", "/": "%2F"}


def escape(key: str) -> str:
    """One key as a path component.

    Args:
      key: a dict key, attribute or index as text.

    >>> escape("layer.0/out")
    'layer%2E0%2Fout'
    """
    return "".join(_ESCAPES.get(c, c) for c in key)


def _component(key: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(key, name):
            return escape(str(getattr(key, name)))
    return escape(str(key))


def _join(key_path: Sequence[Any]) -> str:
    """A JAX key path as a string.

    >>> import jax
    >>> [(key_path, _)] = jax.tree_util.tree_leaves_with_path({"attn": [{"kernel": 1.0}]})
    >>> _join(key_path)
    'attn/0/kernel'
    """
    return "/".join(map(_component, key_path))


def _in_box(key_path: Sequence[Any]) -> bool:
    """Whether a leaf is the `value` attribute of something, as a boxed leaf is, or has no name at all."""
    *above, last = key_path
    unnamed = isinstance(last, jax.tree_util.FlattenedIndexKey) or last == jax.tree_util.GetAttrKey("value")
    return bool(above) and unnamed


def stable_hash(path: str) -> int:
    """A number of 32 bits for a path, the same everywhere."""
    return zlib.crc32(path.encode())


def fold_in(key: jax.Array, path: str) -> jax.Array:
    """A key of its own for each path."""
    return jax.random.fold_in(key, stable_hash(path))


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is one quantised array (a `qwix.QArray`, recognised by its fields)."""
    return hasattr(node, "qvalue") and hasattr(node, "scale") and hasattr(node, "qtype")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """The leaves of a tree by path, in tree order, and its structure. A quantised array is one leaf.

    Args:
      tree: any pytree.
      is_leaf: as in `jax.tree.flatten`.

    Raises:
      InputError: two leaves have one path (as the dict keys `1` and `"1"` would); the tree is one array, which has none.

    >>> leaves, treedef = flatten({"attn": [{"kernel": 1.0}, {"kernel": 2.0}]})
    >>> leaves
    {'attn/0/kernel': 1.0, 'attn/1/kernel': 2.0}
    >>> jax.tree.unflatten(treedef, leaves.values())
    {'attn': [{'kernel': 1.0}, {'kernel': 2.0}]}
    """
    whole = lambda node: is_quantized(node) or (is_leaf is not None and is_leaf(node))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)
    if leaves and not leaves[0][0]:
        raise InputError('the parameters are one array, which has no path: give it a name, as in {"w": array}')
    siblings = collections.Counter(key_path[:-1] for key_path, _ in leaves)
    by_path: dict[str, Any] = {}
    for key_path, leaf in leaves:
        boxed = siblings[key_path[:-1]] == 1 and _in_box(key_path)
        path = _join(key_path[:-1] if boxed else key_path)
        if path in by_path:
            raise InputError(f"two leaves of the tree have the path {path!r}: give their keys different names")
        by_path[path] = leaf
    return by_path, treedef


def components(path: str) -> list[str]:
    """The parts of a path; a key that holds slashes, as those of Haiku and Keras do, has several.

    Args:
      path: as `flatten` gives it.

    >>> components("net%2F~%2Flayer_0/w")
    ['net', '~', 'layer_0', 'w']
    """
    return path.replace("%2F", "/").split("/")


def in_order(path: str) -> list[Any]:
    """A key to sort paths by: numbers in them as numbers.

    >>> sorted(["layer_10/w", "layer_2/w"], key=in_order)
    ['layer_2/w', 'layer_10/w']
    """
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]


def normalize(pattern: str | re.Pattern[str]) -> str:
    """A pattern as a string: a compiled regular expression becomes `re:` and its text, flags included.

    Args:
      pattern: as in `lora_jax.LoraConfig`.

    Raises:
      InputError: it is empty, or no regular expression.

    >>> import re
    >>> normalize(re.compile("LAYER_[02]/.*", re.IGNORECASE))
    're:(?i)LAYER_[02]/.*'
    """
    if isinstance(pattern, re.Pattern):
        flags = "".join(c for c, flag in zip("aimsx", (re.A, re.I, re.M, re.S, re.X)) if pattern.flags & flag)
        return f"re:(?{flags}){pattern.pattern}" if flags else f"re:{pattern.pattern}"
    if not isinstance(pattern, str) or not pattern.strip("/"):
        raise InputError(f"a pattern is a non-empty string or a compiled regular expression, not {pattern!r}")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise InputError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
    return pattern


def matches(path: str, pattern: str) -> bool:
    """Whether a normalised pattern selects a path.

    A plain pattern is one or more whole components that end the path, with or without the parameter's own name. A pattern
    that starts with `re:` is a regular expression that must match the whole path.

    Args:
      path: as `flatten` gives it.
      pattern: as `normalize` gives it.

    >>> path = "params/layer_0/attn/query/kernel"
    >>> [matches(path, p) for p in ("query", "attn/query", "query/kernel", "layer_0", "re:.*query.*", "re:query")]
    [True, True, True, False, True, False]
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], path) is not None
    found, wanted = components(path), components(pattern.strip("/").replace(".", "%2E"))
    return found[-len(wanted) :] == wanted or found[-len(wanted) - 1 : -1] == wanted


def near_misses(paths: Iterable[str], pattern: str, count: int = 5) -> list[str]:
    """The paths most like a pattern, for an error message."""
    paths = list(paths)
    text = pattern.removeprefix("re:")
    words = [w for w in re.split(r"[^A-Za-z0-9]+", text) if w]
    depth = text.count("/") + 1

    def likeness(path: str) -> float:
        tails = ["/".join(components(path)[-depth - drop :][:depth]) for drop in (0, 1)]
        best = max(difflib.SequenceMatcher(None, tail.lower(), text.lower()).ratio() for tail in tails)
        return best + sum(word.lower() in path.lower() for word in words)

    return sorted(paths, key=likeness, reverse=True)[:count]


def select(paths: Iterable[str], patterns: Iterable[str], option: str) -> list[str]:
    """The paths that any of the patterns selects, in the order of `paths`.

    Args:
      paths: the paths to choose from.
      patterns: normalised patterns.
      option: what the patterns are called, for the error.

    Raises:
      InputError: a pattern selects nothing; the nearest paths are listed.

    >>> select(["params/query/kernel", "params/query/bias"], ["query/kernel"], "targets")
    ['params/query/kernel']
    """
    paths, patterns = list(paths), list(patterns)
    for pattern in patterns:
        if not any(matches(path, pattern) for path in paths):
            raise InputError(no_match(option, pattern, paths))
    return [path for path in paths if any(matches(path, pattern) for pattern in patterns)]


def no_match(option: str, pattern: str, paths: Iterable[str]) -> str:
    """The error for a pattern that selects nothing."""
    near = near_misses(paths, pattern)
    listing = "".join(f"\n  {path}" for path in near) or "\n  (there are no parameters)"
    return (
        f"{option}: the pattern {pattern!r} matches no parameter. A pattern is whole path components that end the path "
        f"('query', 'attn/query', 'query/kernel'), or 're:' and a regular expression for the whole path. "
        f"The nearest paths are:{listing}"
    )

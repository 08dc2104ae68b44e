"""Adapters and whole kernels: `merge` and `unmerge`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapter import Adapter, Full, LowRank, attach, is_adapted, wide_dtype
from lora_jax.dora import gain
from lora_jax.weight import Factor


def merge(variables: Any, adapters: Mapping[str, Adapter], *, check: bool = False) -> Any:
    """Plain parameters with the adapters folded in: `W + s A B` (`g (W + s A B)` with a magnitude), or a `Full`'s value.

    The sum is made in the wider of the kernel's and the adapter's dtype, at least float32, and has the kernel's dtype. The base
    is not changed. An adapter's bias goes to the parameter that its `bias_path` names.

    Args:
      variables: the base tree.
      adapters: `{path: adapter}`.
      check: raise where a merged parameter has a NaN or an infinity (needs concrete arrays).

    Raises:
      ValueError: an adapter does not fit the tree, its bias has no parameter to go to, or `check` finds a value that is not
        finite; the message names the path.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> merge({"w": jnp.zeros((2, 3))}, {"w": pair})["w"]
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=float32)
    """
    folded = jax.tree.map(_folded, attach(variables, adapters), is_leaf=is_adapted)
    merged = _with_biases(folded, adapters, 1.0)
    if check:
        leaves, _ = paths.flatten(merged)
        bad = [path for path in adapters if not bool(jnp.isfinite(leaves[path]).all())]
        if bad:
            raise ValueError(f"merging makes NaN or infinite values in {', '.join(bad)}; the base is unchanged")
    return merged


def unmerge(merged: Any, adapters: Mapping[str, Adapter]) -> Any:
    """The base again, to rounding: `W - s A B`. The inverse of `merge` for low-rank adapters.

    Raises:
      ValueError: an adapter does not fit the tree, or is a `Full` or has a magnitude, so that the merged tree does not hold the
        old value.
    """
    lost = [path for path, a in adapters.items() if isinstance(a, Full) or (isinstance(a, LowRank) and a.magnitude is not None)]
    if lost:
        raise ValueError(
            f"{', '.join(lost)}: a Full adapter and one with a magnitude replace their parameter, so the old value is not in "
            "the merged tree: keep the base, or unmerge the other adapters alone"
        )
    base = jax.tree.map(lambda node: _folded(node, -1.0), attach(merged, adapters), is_leaf=is_adapted)
    return _with_biases(base, adapters, -1.0)


def _folded(node: Any, sign: float = 1.0) -> Any:
    if not is_adapted(node):
        return node
    base, adapter = node.base, node.adapter
    if isinstance(adapter, Full):
        return adapter.value.astype(base.dtype)
    adapter = adapter.widened()
    wide = wide_dtype(base, adapter.a)
    result = base.astype(wide) + sign * adapter.delta().astype(wide)
    if adapter.magnitude is not None:
        layout = adapter.layout
        result = result * Factor(gain(base, adapter), (*layout.batch, *layout.outputs)).laid_along(range(base.ndim), wide)
    return result.astype(base.dtype)


def _with_biases(tree: Any, adapters: Mapping[str, Adapter], sign: float) -> Any:
    """The tree with each adapter's bias in the parameter that it belongs to."""
    biases = {path: a for path, a in adapters.items() if isinstance(a, LowRank) and a.bias is not None}
    if not biases:
        return tree
    leaves, treedef = paths.flatten(tree)
    for path, adapter in biases.items():
        if adapter.bias_path not in leaves:
            missing = f"{adapter.bias_path!r} is not in the tree" if adapter.bias_path else "its layer has none"
            raise ValueError(f"{path}: the adapter's bias can't be merged, since it needs a bias parameter and {missing}")
        leaf = leaves[adapter.bias_path]
        if jnp.shape(leaf) != jnp.shape(adapter.bias):
            raise ValueError(
                f"{path}: the adapter's bias has the shape {jnp.shape(adapter.bias)}, {adapter.bias_path} {jnp.shape(leaf)}"
            )
        change = adapter.widened().scaled(adapter.widened().bias)
        with jax.numpy_dtype_promotion("standard"):
            leaves[adapter.bias_path] = (leaf + sign * change).astype(leaf.dtype)
    return jax.tree.unflatten(treedef, list(leaves.values()))

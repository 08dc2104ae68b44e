"""Adapters and whole kernels: `merge` and `unmerge`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapter import Adapter, Full, LowRank, attach, is_adapted


def merge(variables: Any, adapters: Mapping[str, Adapter], *, check: bool = False) -> Any:
    """Plain parameters with the adapters folded in: `W + s A B`, or a `Full` adapter's value.

    The sum is made in the wider of the kernel's and the adapter's dtype and has the kernel's dtype. The base is not changed.

    Args:
      variables: the base tree.
      adapters: `{path: adapter}`.
      check: raise where a merged parameter has a NaN or an infinity (needs concrete arrays).

    Raises:
      ValueError: an adapter does not fit the tree, or `check` finds a value that is not finite; the message names the path.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> merge({"w": jnp.zeros((2, 3))}, {"w": pair})["w"]
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=float32)
    """
    merged = jax.tree.map(_folded, attach(variables, adapters), is_leaf=is_adapted)
    if check:
        leaves, _ = paths.flatten(merged)
        bad = [path for path in adapters if not bool(jnp.isfinite(leaves[path]).all())]
        if bad:
            raise ValueError(f"merging makes NaN or infinite values in {', '.join(bad)}; the base is unchanged")
    return merged


def unmerge(merged: Any, adapters: Mapping[str, Adapter]) -> Any:
    """The base again, to rounding: `W - s A B`. The inverse of `merge` for low-rank adapters.

    Raises:
      ValueError: an adapter does not fit the tree, or is a `Full`, whose base the merged tree does not hold.
    """
    full = [path for path, adapter in adapters.items() if isinstance(adapter, Full)]
    if full:
        raise ValueError(
            f"{', '.join(full)}: a Full adapter replaces its parameter, so the old value is not in the merged tree: keep "
            "the base, or unmerge the low-rank adapters alone"
        )
    return jax.tree.map(lambda node: _folded(node, -1.0), attach(merged, adapters), is_leaf=is_adapted)


def _folded(node: Any, sign: float = 1.0) -> Any:
    if not is_adapted(node):
        return node
    base, adapter = node.base, node.adapter
    if isinstance(adapter, LowRank):
        with jax.numpy_dtype_promotion("standard"):
            wide = jnp.promote_types(base.dtype, adapter.a.dtype)
        return (base.astype(wide) + sign * adapter.delta().astype(wide)).astype(base.dtype)
    return adapter.value.astype(base.dtype)

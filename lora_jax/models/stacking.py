"""Layers that are scanned over a stack of their parameters, or computed again in the backward pass."""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.core.errors import InputError

Remat = Literal["full", "products"]
# What a layer keeps for its backward pass, where that is not everything; the rest is computed again.
REMAT: dict[str, Any] = {"full": None, "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def again(layer: type[nn.Module], remat: Remat | None, scan_layers: bool) -> Any:
    """The layer, which computes in its backward pass what `remat` says again."""
    return layer if remat is None else nn.remat(layer, prevent_cse=not scan_layers, policy=REMAT[remat])


def scanned(layer: Any, count: int, *in_axes: Any) -> Any:
    """So many layers `(x, *inputs) -> (x, None)` as one, whose parameters are stacked along a leading axis.

    Args:
      layer: the module's class.
      count: how many.
      in_axes: for each input 0, to give each layer its own, or `nn.broadcast`.
    """
    axes: Any = in_axes
    return nn.scan(layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=count, in_axes=axes)


def chosen(views: Sequence[Any], which: jax.Array | None) -> Any:
    """One of several views, by a traced index; without one the first."""
    return views[0] if which is None else jax.tree.map(lambda *parts: jnp.stack(parts)[which], *views)


def check_remat(remat: Any) -> None:
    """Raise an InputError unless there is such a kind of remat."""
    if remat is not None and remat not in REMAT:
        raise InputError(f"remat must be None or one of {', '.join(map(repr, REMAT))}, not {remat!r}")


def number(first: int, count: int) -> str:
    """What stands for a layer's number in the names of stacked ones, of which the stack's first is that one of all `count`.

    >>> number(0, 3), number(1, 3)
    ('{l}', '{l:1|2}')
    """
    return "{l:" + "|".join(map(str, range(first, count))) + "}" if first else "{l}"

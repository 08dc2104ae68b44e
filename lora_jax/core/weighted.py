"""Means of what is cut into parts: sums and their weights, which the parts add up and divide once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import wide_dtype
from lora_jax.core.errors import InputError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Weighted:
    """A sum and what to divide it by: the losses of all learnt tokens, say, and how many these are.

    A loss function returns it where the parts of a batch may weigh differently. Microbatches, devices and processes then add
    totals, weights and the gradients of totals, and divide once: the result is that of one big batch, however it is cut.
    The mean of their means is another number unless all have the same weight; a part of the weight 0 does not count.

    Args:
      total: a scalar, the sum.
      weight: a scalar of at least 0 that does not depend on what is trained.

    >>> losses, learnt = jnp.array([[2.0, 4.0], [6.0, 0.0]]), jnp.array([[1, 1], [1, 0]])
    >>> loss = Weighted((losses * learnt.astype(losses.dtype)).sum(), learnt.sum())
    >>> float(loss.mean())
    4.0
    """

    total: Any
    weight: Any

    def mean(self) -> jax.Array:
        """`total / weight`, a scalar in float32 at least; NaN where both are zero."""
        total = widened(self.total)
        return total / jnp.asarray(self.weight, total.dtype)


def as_weighted(loss: Any) -> Weighted:
    """What a loss function returned; a plain scalar has the weight 1.

    Raises:
      InputError: a total or weight is no scalar.
    """
    if not isinstance(loss, Weighted):
        return Weighted(loss, jnp.ones((), jnp.float32))
    for name in ("total", "weight"):
        if shape := jnp.shape(getattr(loss, name)):
            raise InputError(
                f"the loss function returned a Weighted whose {name} has the shape {shape}: it must be a scalar, such as "
                "Weighted((losses * learnt).sum(), learnt.sum())"
            )
    return loss


def widened(tree: Any) -> Any:
    """The arrays of a tree in float32 at least, as sums need them."""
    wide = lambda leaf: leaf.astype(wide_dtype(leaf))
    return jax.tree.map(lambda leaf: wide(jnp.asarray(leaf)), tree)

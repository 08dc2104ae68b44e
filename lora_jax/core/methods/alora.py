"""Activated LoRA: adapters that act from an invocation sequence on (https://arxiv.org/abs/2504.12397), as PEFT computes it.

Before the sequence the model is the base itself, so that a cache of keys and values made with the base stays good.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lora_jax.core.errors import InputError
from lora_jax.core.factor import Factor, scaled_along
from lora_jax.core.interpreter import NotLowRank
from lora_jax.core.rules.products import Product
from lora_jax.core.weight import LowRankTerm, Method


def active_from(input_ids: Any, invocation_tokens: Sequence[int]) -> jax.Array:
    """Where an aLoRA adapter acts: from the start of the last invocation sequence of each row on, or nowhere.

    Args:
      input_ids: `(batch, tokens)`.
      invocation_tokens: the sequence.

    Returns:
      Booleans `(batch, tokens)`, for `lora(fn, active=...)`.

    Raises:
      InputError: the sequence is empty, or the ids are no rows of tokens.

    >>> active_from(jnp.array([[1, 7, 8, 2], [7, 8, 7, 8], [8, 7, 0, 0]]), [7, 8]).astype(int).tolist()
    [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    """
    ids, count = jnp.asarray(input_ids), len(invocation_tokens)
    if not count or ids.ndim != 2:
        raise InputError(f"active_from needs rows of tokens and a sequence, not the shape {ids.shape} and {count} tokens")
    places = max(ids.shape[1] - count + 1, 0)
    windows = jnp.stack([ids[:, i : i + places] == token for i, token in enumerate(invocation_tokens)])
    start = jnp.max(jnp.where(windows.all(0), jnp.arange(places)[None], -1), axis=1, initial=-1)
    return (start >= 0)[:, None] & (jnp.arange(ids.shape[1])[None] >= start[:, None])


@functools.partial(jax.tree_util.register_dataclass, data_fields=["active"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Invocation(Method):
    """The branch counts where `active` is: booleans `(batch, tokens)`, or one for all."""

    active: Any
    rowwise: ClassVar[str] = "an invocation sequence"

    def after(self, term: LowRankTerm, product: Product, x: Any, y: Any) -> Any:
        """x has `(batch, tokens)` as its first free axes, or merged."""
        rows, mask = product.rows(self.rowwise), self.active
        sizes = dict(zip(product.x_labels, product.x.shape))
        shape = tuple(sizes[label] for label in rows)
        if shape[: mask.ndim] != mask.shape:
            mask = mask.reshape(-1)
        if shape[: mask.ndim] != mask.shape:
            raise NotLowRank(f"`active` has the shape {self.active.shape}, but the rows of this product's input are {shape}")
        return scaled_along(y, [Factor(mask, tuple(rows[: mask.ndim]))], product.out_labels)

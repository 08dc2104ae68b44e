"""Activated LoRA: adapters that act from an invocation sequence on (https://arxiv.org/abs/2504.12397), as PEFT computes it.

Before the sequence the model is the base itself, so that a cache of keys and values made with the base stays good.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import InputError


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

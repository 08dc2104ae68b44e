"""Losses: cross-entropy that saves memory, without the logits of all tokens at once, and those of preferences.

All are functions of arrays, for a loss function of `lora_jax.train.make_train_step`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import wide_dtype
from lora_jax.core.errors import InputError
from lora_jax.training.preferences import Preference, dpo, orpo

__all__ = ["Preference", "dpo", "orpo", "token_cross_entropy"]

LOGITS_AT_ONCE = 2**24  # numbers; 64 MiB in float32


def token_cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    *,
    chunk: int | None = None,
    parts: int = 1,
) -> jax.Array:
    """The cross-entropy of each token, `-log softmax(head(hidden))[label]`, with the logits of a few tokens at a time.

    A scan over chunks of tokens, each of which is computed again in the backward pass, so that nothing of the size
    `(tokens, vocabulary)` is ever held. `head` may use any parameters, adapted, tied or quantised ones too: call this inside
    the function that `lora` gets. The loss of a batch of which some tokens are learnt is
    `lora_jax.train.Weighted((losses * learnt).sum(), learnt.sum())`, not a mean.

    Args:
      head: `(tokens, width) -> (tokens, vocabulary)`.
      hidden: `(*batch, width)`.
      labels: `(*batch)`, integers.
      chunk: at most so many tokens of each part at a time; by default as many as make 2^24 logits.
      parts: into how many parts a mesh cuts the first axis, so that a chunk has tokens of all of them.

    Returns:
      `(*batch)`, in float32 at least.

    Raises:
      InputError: the shapes do not go together, `chunk` is below 1, or `parts` does not divide the first axis.

    >>> import optax
    >>> hidden, weights = jax.random.normal(jax.random.key(0), (2, 5, 4)), jax.random.normal(jax.random.key(1), (4, 7))
    >>> labels = jnp.arange(10).reshape(2, 5) % 7
    >>> found = token_cross_entropy(lambda x: x @ weights, hidden, labels, chunk=3)
    >>> bool(jnp.allclose(found, optax.softmax_cross_entropy_with_integer_labels(hidden @ weights, labels), atol=1e-6))
    True
    """
    if hidden.shape[:-1] != labels.shape:
        raise InputError(f"hidden has the shape {hidden.shape} and labels {labels.shape}; labels need {hidden.shape[:-1]}")
    if chunk is not None and chunk < 1:
        raise InputError(f"chunk must be at least 1, not {chunk}")
    if parts != 1 and (not labels.shape or parts < 1 or labels.shape[0] % parts):
        raise InputError(f"labels of the shape {labels.shape} can't be cut into {parts} equal parts along the first axis")
    width, count = hidden.shape[-1], math.prod(labels.shape) // parts
    if chunk is None:
        vocabulary = jax.eval_shape(head, jax.ShapeDtypeStruct((1, width), hidden.dtype)).shape[-1]
        chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    chunk = min(chunk, max(count, 1))
    chunks = -(-count // chunk)
    chunk = -(-count // chunks) if count else chunk  # all of about one size: padding is computed, too
    padding = chunks * chunk - count
    rows = jnp.pad(hidden.reshape(parts, count, width), ((0, 0), (0, padding), (0, 0)))
    rows = rows.reshape(parts, chunks, chunk, width).swapaxes(0, 1)
    targets = jnp.pad(labels.reshape(parts, count), ((0, 0), (0, padding))).reshape(parts, chunks, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one(rows: jax.Array, targets: jax.Array) -> jax.Array:
        logits = head(rows.reshape(parts * chunk, width))
        logits = logits.astype(wide_dtype(logits))
        chosen = jnp.take_along_axis(logits, targets.reshape(-1, 1), axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - chosen).reshape(parts, chunk)

    _, losses = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (rows, targets))
    return losses.swapaxes(0, 1).reshape(parts, chunks * chunk)[:, :count].reshape(labels.shape)

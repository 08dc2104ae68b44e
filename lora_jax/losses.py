"""Losses that fit: cross-entropy without the logits of all tokens."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.adapter import wide_dtype

LOGITS_AT_ONCE = 2**24  # numbers; 64 MiB in float32


def token_cross_entropy(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, labels: jax.Array, *, chunk: int | None = None
) -> jax.Array:
    """The cross-entropy of each token, `-log softmax(head(hidden))[label]`, with the logits of a few tokens at a time.

    A scan over chunks of tokens, each of which is computed again in the backward pass, so that nothing of the size
    `(tokens, vocabulary)` is ever held. `head` may use any parameters, adapted, tied or quantised ones too: call this inside
    the function that `lora` gets.

    Args:
      head: `(tokens, width) -> (tokens, vocabulary)`.
      hidden: `(*batch, width)`.
      labels: `(*batch)`, integers.
      chunk: at most so many tokens at a time; by default as many as make 2^24 logits.

    Returns:
      `(*batch)`, in float32 at least.

    Raises:
      ValueError: the shapes do not go together, or `chunk` is below 1.

    >>> import optax
    >>> hidden, weights = jax.random.normal(jax.random.key(0), (2, 5, 4)), jax.random.normal(jax.random.key(1), (4, 7))
    >>> labels = jnp.arange(10).reshape(2, 5) % 7
    >>> found = token_cross_entropy(lambda x: x @ weights, hidden, labels, chunk=3)
    >>> bool(jnp.allclose(found, optax.softmax_cross_entropy_with_integer_labels(hidden @ weights, labels), atol=1e-6))
    True
    """
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(f"hidden has the shape {hidden.shape} and labels {labels.shape}; labels need {hidden.shape[:-1]}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    width, count = hidden.shape[-1], math.prod(labels.shape)
    if chunk is None:
        vocabulary = jax.eval_shape(head, jax.ShapeDtypeStruct((1, width), hidden.dtype)).shape[-1]
        chunk = max(1, LOGITS_AT_ONCE // vocabulary)
    chunk = min(chunk, max(count, 1))
    chunks = -(-count // chunk)
    chunk = -(-count // chunks) if count else chunk  # all of about one size: padding is computed, too
    padding = chunks * chunk - count
    rows = jnp.pad(hidden.reshape(count, width), ((0, padding), (0, 0))).reshape(chunks, chunk, width)
    targets = jnp.pad(labels.reshape(count), (0, padding)).reshape(chunks, chunk)

    @jax.checkpoint
    def one(rows: jax.Array, targets: jax.Array) -> jax.Array:
        logits = head(rows)
        logits = logits.astype(wide_dtype(logits))
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    _, losses = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (rows, targets))
    return losses.reshape(-1)[:count].reshape(labels.shape)

"""What the tasks that choose a label share."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax


def order(labels: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The labels in the order of the checkpoint's head where it knows them, else as they are."""
    return tuple(known) if sorted(known) == sorted(labels) else tuple(labels)


def baseline(labels: np.ndarray) -> tuple[str, float]:
    """The accuracy of always saying the most frequent class."""
    counts = np.unique(labels, return_counts=True)[1]
    return "most frequent class", float(counts.max() / counts.sum())


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def count_correct(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """How many labels are right; NaN where a logit is not finite, of which `argmax` would make a label."""
    correct = (logits.argmax(-1) == batch["labels"]).sum()
    return jnp.where(jnp.isfinite(logits).all(), correct, jnp.nan)

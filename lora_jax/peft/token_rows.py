"""Trained rows of a table, as PEFT's `trainable_token_indices` has them: `(k, size)` beside the table, row by row."""

import math
from collections.abc import Collection

import numpy as np

from lora_jax.core.adapter import Layout, Rows
from lora_jax.core.errors import InputError
from lora_jax.peft.slots import Slot

DELTA = "token_adapter.trainable_tokens_delta"


def key(slot: Slot) -> str:
    """What PEFT calls the rows of a slot's table, after the prefix."""
    return f"{slot.module}.{DELTA}"


def is_table(slot: Slot) -> bool:
    """Whether PEFT can train rows of the tensor: an embedding, or a head that is tied to one."""
    return slot.is_kernel and slot.name.kind in ("embedding", "linear") and len(slot.name.groups(len(slot.shape))) == 2


def layout(slot: Slot, known: Collection[str]) -> Layout:
    """The axes of a table: its rows are in, whatever the use.

    Args:
      known: the names of all tensors of the model.

    Raises:
      InputError: the tensor is one of several in the parameter, its rows are several axes there, or it is the weight of a
        linear layer with a bias.
    """
    first, *rest = slot.name.groups(len(slot.shape))
    if f"{slot.module}.bias" in known:
        raise InputError(f"{slot.path}: PEFT leaves out the bias of a linear layer whose rows it trains: {slot.module}.bias")
    if slot.index or len(first) != 1:
        raise InputError(
            f"{slot.path} of the shape {slot.shape} is more than the table {slot.tensor}, so it can't have its rows"
        )
    return Layout((), first, tuple(sorted(axis for group in rest for axis in group)))


def decode(slot: Slot, tensor: np.ndarray) -> np.ndarray:
    """PEFT's rows `(k, size)` as an adapter has them, `(k, *out)`."""
    stored = _stored(slot)
    apart = tensor.reshape(-1, *(slot.shape[axis] for axis in stored))
    return apart.transpose(0, *(1 + stored.index(axis) for axis in sorted(stored)))


def encode(slot: Slot, rows: Rows) -> np.ndarray:
    """The inverse of `decode`."""
    order = sorted(stored := _stored(slot))
    values = np.asarray(rows.values).transpose(0, *(1 + order.index(axis) for axis in stored))
    return values.reshape(len(rows.indices), math.prod(values.shape[1:]))


def _stored(slot: Slot) -> list[int]:
    """The axes of a row in the order of the tensor."""
    return [axis for group in slot.name.groups(len(slot.shape))[1:] for axis in group]

"""One adapter of a stacked parameter from PEFT's pairs, one for each of its tensors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.peft.slots import Slot, decode, layout, place


@dataclasses.dataclass
class Found:
    """The tensors of one pair, laid out as the parameter's, and its rank and scale."""

    slot: Slot
    rank: int
    scale: float
    parts: dict[str, np.ndarray]


def stacked(listed: Sequence[Found]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of one adapter, and its layout, scale and ranks; tensors without a pair have rank 0."""
    slot = listed[0].slot
    laid, rank = layout(slot.name, len(slot.shape)), max(found.rank for found in listed)
    a_shape, b_shape = laid.factor_shapes(slot.shape, rank)
    batch = b_shape[: len(laid.batch)]
    shapes = {"a": a_shape, "b": b_shape, "lambda_d": (*batch, rank)}
    shapes |= dict.fromkeys(("magnitude", "bias", "lambda_b"), (*batch, *b_shape[len(batch) + 1 :]))
    dtype = np.result_type(*(part for found in listed for part in found.parts.values()))
    arrays = {part: np.zeros(shapes[part], dtype) for part in listed[0].parts}
    ranks, scales = np.zeros(batch, int), np.full(batch, listed[0].scale)
    for found in listed:
        here = place(found.slot, laid.batch, len(batch))
        ranks[here], scales[here] = found.rank, found.scale
        for part, array in found.parts.items():
            arrays[part][(*here, *_first(part, found.rank, array.ndim, len(batch) - len(found.slot.index)))] = array
    same = len({found.scale for found in listed}) == 1
    true_ranks = None if (ranks == rank).all() else tuple(map(int, ranks.reshape(-1)))
    scale = listed[0].scale if same else jnp.asarray(scales, jnp.float32)
    return arrays, {"layout": laid, "scale": scale, "ranks": true_ranks}


def bias_path(listed: Sequence[Found], slots: Mapping[str, Slot], shape: tuple[int, ...]) -> str | None:
    """The bias of the same layers, if they have one and its axes lie as those of the adapter's."""
    biases = [slots.get(f"{found.slot.module}.bias") for found in listed]
    first = biases[0]
    if first is None or any(bias is None or bias.path != first.path for bias in biases) or first.shape != shape:
        return None
    ours, theirs = np.zeros(shape, int), np.zeros(shape, int)
    for i, (found, bias) in enumerate(zip(listed, biases)):
        assert bias is not None
        numbers = np.arange(1, 1 + ours.size).reshape(-1)[: math.prod(bias.name.shape(shape))] + i * ours.size
        laid = layout(found.slot.name, len(found.slot.shape))
        ours[place(found.slot, laid.batch, len(shape))] = decode(found.slot, "bias", numbers, 1)
        theirs[place(bias, range(len(shape)), len(shape))] = bias.name.restore(numbers, shape)
    return first.path if np.array_equal(ours, theirs) else None


def _first(part: str, rank: int, ndim: int, experts: int) -> tuple[slice, ...]:
    """The index of the first `rank` places along a part's rank axis."""
    index = [slice(None)] * (ndim - experts)
    if part in ("a", "b", "lambda_d"):
        index[0 if part == "b" else -1] = slice(rank)
    return tuple(index)

"""The change that an initialiser made to the base, made again, so that its adapter fits the original base."""

from collections.abc import Mapping

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.peft.slots import Slot, decode

KINDS = {"pissa": ("linear", "conv1d"), "olora": ("linear",)}


def on_original_base(
    init: str, slot: Slot, weight: np.ndarray, parts: Mapping[str, np.ndarray], scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """`[A, A0]` and `[B; -B0]` of twice the rank: PEFT trained A and B on the base `W - s A0 B0`, so W gets `s (A B - A0 B0)`.

    Args:
      init: `"pissa"` (https://arxiv.org/abs/2404.02948) or `"olora"` (https://arxiv.org/abs/2406.01775).
      slot: the tensor.
      weight: the base's tensor, as Hugging Face has it.
      parts: the file's A `(*in, r)` and B `(r, *out)`.
      scale: s.

    Raises:
      InputError: PEFT's initialiser does not work for such a layer.
    """
    if slot.name.kind not in KINDS[init]:
        raise InputError(
            f"{slot.path}: init_lora_weights={init!r} can't be made again for a layer of the kind {slot.name.kind}"
        )
    matrix = np.asarray(weight, np.float64)
    rank = parts["a"].shape[-1]
    if slot.name.kind == "conv1d":
        matrix = matrix.T
    b0, a0 = _pissa(matrix, rank, scale) if init == "pissa" else _olora(matrix, rank)
    dtype = np.result_type(parts["a"].dtype, parts["b"].dtype, np.float32)
    first, second = (decode(slot, part, array.astype(dtype), rank) for part, array in (("a", a0), ("b", b0)))
    return np.concatenate([parts["a"], first], -1), np.concatenate([parts["b"], -second], 0)


def _pissa(matrix: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The r largest singular values and vectors of `(out, in)`, shared out over both factors."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


def _olora(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first r columns of Q and rows of R of `(out, in)`."""
    q, r = np.linalg.qr(matrix)
    return q[:, :rank], r[:rank]

"""VeRA's files: two trained vectors for each kernel, and once A `(r, largest in)` and B `(largest out, r)` for all of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.peft.config import NO_EFFECT, check_known
from lora_jax.peft.slots import Slot, decode, stored_shape

KIND = "VERA"
SHARED = {"a": "base_model.vera_A", "b": "base_model.vera_B"}
_RANK_AXIS = {"a": 0, "b": 1}
# What VeRA's configuration calls the fields of LoRA's.
_FIELDS = {"r": "r", "vera_dropout": "lora_dropout", "bias": "bias"} | {
    name: name for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
}
# Of no account once it is trained.
_START = {"projection_prng_key", "d_initial", "init_weights", "save_projection", "peft_version"}
_BIAS = {"none": "none", "all": "all", "vera_only": "lora_only"}


def as_lora(fields: Mapping[str, Any], source: Any) -> dict[str, Any]:
    """VeRA's configuration as that of LoRA with a scale of 1.

    Raises:
      InputError: the shared matrices are not in the file, or a field is unknown or has a value that VeRA does not take.
    """
    fields = {"r": 256, "bias": "none"} | dict(fields)
    check_known(fields, {"peft_type", *_FIELDS, *_START, *NO_EFFECT}, source)
    if not fields.get("save_projection", True):
        raise InputError(
            f"{source}: save_projection is off, so the file lacks VeRA's random matrices, which torch alone can draw again: "
            "save the adapter with save_projection=True"
        )
    if not isinstance(fields["bias"], str) or fields["bias"] not in _BIAS:
        raise InputError(f"{source}: bias must be 'none', 'all' or 'vera_only', not {fields['bias']!r:.80}")
    found = {lora: fields[name] for name, lora in _FIELDS.items() if name in fields}
    return found | {"peft_type": "LORA", "lora_alpha": fields["r"], "bias": _BIAS[fields["bias"]]}


def from_lora(fields: Mapping[str, Any]) -> dict[str, Any]:
    """VeRA's configuration, from that of LoRA for pairs of the same modules."""
    found = {name: fields[lora] for name, lora in _FIELDS.items() if lora in fields}
    kept = {name: fields[name] for name in ("fan_in_fan_out", "inference_mode")}
    bias = {lora: name for name, lora in _BIAS.items()}[fields["bias"]]
    return found | kept | {"peft_type": KIND, "bias": bias, "save_projection": True}


def factors(tensors: Mapping[str, np.ndarray], slot: Slot, rank: int) -> dict[str, np.ndarray]:
    """A kernel's A and B: what fits it of the shared matrices.

    Raises:
      InputError: a matrix is too small for it, or of another rank.
    """
    found = {}
    for part, name in SHARED.items():
        matrix, shape = tensors[name], stored_shape(slot, part, rank)
        if matrix.ndim != 2 or matrix.shape[_RANK_AXIS[part]] != rank or min(np.subtract(matrix.shape, shape)) < 0:
            raise InputError(f"{name} has the shape {matrix.shape}, of which {slot.tensor} needs a part of the shape {shape}")
        found[part] = decode(slot, part, matrix[: shape[0], : shape[1]], rank)
    return found


def share(known: Mapping[str, np.ndarray], path: str, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The shared matrices with those of one more pair, A `(r, in)` and B `(out, r)`.

    Raises:
      InputError: the smaller is no part of the larger.
    """
    found = {}
    for part, name in SHARED.items():
        one, other = known.get(name, parts[part]), parts[part]
        common = tuple(slice(min(sizes)) for sizes in zip(one.shape, other.shape))
        axis = _RANK_AXIS[part]
        if one.shape[axis] != other.shape[axis] or not np.array_equal(one[common], other[common]):
            raise InputError(
                f"{path}: VeRA has one {part.upper()} for all kernels in PEFT, each of which has the first part of it, but "
                "this one's is not a part of the others'"
            )
        found[name] = max(one, other, key=np.size)
    return found

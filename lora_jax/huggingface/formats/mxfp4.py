"""`mxfp4`: values of four bits (e2m1), of which 32 along an axis share a power of two, as gpt-oss has its experts.

`X_blocks` of `(experts, out, in / 32, 16)` bytes, the first of two values in the low half of each, and `X_scales` of
`(experts, out, in / 32)` exponents stand for `X` of `(experts, in, out)`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.huggingface.checkpoint_files import SafeTensors
from lora_jax.huggingface.formats.packed import Packed, check_fields, check_part

_KNOWN = ("modules_to_not_convert", "dequantize")  # the file itself says what is packed
_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_LEVELS = np.array([*_POSITIVE, *(-level for level in _POSITIVE)], np.float32)
_BIAS = 127


def find(stored: SafeTensors, config: Mapping[str, Any]) -> dict[str, Packed]:
    """The dense tensors of a checkpoint."""
    check_fields(config, {}, _KNOWN)
    names = [name.removesuffix(_BLOCKS) for name in stored.shapes if name.endswith(_BLOCKS)]
    return {name: _packed(stored, name) for name in names}


def _packed(stored: SafeTensors, name: str) -> Packed:
    blocks = stored.shapes[name + _BLOCKS]
    if len(blocks) != 4:
        raise InputError(f"{name}_blocks has the shape {blocks}, where (experts, out, blocks, 16) is needed")
    experts, out, count, _ = blocks
    check_part(stored, name + _BLOCKS, (experts, out, count, 16), ["U8"])
    check_part(stored, name + _SCALES, (experts, out, count), ["U8"])
    return Packed((experts, count * 32, out), (name + _BLOCKS, name + _SCALES), functools.partial(_read, stored, name))


def _read(stored: SafeTensors, name: str, first: int, last: int) -> np.ndarray:
    codes, exponents = (stored.read_raw(name + part, slice(first, last)) for part in (_BLOCKS, _SCALES))
    values = _LEVELS[np.stack([codes & 15, codes >> 4], -1)].reshape(*codes.shape[:-1], 32)
    dense = np.ldexp(values, exponents.astype(np.int32)[..., None] - _BIAS)
    return dense.reshape(*dense.shape[:2], -1).swapaxes(1, 2)

"""`fp8`: float8 (e4m3) values, of which a block of rows and columns, or a whole tensor, shares a scale.

`X_scale_inv` beside `X` is what a value is multiplied by, as DeepSeek V3 has it and transformers' FineGrainedFP8Config. There
the inputs of a product are rounded to float8, too; here they are not.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.huggingface.checkpoint_files import SafeTensors
from lora_jax.huggingface.formats.packed import FLOATS, Packed, check_fields, check_part

_ONLY = {"fmt": ["e4m3"], "expert_dtype": ["fp8"], "scale_fmt": ["float", "ue8m0"], "activation_scheme": ["dynamic", "static"]}
# Which modules are quantised the file itself says.
_KNOWN = ("weight_block_size", "modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")
_SCALE = "_scale_inv"


def find(stored: SafeTensors, config: Mapping[str, Any]) -> dict[str, Packed]:
    """The dense tensors of a checkpoint."""
    check_fields(config, _ONLY, _KNOWN)
    size = config.get("weight_block_size", [128, 128])
    names = [name.removesuffix(_SCALE) for name in stored.shapes if name.endswith(_SCALE)]
    return {name: _packed(stored, name, size) for name in names}


def _packed(stored: SafeTensors, name: str, size: Any) -> Packed:
    shape, scales = stored.shapes.get(name), stored.shapes[name + _SCALE]
    if shape is None or stored.dtype(name) != "F8_E4M3":
        kind = "missing" if shape is None else f"stored as {stored.dtype(name)}"
        raise InputError(f"there is {name}{_SCALE}, but {name} is {kind}, where F8_E4M3 is needed")
    if math.prod(scales) != 1 and _blocks(shape, size) != scales:
        raise InputError(f"the weight_block_size {size!r} does not cut {name} {shape} into the blocks of its scales {scales}")
    check_part(stored, name + _SCALE, scales, (*FLOATS, "F8_E8M0", "U8"))
    inputs = name.removesuffix("weight") + "activation_scale"

    def read(first: int, last: int) -> np.ndarray:
        values = stored.read_raw(name, slice(first, last)).astype(np.float32)
        return values * _scales(stored, name, (first, last), size)

    return Packed(shape, (name, name + _SCALE, *((inputs,) if inputs in stored.shapes else ())), read)


def _blocks(shape: tuple[int, ...], size: Any) -> tuple[int, ...] | None:
    """How many blocks of a size a tensor has along each axis; `None` if it is no size."""
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        return None
    return *shape[:-2], *(-(-n // one) for n, one in zip(shape[-2:], size))


def _scales(stored: SafeTensors, name: str, rows: tuple[int, int], size: list[int]) -> np.ndarray:
    """The scale of each value in some rows."""
    scales = stored.read_raw(name + _SCALE)
    if scales.dtype == np.uint8:
        scales = scales.view(jnp.float8_e8m0fnu)
    scales, shape = scales.astype(np.float32), stored.shapes[name]
    if scales.size == 1:
        return scales.reshape(1)
    if scales.ndim == 2:
        by_row = scales[np.arange(*rows) // size[0]]
    else:
        by_row = scales[slice(*rows)].repeat(size[0], -2)[..., : shape[-2], :]
    return by_row.repeat(size[1], -1)[..., : shape[-1]]

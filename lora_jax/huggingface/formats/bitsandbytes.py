"""`bitsandbytes`: nf4 and fp4, of which a block shares a scale in reading order, and int8 with a scale for each row.

Four bits: `X` are bytes, the first of two values in the high half of each; `X.quant_map` are the values of the 16 codes,
`X.absmax` the scales, and `X.quant_state.bitsandbytes__nf4` says the rest as JSON. The scales may be quantised again: codes of
`X.nested_quant_map`, of which a block shares one of `X.nested_absmax`, about a common mean.

Eight bits: `M.weight` are int8, and `M.SCB` what 127 stands for in each row. There the inputs of a product are rounded to int8,
too, but for the largest; here they are not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core import files
from lora_jax.core.errors import InputError
from lora_jax.huggingface.checkpoint_files import SafeTensors
from lora_jax.huggingface.formats.packed import FLOATS, Packed, check_fields, check_part, matrix_shape

# What is quantised, and how, the file itself says; the rest is about products.
_KNOWN = (
    "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage", "llm_int8_threshold", "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
)  # fmt: skip
_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_SCALES, _FORMAT = "SCB", "weight_format"


def find(stored: SafeTensors, config: Mapping[str, Any]) -> dict[str, Packed]:
    """The dense tensors of a checkpoint."""
    check_fields(config, {}, _KNOWN)
    fours = {name.removesuffix(state): name for state in _STATES for name in stored.shapes if name.endswith(state)}
    eights = [name.removesuffix(_SCALES) for name in stored.shapes if name.endswith(f".{_SCALES}")]
    found = {name: _four_bits(stored, name, state) for name, state in fours.items()}
    return found | {f"{module}weight": _eight_bits(stored, module) for module in eights}


# --- eight bits -------------------------------------------------------------------------------------------------------


def _eight_bits(stored: SafeTensors, module: str) -> Packed:
    name, scales, form = (module + part for part in ("weight", _SCALES, _FORMAT))
    if name not in stored.shapes:
        raise InputError(f"there is {scales}, but no {name}")
    shape = matrix_shape(stored, name)
    check_part(stored, name, shape, ["I8"])
    check_part(stored, scales, shape[:1], FLOATS)
    if form in stored.shapes and stored.read_raw(form).any():
        raise InputError(f"{form} says that {name} is laid out for one kind of GPU: save it again with a newer bitsandbytes")

    def read(first: int, last: int) -> np.ndarray:
        rows = stored.read_raw(name, slice(first, last)).astype(np.float32)
        return rows * (stored.read_raw(scales)[first:last, None].astype(np.float32) / np.float32(127))

    return Packed(shape, (name, scales, *((form,) if form in stored.shapes else ())), read)


# --- four bits --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _FourBits:
    """A tensor of four bits a value.

    Args:
      stored: the files.
      name: of the dense tensor.
      shape: its shape.
      block: how many values share a scale.
      nested_block: how many scales share one; 0: they are not quantised.
      mean: of the quantised scales.
    """

    stored: SafeTensors
    name: str
    shape: tuple[int, ...]
    block: int
    nested_block: int
    mean: float

    def read(self, first: int, last: int) -> np.ndarray:
        """Some rows."""
        width = math.prod(self.shape[1:])
        begin, end = first * width, last * width
        if begin == end:
            return np.empty((0, *self.shape[1:]), np.float32)
        levels = self.stored.read_raw(f"{self.name}.quant_map").astype(np.float32)
        scales = self._scales(begin // self.block, -(-end // self.block))
        by_value = scales[np.arange(begin, end) // self.block - begin // self.block]
        return (levels[self._codes(begin, end)] * by_value).reshape(-1, *self.shape[1:])

    def _codes(self, begin: int, end: int) -> np.ndarray:
        """The codes of some values, which bytes or other numbers hold."""
        each = 2 * self.stored.read_raw(self.name, slice(0, 1)).itemsize
        packed = self.stored.read_raw(self.name, slice(begin // each, -(-end // each)))
        bytes_ = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)
        codes = np.stack([bytes_ >> 4, bytes_ & 15], -1).reshape(-1)
        return codes[begin % each :][: end - begin]

    def _scales(self, first: int, last: int) -> np.ndarray:
        scales = self.stored.read_raw(f"{self.name}.absmax", slice(first, last))
        if not self.nested_block:
            return scales.astype(np.float32)
        levels, outer = (
            self.stored.read_raw(f"{self.name}.nested_{part}").astype(np.float32) for part in ("quant_map", "absmax")
        )
        return levels[scales] * outer[np.arange(first, last) // self.nested_block] + np.float32(self.mean)


def _four_bits(stored: SafeTensors, name: str, state: str) -> Packed:
    fields = files.parse_json(stored.read_raw(state).tobytes().decode(errors="replace"), state)
    nested = "nested_blocksize" in fields if isinstance(fields, dict) else False
    parts = [f"{name}.{part}" for part in ("absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ()))]
    try:
        shape, block = tuple(map(int, fields["shape"])), int(fields["blocksize"])
        inner, mean = (int(fields["nested_blocksize"]), float(fields["nested_offset"])) if nested else (0, 0.0)
        blocks = -(-math.prod(shape) // block)
        sizes = [(blocks,), (16,), *(((-(-blocks // inner),), (256,)) if nested else ())]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise InputError(f"{state} does not say the shape and the blocks of {name}") from None
    for part, size in zip(parts, sizes, strict=True):
        check_part(stored, part, size, ["U8"] if nested and part.endswith(".absmax") else FLOATS)
    held, size = _bytes(stored, name), -(-math.prod(shape) // 2)
    if held != size:
        raise InputError(f"{state} asks for {size} bytes in {name}, which has {held}")
    found = _FourBits(stored, name, shape, block, inner, mean)
    return Packed(shape, (name, state, *parts), found.read)


def _bytes(stored: SafeTensors, name: str) -> int:
    """How many bytes a stored tensor has, which may be stored as other numbers."""
    shape = stored.shapes.get(name)
    return 0 if shape is None else math.prod(shape) * stored.read_raw(name, slice(0, 1)).itemsize

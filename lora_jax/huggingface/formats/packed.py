"""What the formats of quantised checkpoints share: a dense tensor that several stored ones stand for."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.huggingface.checkpoint_files import SafeTensors


@dataclasses.dataclass(frozen=True)
class Packed:
    """A dense tensor as it is stored.

    Args:
      shape: the dense tensor's.
      parts: the names of the stored tensors, which nothing else needs.
      read: `read(first, last)`: those rows of the dense tensor, in float32.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    read: Callable[[int, int], np.ndarray]


Find = Callable[[SafeTensors, Mapping[str, Any]], dict[str, Packed]]


def check_fields(config: Mapping[str, Any], only: Mapping[str, Collection[Any]], known: Collection[str]) -> None:
    """Raise an InputError unless the fields of a `quantization_config` are ones that can be read.

    Args:
      config: the fields.
      only: the values that a field may have; one that is missing has the usual one.
      known: fields that are honoured elsewhere, or of no account to what the stored numbers mean.

    >>> check_fields({"quant_method": "awq", "bits": 3}, {"bits": [4]}, ())
    Traceback (most recent call last):
    lora_jax.core.errors.InputError: its bits is 3; 4 can be read
    """
    for name, value in config.items():
        if name in only and value not in only[name]:
            raise InputError(f"its {name} is {value!r}; {', '.join(map(repr, only[name]))} can be read")
        if name not in only and name not in known and name != "quant_method":
            raise InputError(f"it has the field {name}, of which is not known what it changes: convert the checkpoint")


def whole_number(config: Mapping[str, Any], name: str, default: int) -> int:
    """A positive whole number, or -1, from the fields of a `quantization_config`."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise InputError(f"its {name} must be a positive whole number or -1, not {value!r}")
    return value


FLOATS = ("F32", "F16", "BF16")


def check_part(stored: SafeTensors, name: str, shape: tuple[int, ...], dtypes: Collection[str]) -> None:
    """Raise an InputError unless a stored tensor is there, of this shape and one of these dtypes."""
    found = stored.shapes.get(name)
    if found != shape or stored.dtype(name) not in dtypes:
        what = "is missing" if found is None else f"is of the shape {found} and {stored.dtype(name)}"
        raise InputError(f"{name} must be of the shape {shape} and {' or '.join(dtypes)}, but {what}")


def matrix_shape(stored: SafeTensors, name: str) -> tuple[int, int]:
    """The shape of a stored tensor of two axes."""
    shape = stored.shapes[name]
    if len(shape) != 2:
        raise InputError(f"{name} has the shape {shape}, where two axes are needed")
    return shape[0], shape[1]


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned integers of so many bits that lie one after the other in words of 32, the lowest bits first.

    >>> unpack(np.array([[0x87654321]], np.uint32), 4)
    array([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=uint8)
    """
    found = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    parts = found.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits, bits)
    return functools.reduce(lambda value, i: value | parts[..., i] << i, range(1, bits), parts[..., 0])

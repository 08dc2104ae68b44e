"""`awq`: unsigned integers of four bits, packed into words along the outputs; a group of inputs shares scale and zero.

`M.qweight` are words of `(in, out / 8)`, `M.qzeros` of `(groups, out / 8)` and `M.scales` are `(groups, out)`. A word holds the
values of eight outputs in another order, the even ones first.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.huggingface.checkpoint_files import SafeTensors
from lora_jax.huggingface.formats.packed import FLOATS, Packed, check_fields, check_part, matrix_shape, unpack, whole_number

_ONLY = {"bits": [4], "version": ["gemm", "GEMM"], "format": ["gemm"], "zero_point": [True]}
# How the numbers were found, what computes with them, and which modules the file itself has packed.
_KNOWN = ("group_size", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config")
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of each output in its word


def find(stored: SafeTensors, config: Mapping[str, Any]) -> dict[str, Packed]:
    """The dense tensors of a checkpoint."""
    check_fields(config, _ONLY, _KNOWN)
    group = whole_number(config, "group_size", 128)
    modules = [name.removesuffix("qweight") for name in stored.shapes if name.endswith(".qweight")]
    return {f"{module}weight": _packed(stored, module, group) for module in modules}


def _packed(stored: SafeTensors, module: str, group: int) -> Packed:
    inputs, words = matrix_shape(stored, f"{module}qweight")
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    parts = tuple(f"{module}{part}" for part in ("qweight", "qzeros", "scales"))
    shapes = ((inputs, words), (groups, words), (groups, words * 8))
    for part, shape, dtypes in zip(parts, shapes, (["I32"], ["I32"], FLOATS)):
        check_part(stored, part, shape, dtypes)
    return Packed((words * 8, inputs), parts, functools.partial(_read, stored, module, size))


def _read(stored: SafeTensors, module: str, size: int, first: int, last: int) -> np.ndarray:
    words, own = slice(first // 8, -(-last // 8)), slice(first % 8, first % 8 + last - first)
    codes, zeros = (_ordered(stored.read_raw(module + part, slice(None), words))[:, own] for part in ("qweight", "qzeros"))
    scales = stored.read_raw(f"{module}scales", slice(None), slice(first, last)).astype(np.float32)
    groups = np.arange(len(codes)) // size
    return ((codes.astype(np.float32) - zeros[groups]) * scales[groups]).T


def _ordered(words: np.ndarray) -> np.ndarray:
    """The values of words in the order of the outputs."""
    values = unpack(words, 4).reshape(len(words), -1, 8)
    return values[..., _PLACES].reshape(len(words), -1)

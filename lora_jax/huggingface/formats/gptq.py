"""`gptq`: unsigned integers of 2, 3, 4 or 8 bits, packed into words along the inputs; a group of inputs shares scale and zero.

`M.qweight` are words of `(in * bits / 32, out)`, `M.qzeros` of `(groups, out * bits / 32)` hold each zero less one (in the
format `gptq_v2` as it is), `M.scales` are `(groups, out)`, and `M.g_idx` says the group of each input.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.huggingface.checkpoint_files import SafeTensors
from lora_jax.huggingface.formats.packed import FLOATS, Packed, check_fields, check_part, matrix_shape, unpack, whole_number

_BITS = (2, 3, 4, 8)
_FORMATS = {"gptq": 1, "gptq_v2": 0}  # what is to be added to a zero
_ONLY = {
    "bits": _BITS,
    "checkpoint_format": [*_FORMATS, None],
    "format": list(_FORMATS),
    "is_marlin_format": [False],
    "pack_dtype": ["int32"],
    "dynamic": [None, {}],
    "rotation": [None],
    "adapter": [None],
}
_DTYPES = {"qweight": ["I32"], "qzeros": ["I32"], "scales": FLOATS, "g_idx": ["I32", "I64"]}
# How the numbers were found, and what computes with them.
_KNOWN = (
    "group_size", "desc_act", "sym", "true_sequential", "static_groups", "damp_percent", "damp_auto_increment", "lm_head",
    "model_name_or_path", "model_file_base_name", "quantizer", "meta", "tokenizer", "dataset", "batch_size", "backend",
    "exllama_config", "use_exllama", "disable_exllama", "max_input_length", "use_cuda_fp16", "model_seqlen", "pad_token_id",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "cache_block_outputs",
    "act_group_aware", "mse",
)  # fmt: skip


def find(stored: SafeTensors, config: Mapping[str, Any]) -> dict[str, Packed]:
    """The dense tensors of a checkpoint."""
    check_fields(config, _ONLY, _KNOWN)
    bits, group = whole_number(config, "bits", 4), whole_number(config, "group_size", 128)
    more = _FORMATS[config.get("checkpoint_format") or config.get("format", "gptq")]
    modules = [name.removesuffix("qweight") for name in stored.shapes if name.endswith(".qweight")]
    found = {f"{module}weight": _Linear(stored, module, bits, group, more) for module in modules}
    return {name: one.packed(bool(config.get("desc_act"))) for name, one in found.items()}


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A layer's kernel.

    Args:
      stored: the files.
      module: the layer's name, with its dot.
      bits: of a value.
      group: how many inputs share a scale where `g_idx` does not say it; -1: all.
      more: what is to be added to a zero.
    """

    stored: SafeTensors
    module: str
    bits: int
    group: int
    more: int

    def packed(self, reordered: bool) -> Packed:
        """The dense tensor; `reordered`: its inputs are in groups that only `g_idx` knows."""
        words, outputs = matrix_shape(self.stored, f"{self.module}qweight")
        groups = self.stored.shapes.get(f"{self.module}scales", (0,))[0]
        inputs = words * 32 // self.bits
        if words * 32 % self.bits:
            raise InputError(f"{self.module}qweight of {words} words is not of values of {self.bits} bits")
        shapes: dict[str, tuple[int, ...]] = {"qweight": (words, outputs), "scales": (groups, outputs)}
        shapes["qzeros"] = (groups, outputs * self.bits // 32)
        if self._has_index:
            shapes["g_idx"] = (inputs,)
        elif reordered or groups != (1 if self.group == -1 else -(-inputs // self.group)):
            raise InputError(f"{self.module}g_idx is missing, and group_size {self.group} does not say the {groups} groups")
        for part, shape in shapes.items():
            check_part(self.stored, f"{self.module}{part}", shape, _DTYPES[part])
        if not set(self._groups(inputs).tolist()) <= set(range(groups)):
            raise InputError(f"{self.module}g_idx has groups that are not among the {groups} of scales")
        return Packed((outputs, inputs), tuple(f"{self.module}{part}" for part in shapes), self._read)

    @property
    def _has_index(self) -> bool:
        return f"{self.module}g_idx" in self.stored.shapes

    def _raw(self, part: str, *index: slice) -> np.ndarray:
        return self.stored.read_raw(f"{self.module}{part}", *index)

    def _read(self, first: int, last: int) -> np.ndarray:
        columns = (slice(None), slice(first, last))
        values = unpack(self._raw("qweight", *columns).T, self.bits)
        zeros = unpack(self._raw("qzeros"), self.bits)[columns] + np.uint8(self.more) & np.uint8(2**self.bits - 1)
        scales, groups = self._raw("scales", *columns).astype(np.float32), self._groups(values.shape[1])
        return (values.astype(np.float32) - zeros[groups].T.astype(np.float32)) * scales[groups].T

    def _groups(self, inputs: int) -> np.ndarray:
        """The group of each input."""
        if self._has_index:
            return self._raw("g_idx")
        return np.zeros(inputs, np.int32) if self.group == -1 else np.arange(inputs) // self.group

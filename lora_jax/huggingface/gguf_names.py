"""What llama.cpp calls and does to the tensors of Hugging Face models, architecture by architecture."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_BOTH = {**_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")
EXPERTS = "_exps."  # in the names of tensors of all experts
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How an architecture's tensors stand in a file.

    Args:
      modules: the Hugging Face names of its modules where they are not Llama's.
      experts: those of one expert, for kernels that the file has of all experts in one; `{}` is its number.
      interleaved: whether the two halves of a rotated pair of rows of queries and keys stand side by side.
      offset: whether 1 has been added to the norms' scales.
    """

    modules: Mapping[str, str] = dataclasses.field(default_factory=dict)
    experts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    offset: bool = False

    def names(self, stored: str, shape: tuple[int, ...]) -> list[str]:
        """The Hugging Face name of a tensor, or of each expert's part of it; one that has none keeps its own.

        >>> of("llama").names("blk.3.attn_q.weight", (4, 4)), of("llama").names("rope_freqs.weight", (4,))
        (['model.layers.3.self_attn.q_proj.weight'], ['rope_freqs.weight'])
        >>> of("qwen3moe").names("blk.0.ffn_up_exps.weight", (2, 4, 4))[1]
        'model.layers.0.mlp.experts.1.up_proj.weight'
        """
        match = _TENSOR.fullmatch(stored)
        modules = _LLAMA | dict(self.modules) | (dict(self.experts) if len(shape) == 3 else {})
        if match is None or match[2] not in modules:
            return [stored]
        prefix = "" if match[1] is None else f"model.layers.{match[1]}."
        count = shape[0] if match[2] in self.experts else 1
        return [f"{prefix}{modules[match[2]].format(i)}.{match[3]}" for i in range(count)]

    def stored(self, name: str) -> str | None:
        """The inverse of `names`: what a file calls the tensor, or that of all experts; `None` if it has none.

        >>> of("llama").stored("model.layers.3.self_attn.q_proj.weight")
        'blk.3.attn_q.weight'
        >>> of("qwen3moe").stored("model.layers.0.mlp.experts.1.up_proj.weight")
        'blk.0.ffn_up_exps.weight'
        """
        match = _NAME.fullmatch(name.replace("model.language_model.", "model."))
        if match is None:
            return None
        kinds = {module: kind for kind, module in (_LLAMA | dict(self.modules) | dict(self.experts)).items()}
        kind = kinds.get(_EXPERT.sub("{}", match[2]))
        prefix = "" if match[1] is None else f"blk.{match[1]}."
        return None if kind is None else f"{prefix}{kind}.{match[3]}"

    def interleaves(self, stored: str) -> bool:
        """Whether a tensor's rows stand in another order in the file, the one of `interleaved`."""
        match = _TENSOR.fullmatch(stored)
        return self.interleaved and match is not None and match[2] in ("attn_q", "attn_k")


def interleaved(rows: int, heads: int) -> np.ndarray:
    """Where each row of queries or keys stands in a file that has the two halves of a rotated pair side by side.

    >>> interleaved(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(rows)


def of(architecture: Any, experts: bool = False) -> Layout:
    """The layout of `general.architecture`; what is known of none is as in Llama, which a reader of the sizes refuses.

    Args:
      architecture: its name in a file.
      experts: whether there are experts, which alone tell a Mixtral from a Llama.
    """
    return _MIXTRAL if architecture == "llama" and experts else _LAYOUTS.get(str(architecture), Layout())


_MIXTRAL = Layout(
    modules={"ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    interleaved=True,
)
_LAYOUTS = {
    "llama": Layout(interleaved=True),
    "granite": Layout(interleaved=True),
    "smollm3": Layout(interleaved=True),
    "qwen3moe": Layout(
        modules={"ffn_gate_inp": "mlp.gate"},
        experts={f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "down", "up")},
    ),
    "gemma": Layout(offset=True),
    "gemma2": Layout(modules=_BOTH, offset=True),
    "gemma3": Layout(modules=_BOTH, offset=True),
    "olmo2": Layout(modules=_AFTER),
    "phi3": Layout(modules={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
    "starcoder2": Layout(modules={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}),
}

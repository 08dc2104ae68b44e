"""Tiny models of tests/data as GGUF files, by the rules of llama.cpp's converter."""

import json
import pathlib
import re

import gguf
import numpy as np
from safetensors.numpy import load_file

from lora_jax.models import llama

DATA = pathlib.Path(__file__).parents[1] / "data" / "llama"
BASE = DATA.parent / "peft" / "llama" / "base"
THEIRS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def permute(tensor, heads):
    """llama.cpp's order of the rows of queries and keys: row i and row i + half of a head side by side."""
    half = tensor.shape[0] // heads // 2
    rows = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]
    return tensor[rows]


def gguf_name(name, modules=()):
    name = re.sub(r"\.\w+\.experts\.\d+", "", name.removeprefix("model."))
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("layers."):
        _, i, module = module.split(".", 2)
        layer = f"blk.{i}."
    return f"{layer}{(THEIRS | dict(modules))[module]}.{kind}"


# What llama.cpp's converters write of a config.json, by its package's methods, and what they call the modules.
SIZES = {
    "add_context_length": "max_position_embeddings", "add_embedding_length": "hidden_size", "add_block_count": "num_hidden_layers",
    "add_feed_forward_length": "intermediate_size", "add_head_count": "num_attention_heads",
    "add_head_count_kv": "num_key_value_heads", "add_layer_norm_rms_eps": "rms_norm_eps",
}  # fmt: skip
HEADS = {"add_key_length": "head_dim", "add_value_length": "head_dim"}
NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
AROUND = {**NORMS, "pre_feedforward_layernorm": "ffn_norm"}
EXPERTS = {"add_expert_count": "num_local_experts", "add_expert_used_count": "num_experts_per_tok"}
MULTIPLIERS = {
    "add_attention_scale": "attention_multiplier", "add_embedding_scale": "embedding_multiplier",
    "add_residual_scale": "residual_multiplier", "add_logit_scale": "logits_scaling",
}  # fmt: skip
CAPS = {"add_attn_logit_softcapping": "attn_logit_softcapping", "add_final_logit_softcapping": "final_logit_softcapping"}
WINDOW = {"add_sliding_window": "sliding_window"}
# by case of tests/data/families: the architecture, the metadata beside SIZES, the modules beside THEIRS
CONVERTED = {
    "qwen3": ("qwen3", HEADS, {}),
    "qwen3_moe": (
        "qwen3moe",
        {**HEADS, **EXPERTS, "add_expert_feed_forward_length": "moe_intermediate_size"},
        {"mlp.gate": "ffn_gate_inp", "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"},
    ),
    "mixtral": (
        "llama", EXPERTS,
        {"block_sparse_moe.gate": "ffn_gate_inp", "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"},
    ),
    "gemma": ("gemma", HEADS, {}),
    "gemma2": ("gemma2", {**HEADS, **CAPS, **WINDOW}, AROUND),
    "gemma3": ("gemma3", {**HEADS, **WINDOW}, AROUND),
    "phi3": ("phi3", WINDOW, {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
    "phi3_longrope": ("phi3", WINDOW, {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}),
    "granite": ("granite", MULTIPLIERS, {}),
    "olmo2": ("olmo2", {}, NORMS),
    "olmo3": ("olmo2", WINDOW, NORMS),
    "smollm3": ("smollm3", {}, {}),
    "starcoder2": ("starcoder2", {}, {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
    "llama_yarn": ("llama", {}, {}),
}  # fmt: skip


def write_family(file, case, tensors=(), **metadata):
    """A tiny model of `tests/data/families` as llama.cpp's converter writes it, with more metadata and tensors."""
    kind, more, modules = CONVERTED[case]
    directory = DATA.parent / "families" / case / "base"
    fields = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(file, kind)
    known = {method: fields[name] for method, name in {**SIZES, **more}.items() if fields.get(name) is not None}
    known |= {"add_layer_norm_eps": fields["norm_epsilon"]} if "norm_epsilon" in fields else {}
    rope = fields["rope_parameters"]
    known["add_rope_freq_base"] = rope.get("full_attention", rope)["rope_theta"]
    for method, value in {**known, **metadata}.items():
        getattr(writer, method)(value)
    stacks = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if kind in ("llama", "granite", "smollm3") and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = permute(tensor, fields["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        stacks.setdefault(gguf_name(name, modules), []).append(tensor)
    for name, parts in [*stacks.items(), *((name, [tensor]) for name, tensor in dict(tensors).items())]:
        writer.add_tensor(name, np.stack(parts) if "_exps." in name else parts[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write(file, name, quantise=None, tokens=None, extra=None, architecture=None, **metadata):
    """A tiny model of tests/data as a GGUF file, by the package that llama.cpp's converter uses."""
    directory = BASE if name == "base" else DATA / name
    config = llama.load(directory).config
    kind = "qwen2" if name == "qwen2" else "llama"
    writer = gguf.GGUFWriter(file, architecture or kind)
    sizes = {
        "add_context_length": config.max_position_embeddings,
        "add_embedding_length": config.hidden_size,
        "add_block_count": config.num_hidden_layers,
        "add_feed_forward_length": config.intermediate_size,
        "add_head_count": config.num_attention_heads,
        "add_head_count_kv": config.num_key_value_heads,
        "add_key_length": config.head_dim,
        "add_value_length": config.head_dim,
        "add_rope_dimension_count": config.head_dim,
        "add_rope_freq_base": config.rope_theta,
        "add_layer_norm_rms_eps": config.rms_norm_eps,
    }
    for method, value in {**sizes, **metadata}.items():
        getattr(writer, method)(value)
    if tokens:
        write_tokenizer(writer, "smollm" if tokens is True else tokens)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    for hf, tensor in load_file(directory / "model.safetensors").items():
        tensor = tensor.astype(np.float32)
        if kind == "llama" and ".q_proj." in hf:
            tensor = permute(tensor, config.num_attention_heads)
        if kind == "llama" and ".k_proj." in hf:
            tensor = permute(tensor, config.num_key_value_heads)
        if quantise is not None and tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(gguf_name(hf), gguf.quants.quantize(tensor, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(gguf_name(hf), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


ALPHABET = ["<|end|>", "<|user|>", *"abcdehlorw", "Ġ", "Ċ", "1", "2", "he", "ll", "hell", "hello", "<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o"]


def write_tokenizer(writer, split):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(ALPHABET)
    writer.add_token_types([4 if word == "<tool>" else 3 if word.startswith("<|") else 1 for word in ALPHABET])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)

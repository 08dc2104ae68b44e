"""A tiny model of tests/data as a GGUF file."""

import pathlib

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
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def permute(tensor, heads):
    """llama.cpp's order of the rows of queries and keys: row i and row i + half of a head side by side."""
    half = tensor.shape[0] // heads // 2
    rows = [head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]
    return tensor[rows]


def gguf_name(name):
    name = name.removeprefix("model.")
    module, _, kind = name.rpartition(".")
    layer = ""
    if module.startswith("layers."):
        _, i, module = module.split(".", 2)
        layer = f"blk.{i}."
    return f"{layer}{THEIRS[module]}.{kind}"


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

"""MaxText 0.2.5 with jax 0.12 (Python 3.12)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import maxtext
import numpy as np
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.layers import nnx_decoders
from maxtext.utils import model_creation_utils

import lora_jax as lj

BASE = str(pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml")
OPTIONS = "run_name=x enable_checkpointing=False override_model_config=True skip_jax_distributed_system=True "
OPTIONS += "base_emb_dim=32 base_num_query_heads=4 base_num_kv_heads=2 base_mlp_dim=48 head_dim=8 vocab_size=64 "
OPTIONS += "max_target_length=9 per_device_batch_size=2 dtype=float32 weight_dtype=float32 attention=dot_product"

# MaxText rounds the weights of a tied head to bfloat16, whatever its dtypes.
nnx_decoders.attend_on_embedding = lambda query, table, *_: query @ table.T


def decoder(name, layers, *options):
    sizes = [f"model_name={name}", f"base_num_decoder_layers={layers}"]
    config = pyconfig.initialize(["", BASE, *OPTIONS.split(), *sizes, *options])
    fn, params = lj.nnx.functional(model_creation_utils.from_config(config, rngs=nnx.Rngs(0)))

    def apply(params, ids):
        return fn(params, ids, jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), enable_dropout=False)

    return apply, jax.eval_shape(lambda: params)


def qwen(name, tied, scan):
    kw = ["normalization_layer_epsilon=1e-5", "rope_max_timescale=1000000", f"scan_layers={scan}"]
    return decoder(name, 3, *kw, f"logits_via_embedding={tied}")


def llama(name, scan):
    kw = ["normalization_layer_epsilon=1e-5", "rope_max_timescale=1000000", "rope_use_scale=False"]
    apply, shapes = decoder(name, 3, *kw, f"scan_layers={scan}")
    return apply, shapes, functools.partial(otherwise, interleave=name.startswith("llama3.1"), query=8**-0.5)


def gemma3(scan):
    kw = ["sliding_window_size=4", "rope_linear_scaling_factor=1.0", f"scan_layers={scan}"]
    apply, shapes = decoder("gemma3-4b", 8, *kw)
    return apply, shapes, functools.partial(otherwise, gemma=True, numbers=gemma3_numbers)


def gemma2(scan):
    apply, shapes = decoder("gemma2-2b", 2, "sliding_window_size=4", f"scan_layers={scan}")
    return apply, shapes, functools.partial(otherwise, gemma=True, query=8**-0.5, numbers=gemma2_numbers)


def all_layers(path, count):
    words = path.split("/")
    return list(range(count)) if words[1] == "layers" else [int(words[1].removeprefix("layers_"))]


def gemma3_numbers(path, count):
    _, first, second, *_ = path.split("/")
    if first == "layers":
        return list(range(int(second[-1]), count - count % 6, 6))
    return [count - count % 6 + int(second[-1])] if first == "layers_remainder" else [int(first[-1])]


def gemma2_numbers(path, count):
    _, first, module, *_ = path.split("/")
    start = 0 if "local" in module else 1
    return list(range(start, count, 2)) if first == "layers" else [2 * int(first[-1]) + start]


NORMS = {"pre_self_attention_norm": "input", "post_self_attention_norm": "post_attention"}
NORMS |= {"pre_ffw_norm": "pre_feedforward", "post_ffw_norm": "post_feedforward"}


def otherwise(path, shape, tensors, *, interleave=False, gemma=False, query=1.0, numbers=all_layers):
    """What MaxText keeps otherwise than Hugging Face, and has no name in the tables, from the checkpoint."""
    if path == "token_embedder/embedding":
        return tensors["model.embed_tokens.weight"] * 32**0.5
    if path == "decoder/decoder_norm/scale":
        return tensors["model.norm.weight"] + 1
    count = 1 + max(int(name.split(".")[2]) for name in tensors if ".layers." in name)
    *_, module, _ = path.replace("_local", "").replace("_global", "").split("/")
    parts = []
    for i in numbers(path, count):
        if module.endswith("norm"):
            there = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}.get(module)
            parts.append(tensors[f"model.layers.{i}.{there or NORMS[module] + '_layernorm'}.weight"] + 1)
        else:
            part = tensors[f"model.layers.{i}.self_attn.{module[0]}_proj.weight"].reshape(-1, 8, 32).transpose(2, 0, 1)
            if interleave:
                part = part.reshape(*part.shape[:2], 2, 4).swapaxes(-1, -2).reshape(part.shape)
            parts.append(part * query if module == "query" else part)
    return np.stack(parts, 1) if len(shape) > parts[0].ndim else parts[0]


MODELS = {
    "llama3": ("llama", "MAXTEXT_LLAMA", lambda: llama("llama3-8b", True)),
    "llama3_apart": ("llama", "MAXTEXT_LLAMA", lambda: llama("llama3-8b", False)),
    "llama3.1": ("llama", "MAXTEXT_LLAMA", lambda: llama("llama3.1-8b", True)),
    "qwen2": ("qwen2", "MAXTEXT_QWEN", lambda: qwen("qwen2.5-7b", False, True)),
    "qwen3": ("qwen3", "MAXTEXT_QWEN", lambda: qwen("qwen3-0.6b", False, True)),
    "qwen3_tied": ("qwen3_tied", "MAXTEXT_QWEN_TIED", lambda: qwen("qwen3-0.6b", True, True)),
    "qwen3_apart": ("qwen3", "MAXTEXT_QWEN", lambda: qwen("qwen3-0.6b", False, False)),
    "gemma2": ("gemma2", "maxtext_gemma2(4)", lambda: gemma2(True)),
    "gemma2_apart": ("gemma2", "maxtext_gemma2(4)", lambda: gemma2(False)),
    "gemma3": ("gemma3_8_layers", "maxtext_gemma3(8)", lambda: gemma3(True)),
    "gemma3_apart": ("gemma3_8_layers", "maxtext_gemma3(8)", lambda: gemma3(False)),
}

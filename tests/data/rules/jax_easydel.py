"""EasyDeL 0.3.0 with jax 0.10.2, flax 0.12.7 and torch, which it imports (Python 3.11)."""

# ruff: noqa: E402

import jax

jax.devices()  # before EasyDeL writes flags into XLA_FLAGS that this jaxlib doesn't know

import easydel
import jax.numpy as jnp
import numpy as np
from easydel.infra import base_config
from flax import nnx
from torch_models import GEMMA2, GLOBAL, LOCAL, SIZES

import lora_jax as lj


class _Float32:
    """jax.numpy where bfloat16 is float32: EasyDeL rounds the rotation's sines and cosines to bfloat16, whatever its dtypes."""

    def __getattr__(self, name):
        return jnp.float32 if name == "bfloat16" else getattr(jnp, name)


base_config.jnp = _Float32()
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
ROPE = {"rope_theta": 1e6, "rms_norm_eps": 1e-5}
GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 8, "sliding_window": 64}


def decoder(name, config="Config", **kw):
    exact = {"attn_mechanism": "vanilla", "attn_dtype": jnp.float32}  # by default attention is in bfloat16
    config = getattr(easydel, f"{name}{config}")(**{**SIZES, **HEADS, **exact, **kw})
    kind = getattr(easydel, f"{name}ForCausalLM")
    model = kind(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    fn, params = lj.nnx.functional(model)

    def apply(params, ids):
        with model.mesh:
            return fn(params, input_ids=jnp.asarray(ids)).logits

    return apply, jax.eval_shape(lambda: params), lambda path, shape, tensors: np.zeros(shape)


def gemma2():
    window = {"sliding_window": 64, "query_pre_attn_scalar": 8, "layer_types": list(GEMMA2["types"])}
    return decoder("Gemma2", num_hidden_layers=4, **window)


def gemma3():
    return decoder("Gemma3", "TextConfig", layer_types=[LOCAL, LOCAL, GLOBAL], **GEMMA3)


MODELS = {
    "llama": ("llama", "EASYDEL", lambda: decoder("Llama", **ROPE)),
    "llama_tied": ("llama_tied", "EASYDEL_TIED", lambda: decoder("Llama", tie_word_embeddings=True, **ROPE)),
    "qwen2": ("qwen2", "EASYDEL", lambda: decoder("Qwen2", **ROPE)),
    "qwen3": ("qwen3", "EASYDEL", lambda: decoder("Qwen3", **ROPE)),
    "qwen3_tied": ("qwen3_tied", "EASYDEL_TIED", lambda: decoder("Qwen3", tie_word_embeddings=True, **ROPE)),
    "gemma": ("gemma", "EASYDEL_TIED", lambda: decoder("Gemma", tie_word_embeddings=True)),
    # In a window its vanilla attention sees otherwise than transformers', and it leaves out the cap on scores.
    "gemma2": ("gemma2_wide", "EASYDEL_TIED", gemma2),
    "gemma3": ("gemma3_wide", "EASYDEL_TIED", gemma3),
}

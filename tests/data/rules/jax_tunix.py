"""google-tunix 0.1.7 with jax 0.12 (Python 3.12)."""

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

import lora_jax as lj

SIZES = {"num_layers": 3, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
CAPS = {"final_logit_softcap": 30.0, "attn_logits_soft_cap": 50.0, "sliding_window_size": 4}


def functional(model):
    fn, params = lj.nnx.functional(model)

    def apply(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)), (*ids.shape, ids.shape[1]))
        return fn(params, ids, positions, None, mask)[0]

    return apply, jax.eval_shape(lambda: params)


def decoder(module, model, **kw):
    sizes = {**SIZES, "vocab_size": 64, "norm_eps": 1e-5, "rope_theta": 1_000_000, **kw}
    return functional(getattr(module, model)(module.ModelConfig(**sizes), rngs=nnx.Rngs(0)))


def gemma1(**kw):
    kw = {"final_logit_softcap": None, "use_post_attn_norm": False, "use_post_ffw_norm": False, **kw}
    config = gemma.ModelConfig(**{**SIZES, **kw}, num_embed=64, attention_types=(gemma.AttentionType.GLOBAL,) * 3)
    return functional(gemma.Gemma(config, rngs=nnx.Rngs(0)))


def gemma2():
    types = (gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL) * 2
    kw = {**CAPS, "use_post_attn_norm": True, "use_post_ffw_norm": True, "attention_types": types, "num_layers": 4}
    return functional(gemma.Gemma(gemma.ModelConfig(**{**SIZES, **kw}, num_embed=64), rngs=nnx.Rngs(0)))


def gemma3_text():
    sizes = {**SIZES, "num_layers": 8, "num_embed": 64}
    config = gemma3.ModelConfig(**sizes, sliding_window_size=4, global_base_frequency=1_000_000, param_dtype=jnp.float32)
    return functional(gemma3.Gemma3(config, rngs=nnx.Rngs(0)))


MODELS = {
    "llama3": ("llama", "TUNIX_LLAMA3", lambda: decoder(llama3, "Llama3")),
    "llama3_tied": ("llama_tied", "TUNIX_LLAMA3_TIED", lambda: decoder(llama3, "Llama3", weight_tying=True)),
    "qwen2": ("qwen2", "TUNIX_QWEN2", lambda: decoder(qwen2, "Qwen2")),
    "qwen2_tied": ("qwen2_tied", "TUNIX_QWEN2_TIED", lambda: decoder(qwen2, "Qwen2", use_tied_embedding=True)),
    "qwen3": ("qwen3", "TUNIX_QWEN3", lambda: decoder(qwen3, "Qwen3")),
    "qwen3_tied": ("qwen3_tied", "TUNIX_QWEN3_TIED", lambda: decoder(qwen3, "Qwen3", use_tied_embedding=True)),
    "qwen3_experts": (
        "qwen3_experts",
        "TUNIX_QWEN3",
        lambda: decoder(qwen3, "Qwen3", num_experts=4, num_experts_per_tok=2),
    ),
    "gemma": ("gemma", "TUNIX_GEMMA", gemma1),
    "gemma_joined": ("gemma_fused", "TUNIX_GEMMA", lambda: gemma1(num_kv_heads=4)),
    "gemma2": ("gemma2", "TUNIX_GEMMA2", gemma2),
    "gemma3": ("gemma3_8_layers", "TUNIX_GEMMA3", gemma3_text),
}

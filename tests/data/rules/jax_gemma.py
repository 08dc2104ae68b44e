"""gemma 4.0.1 with jax 0.12 (Python 3.12)."""

import dataclasses

import jax
import jax.numpy as jnp
from gemma.gm.nn import _gemma, _modules, _transformer

LOCAL, GLOBAL = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
SIZES = {"num_embed": 64, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}


def decoder(name, types):
    """A small one of the class of that name."""
    config = getattr(_gemma, name).config
    config = dataclasses.replace(config, **SIZES, attention_types=types, sliding_window_size=4, vision_encoder=None)
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, 9), jnp.int32)))
    return lambda params, ids: model.apply(params, ids).logits, shapes


MODELS = {
    "gemma2_2b": ("gemma2", "GEMMA2_2B", lambda: decoder("Gemma2_2B", (LOCAL, GLOBAL) * 2)),
    "gemma2": ("gemma2", "GEMMA2", lambda: decoder("Gemma2_9B", (LOCAL, GLOBAL) * 2)),
    "gemma3": ("gemma3", "GEMMA3", lambda: decoder("Gemma3_270M", (LOCAL, LOCAL, GLOBAL))),
}

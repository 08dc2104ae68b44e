"""gemma 4.0.1: the text models of gm.nn, as Gemma...ForCausalLM names them. Both sides add one to a norm's scale.

The encoders of images and sound, and what joins them to the text, have no names here, so an adapter on them can't be written by
these tables.
"""

from lora_jax.huggingface.names import HFName
from lora_jax.peft.rules.building import Entries, Rules, embedding, nowhere, table, vector

NORMS = {"pre_attention": "input", "post_attention": "post_attention"}
NORMS |= {"pre_ffw": "pre_feedforward", "post_ffw": "post_feedforward"}


def attention(layer: str, name: str) -> Entries:
    """The projections, apart or joined."""
    rules = {f"{layer}/attn/q_einsum/w": HFName(f"{name}.self_attn.q_proj.weight", "n d h -> (n h) d")}
    for joined, words in {"kv": "k|v", "qkv": "q|k|v"}.items():
        tensors = f"{name}.self_attn.{{c:{words}}}_proj.weight"
        rules[f"{layer}/attn/{joined}_einsum/w"] = HFName(tensors, "c n d h -> (n h) d")
    rules[f"{layer}/attn/attn_vec_einsum/w"] = HFName(f"{name}.self_attn.o_proj.weight", "n h d -> d (n h)")
    return rules


def norms(layer: str, name: str, places: dict[str, str]) -> Entries:
    return {
        path: entry
        for norm, there in places.items()
        for path, entry in vector(f"{layer}/{norm}_norm/scale", f"{name}.{there}_layernorm.weight").items()
    }


def ends(name: str = "model") -> Entries:
    """The embedding, which is also the head, and the last norm."""
    rules = embedding("embedder/input_embedding", f"{name}.embed_tokens.weight", "lm_head.weight")
    return rules | vector("final_norm/scale", f"{name}.norm.weight")


def _decoder(gating: str = "c f d -> f d") -> Entries:
    layer, name = "layer_#", "model.layers.#"
    rules = ends() | attention(layer, name) | norms(layer, name, NORMS)
    rules[f"{layer}/mlp/gating_einsum"] = HFName(f"{name}.mlp.{{c:gate|up}}_proj.weight", gating)
    rules[f"{layer}/mlp/linear"] = HFName(f"{name}.mlp.down_proj.weight", "f d -> d f")
    for norm, there in {"query": "q", "key": "k"}.items():
        rules |= vector(f"{layer}/attn/_{norm}_norm/scale", f"{name}.self_attn.{there}_norm.weight")
    return rules


OF_IMAGES = nowhere("vision_encoder/.*", "embedder/mm_.*")

# gm.nn.Gemma2_9B and 27B, and Gemma2_2B, whose `gating_einsum` lies the other way.
GEMMA2: Rules = table(_decoder())
GEMMA2_2B: Rules = table(_decoder("c d f -> f d"))

# gm.nn.Gemma3_*.
GEMMA3: Rules = {**table(_decoder()), **OF_IMAGES}

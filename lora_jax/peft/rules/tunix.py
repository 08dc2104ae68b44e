"""google-tunix 0.1.7 (paths of `lj.nnx.functional`). TIED: where the head is the embedding, which a Gemma's always is."""

from lora_jax.huggingface.names import HFName
from lora_jax.peft.rules import gemma
from lora_jax.peft.rules.building import Entries, Rules, dense, embedding, table, vector

_NAME = "model.layers.#"


def _mlp() -> Entries:
    rules: Entries = {}
    for x in ("gate", "up", "down"):
        rules |= dense(f"layers/#/mlp/{x}_proj", f"{_NAME}.mlp.{x}_proj")
    return rules


def _llama(tied: str = "") -> Entries:
    attn = "layers/#/attn"
    rules = embedding("embedder/input_embedding", "model.embed_tokens.weight", tied) | _mlp()
    rules |= vector("final_norm/w", "model.norm.weight")
    for x in "qkv":
        rules[f"{attn}/{x}_proj/w"] = HFName(f"{_NAME}.self_attn.{x}_proj.weight", "d n h -> (n h) d")
    rules[f"{attn}/o_proj/w"] = HFName(f"{_NAME}.self_attn.o_proj.weight", "n h d -> d (n h)")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        rules |= vector(f"layers/#/{norm}/w", f"{_NAME}.{norm}.weight")
    return rules if tied else rules | {"lm_head/w": HFName("lm_head.weight", "d v -> v d")}


def _qwen2() -> Entries:
    return {
        path: entry
        for x in "qkv"
        for path, entry in vector(f"layers/#/attn/{x}_bias", f"{_NAME}.self_attn.{x}_proj.bias").items()
    }


def _qwen3() -> Entries:
    """What a Qwen 3 has beside: norms of queries and keys; in the mixture models a router and kernels of (experts, in, out)."""
    rules = dense("layers/#/mlp/router", f"{_NAME}.mlp.gate")
    for x in "qk":
        rules |= vector(f"layers/#/attn/{x}_norm/w", f"{_NAME}.self_attn.{x}_norm.weight")
    for x in ("gate", "up", "down"):
        rules[f"layers/#/mlp/{x}_proj"] = HFName(f"{_NAME}.mlp.experts.{{e}}.{x}_proj.weight", "e i o -> o i")
    return rules


def _gemma(places: dict[str, str]) -> Entries:
    """A Gemma; `places`: its norms in a layer, here and in Hugging Face."""
    rules = gemma.ends() | gemma.attention("layers/#", _NAME) | gemma.norms("layers/#", _NAME, places) | _mlp()
    for norm, there in {"query": "q", "key": "k"}.items():
        rules |= vector(f"layers/#/attn/_{norm}_norm/scale", f"{_NAME}.self_attn.{there}_norm.weight")
    return rules


# tunix.models.llama3, qwen2 and qwen3. TIED: `weight_tying=True`, `use_tied_embedding=True`.
TUNIX_LLAMA3: Rules = table(_llama())
TUNIX_LLAMA3_TIED: Rules = table(_llama("lm_head.weight"))
TUNIX_QWEN2: Rules = table(_llama(), _qwen2())
TUNIX_QWEN2_TIED: Rules = table(_llama("lm_head.weight"), _qwen2())
TUNIX_QWEN3: Rules = table(_llama(), _qwen3())
TUNIX_QWEN3_TIED: Rules = table(_llama("lm_head.weight"), _qwen3())

# tunix.models.gemma: the first Gemma, whose second norm comes before the MLP, and Gemma 2; tunix.models.gemma3, its text model.
TUNIX_GEMMA: Rules = table(_gemma({"pre_attention": "input", "pre_ffw": "post_attention"}))
TUNIX_GEMMA2: Rules = table(_gemma({"post_attn" if norm == "post_attention" else norm: x for norm, x in gemma.NORMS.items()}))
TUNIX_GEMMA3: Rules = {**table(_gemma(gemma.NORMS)), **gemma.OF_IMAGES}

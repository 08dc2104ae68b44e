"""EasyDeL 0.3.0 (paths of `lj.nnx.functional`): Hugging Face's own names, with `kernel` and `embedding` for `weight`.

TIED: where the head is the embedding, as a Gemma's is: `lm_head` is there all the same, and never used.
"""

from lora_jax.huggingface.names import HFName
from lora_jax.peft.rules.building import Entries, Rules, dense, embedding, nowhere, table, vector

_NORMS = ("input", "post_attention", "pre_feedforward", "post_feedforward")


def _decoder(tied: str = "") -> Entries:
    layer = "model/layers/#"
    rules = embedding("model/embed_tokens/embedding", "model.embed_tokens.weight", tied)
    for module in [f"self_attn/{x}_proj" for x in "qkvo"] + [f"mlp/{x}_proj" for x in ("gate", "up", "down")]:
        rules |= dense(f"{layer}/{module}")
    for module in [f"{norm}_layernorm" for norm in _NORMS] + ["self_attn/q_norm", "self_attn/k_norm"]:
        rules |= _norm(f"{layer}/{module}")
    head = {} if tied else {"lm_head/kernel": HFName("lm_head.weight", "d v -> v d")}
    return rules | _norm("model/norm") | head


def _norm(path: str) -> Entries:
    return vector(f"{path}/kernel", f"{path.replace('/', '.')}.weight")


# Llama, Qwen 2 and 3, and Gemma 1 to 3 (its text model).
EASYDEL: Rules = table(_decoder())
EASYDEL_TIED: Rules = table(_decoder("lm_head.weight")) | nowhere("lm_head/kernel")

"""transformers 4.57.6, the last that has Flax models."""

from collections.abc import Mapping

from lora_jax.huggingface.names import HFName
from lora_jax.peft.rules.building import Entries, Rules, dense, embedding, norm, table, vector


def _bert(tied: str = "") -> Entries:
    layer = "encoder/layer/#"
    modules = ["attention/self/query", "attention/self/key", "attention/self/value"]
    modules += ["attention/output/dense", "intermediate/dense", "output/dense"]
    rules = embedding("embeddings/word_embeddings/embedding", "embeddings.word_embeddings.weight", tied)
    for other in ("position_embeddings", "token_type_embeddings"):
        rules |= embedding(f"embeddings/{other}/embedding", f"embeddings.{other}.weight")
    for module in modules:
        rules |= dense(f"{layer}/{module}")
    for module in ("embeddings", f"{layer}/attention/output", f"{layer}/output"):
        rules |= norm(f"{module}/LayerNorm")
    return rules | dense("pooler/dense")


_BERT_HEADS = [
    dense("classifier"),
    dense("qa_outputs"),
    dense("cls/seq_relationship"),
    dense("cls/predictions/transform/dense"),
]
_BERT_HEADS += [norm("cls/predictions/transform/LayerNorm"), vector("cls/predictions/bias", "cls.predictions.bias")]

# transformers 4.57.6, FlaxBert*: FlaxBertModel has no `bert/`; the heads are those of its FlaxBertFor... classes.
FLAX_BERT: Rules = table(_bert(), root="bert") | table(_bert(), *_BERT_HEADS)

# Those that predict words (FlaxBertForMaskedLM, ForPreTraining, ForCausalLM): their decoder is the word embedding.
FLAX_BERT_TIED: Rules = table(_bert("cls.predictions.decoder.weight"), root="bert") | table(*_BERT_HEADS)


def _gpt2(tied: str = "") -> Entries:
    rules = embedding("wte/embedding", "wte.weight", tied) | embedding("wpe/embedding", "wpe.weight")
    for module in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
        rules |= dense(f"h/#/{module}", axes="o i -> i o", kind="conv1d")  # its FlaxConv1D keeps (out, in), torch's (in, out)
    return rules | norm("h/#/ln_1") | norm("h/#/ln_2") | norm("ln_f")


# transformers 4.57.6, FlaxGPT2LMHeadModel (its head is always the embedding) and FlaxGPT2Model (no `transformer/`).
FLAX_GPT2: Rules = table(_gpt2("lm_head.weight"), root="transformer") | table(_gpt2())


def _llama() -> Entries:
    rules = embedding("embed_tokens/embedding", "embed_tokens.weight") | vector("norm/weight", "norm.weight")
    modules = [f"self_attn/{x}_proj" for x in "qkvo"] + [f"mlp/{x}_proj" for x in ("gate", "up", "down")]
    for module in modules:
        rules |= dense(f"layers/#/{module}")
    for module in ("input_layernorm", "post_attention_layernorm"):
        rules |= vector(f"layers/#/{module}/weight", f"layers.#.{module}.weight")
    return rules


# transformers 4.57.6, FlaxLlamaForCausalLM (its head is always a kernel of its own) and FlaxLlamaModel (no `model/`).
FLAX_LLAMA: Rules = table(_llama(), root="model") | table(_llama(), dense("lm_head"))


def _vit(layer: str, modules: Mapping[str, str]) -> Entries:
    """`layer` and `modules`: what a layer, and each dense module in it, is called there."""
    rules = {f"embeddings/{x}": HFName(f"embeddings.{x}") for x in ("cls_token", "position_embeddings")}
    patches = "embeddings/patch_embeddings/projection"
    rules |= dense(patches, axes="h w i o -> o i h w", kind="conv") | norm("layernorm") | dense("pooler/dense")
    for module, name in modules.items():
        rules |= dense(f"encoder/layer/#/{module}", f"{layer}.#.{name}")
    for module in ("layernorm_before", "layernorm_after"):
        rules |= norm(f"encoder/layer/#/{module}", f"{layer}.#.{module}")
    return rules


_VIT = [f"attention/attention/{x}" for x in ("query", "key", "value")]
_VIT += ["attention/output/dense", "intermediate/dense", "output/dense"]
_VIT_4 = _vit("encoder.layer", {module: module.replace("/", ".") for module in _VIT})
_VIT_5 = _vit("layers", dict(zip(_VIT, [f"attention.{x}_proj" for x in "qkvo"] + ["mlp.fc1", "mlp.fc2"])))

# transformers 4.57.6, FlaxViTForImageClassification and FlaxViTModel (no `vit/`), with the names of Hugging Face checkpoints,
# which are also PEFT's as long as transformers is older than 5.
FLAX_VIT: Rules = table(_VIT_4, root="vit") | table(_VIT_4, dense("classifier"))

# The same with the module names of transformers 5.23, which renames a ViT's tensors as it loads them. An adapter for PEFT on it
# needs these names: PEFT passes over the others without a word.
FLAX_VIT_5: Rules = table(_VIT_5, root="vit") | table(_VIT_5, dense("classifier"))

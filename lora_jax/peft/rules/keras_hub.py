r"""keras-hub 0.29.1 on Keras 3.15.1 and JAX: parameters by the paths of a model's variables, as a nested tree.

A model as a function, with `flax.traverse_util`:

    params = unflatten_dict({v.path: v.value for v in model.trainable_variables}, sep="/")
    fixed = [v.value for v in model.non_trainable_variables]

    def fn(params, inputs):
        leaves = flatten_dict(params, sep="/")
        return model.stateless_call([leaves[v.path] for v in model.trainable_variables], fixed, inputs)[0]

TIED: where the head is the embedding (`tie_word_embeddings=True`); a Gemma's always is.
"""

import dataclasses

from lora_jax.huggingface.names import HFName
from lora_jax.peft.rules.building import Entries, Rules, dense, embedding, table, vector

_HEADS = "d n h -> (n h) d"


def _attention(layer: str, name: str, axes: str) -> Entries:
    rules: Entries = {}
    for module, there in {"query": "q_proj", "key": "k_proj", "value": "v_proj"}.items():
        rules[f"{layer}/{module}/kernel"] = HFName(f"{name}.{there}.weight", axes)
    return rules | {f"{layer}/attention_output/kernel": HFName(f"{name}.o_proj.weight", "n h d -> d (n h)")}


def _llama(tied: str = "") -> Entries:
    layer, name = "transformer_layer_#", "model.layers.#"
    rules = embedding("token_embedding/embeddings", "model.embed_tokens.weight", tied)
    rules |= vector("sequence_output_layernorm/scale", "model.norm.weight")
    rules |= _attention(f"{layer}/self_attention", f"{name}.self_attn", _HEADS)
    for module, there in {"gate": "gate", "intermediate": "up", "output": "down"}.items():
        rules |= dense(f"{layer}/feedforward_{module}_dense", f"{name}.mlp.{there}_proj")
    for norm, there in {"self_attention": "input", "feedforward": "post_attention"}.items():
        rules |= vector(f"{layer}/{norm}_layernorm/scale", f"{name}.{there}_layernorm.weight")
    head = {"token_embedding/reverse_embeddings": HFName("lm_head.weight", "d v -> v d")}
    return rules if tied else rules | head


def _qwen3(tied: str = "") -> Entries:
    rules = _llama(tied)
    for norm, there in {"query": "q", "key": "k"}.items():
        path = f"transformer_layer_#/self_attention/{norm}_dense_layernorm/scale"
        rules |= vector(path, f"model.layers.#.self_attn.{there}_norm.weight")
    return rules


def _gemma3() -> Entries:
    layer, name = "decoder_block_#", "model.layers.#"
    rules = embedding("token_embedding/embeddings", "model.embed_tokens.weight", "lm_head.weight")
    rules |= vector("final_normalization/scale", "model.norm.weight")
    rules |= _attention(f"{layer}/attention", f"{name}.self_attn", "n d h -> (n h) d")
    for module, there in {"ffw_gating": "gate", "ffw_gating_2": "up", "ffw_linear": "down"}.items():
        rules |= dense(f"{layer}/{module}", f"{name}.mlp.{there}_proj")
    norms = {"pre_attention_norm": "input", "post_attention_norm": "post_attention"}
    norms |= {"pre_ffw_norm": "pre_feedforward", "post_ffw_norm": "post_feedforward"}
    for norm, there in norms.items():
        rules |= vector(f"{layer}/{norm}/scale", f"{name}.{there}_layernorm.weight")
    for norm, there in {"query": "q", "key": "k"}.items():
        rules |= vector(f"{layer}/attention/{norm}_norm/scale", f"{name}.self_attn.{there}_norm.weight")
    return rules


def _norm(path: str, name: str) -> Entries:
    return vector(f"{path}/gamma", f"{name}.weight") | vector(f"{path}/beta", f"{name}.bias")


def _bert(tied: str = "") -> Entries:
    layer, name = "transformer_layer_#", "encoder.layer.#"
    rules = embedding("token_embedding/embeddings", "embeddings.word_embeddings.weight", tied)
    for module, there in {"position": "position", "segment": "token_type"}.items():
        rules |= embedding(f"{module}_embedding/embeddings", f"embeddings.{there}_embeddings.weight")
    for module in ("query", "key", "value"):
        rules[f"{layer}/self_attention_layer/{module}/kernel"] = HFName(f"{name}.attention.self.{module}.weight", _HEADS)
        rules[f"{layer}/self_attention_layer/{module}/bias"] = HFName(f"{name}.attention.self.{module}.bias", "n h -> (n h)")
    rules |= dense(f"{layer}/self_attention_layer/attention_output", f"{name}.attention.output.dense", "n h d -> d (n h)")
    for module, there in {"intermediate": "intermediate", "output": "output"}.items():
        rules |= dense(f"{layer}/feedforward_{module}_dense", f"{name}.{there}.dense")
    for norm, there in {"self_attention": "attention.output", "feedforward": "output"}.items():
        rules |= _norm(f"{layer}/{norm}_layer_norm", f"{name}.{there}.LayerNorm")
    return rules | _norm("embeddings_layer_norm", "embeddings.LayerNorm") | dense("pooled_dense", "pooler.dense")


def _named(entries: Entries, prefix: str) -> Entries:
    return {path: dataclasses.replace(entry, name=prefix + entry.name) for path, entry in entries.items()}


def _masked_words() -> Entries:
    rules = dense("mlm_head/intermediate_dense", "cls.predictions.transform.dense")
    rules |= _norm("mlm_head/intermediate_layer_norm", "cls.predictions.transform.LayerNorm")
    return rules | vector("mlm_head/output_bias", "cls.predictions.bias")


# Llama 2 and 3.
KERAS_LLAMA: Rules = table(_llama())
KERAS_LLAMA_TIED: Rules = table(_llama("lm_head.weight"))
KERAS_QWEN3: Rules = table(_qwen3())
KERAS_QWEN3_TIED: Rules = table(_qwen3("lm_head.weight"))

# The text model.
KERAS_GEMMA3: Rules = table(_gemma3())

# BertBackbone as BertModel, BertTextClassifier as BertForSequenceClassification, BertMaskedLM as BertForMaskedLM.
KERAS_BERT_BACKBONE: Rules = table(_bert())
KERAS_BERT: Rules = table(_named(_bert(), "bert."), dense("logits", "classifier"))
KERAS_BERT_TIED: Rules = table(_named(_bert("cls.predictions.decoder.weight"), "bert."), _masked_words())

"""Tiny random models of transformers, with weights far from those of a fresh model; a name and how to make it."""

import transformers as t

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64, "intermediate_size": 48}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def rope(base):
    return {"rope_type": "default", "rope_theta": base}


def decoder(name, layers=3, heads=2, **kw):
    config = {**SIZES, "num_hidden_layers": layers, "num_key_value_heads": heads, "head_dim": 8, "rms_norm_eps": 1e-6}
    config |= kw
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    return lambda: getattr(t, f"{name}ForCausalLM")(getattr(t, kind)(**config))


def plain(name, **kw):
    return decoder(name, rope_parameters=rope(1e6), rms_norm_eps=1e-5, **{"tie_word_embeddings": False, **kw})


def gemma(name, types=(LOCAL, LOCAL, GLOBAL), bases=(1e4, 1e6), **kw):
    ropes = {LOCAL: rope(bases[0]), GLOBAL: rope(bases[1])}
    config = {"layer_types": list(types), "sliding_window": 4, "rope_parameters": ropes, "layers": len(types)}
    return decoder(name, **{**config, **kw})


def bert(kind, **kw):
    return lambda: getattr(t, kind)(t.BertConfig(**SIZES, num_hidden_layers=3, hidden_act="gelu_pytorch_tanh", **kw))


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
GEMMA3 = {"query_pre_attn_scalar": 8}
GEMMA2 = {"query_pre_attn_scalar": 8, "types": (LOCAL, GLOBAL, LOCAL, GLOBAL), "rope_parameters": rope(1e4)}

MODELS = {
    "llama": plain("Llama"),
    "llama_tied": plain("Llama", tie_word_embeddings=True),
    "qwen2": plain("Qwen2"),
    "qwen2_tied": plain("Qwen2", tie_word_embeddings=True),
    "qwen3": plain("Qwen3"),
    "qwen3_tied": plain("Qwen3", tie_word_embeddings=True),
    "qwen3_experts": plain("Qwen3Moe", **EXPERTS),
    "gemma": decoder("Gemma", rope_parameters=rope(1e4)),
    "gemma_fused": decoder("Gemma", heads=4, rope_parameters=rope(1e4)),
    "gemma2": gemma("Gemma2", **GEMMA2),
    "gemma3": gemma("Gemma3", **GEMMA3),
    "gemma3_8_layers": gemma("Gemma3", types=[LOCAL] * 5 + [GLOBAL] + [LOCAL] * 2, **GEMMA3),
    "gemma2_wide": gemma("Gemma2", **GEMMA2, sliding_window=64, attn_logit_softcapping=None),
    "gemma3_wide": gemma("Gemma3", **GEMMA3, sliding_window=64),
    "bert": bert("BertModel"),
    "bert_classifier": bert("BertForSequenceClassification", num_labels=3),
    "bert_words": bert("BertForMaskedLM"),
}

"""Ready rules for `lora_jax.huggingface.names.match`: where other libraries' models keep what Hugging Face checkpoints have.

Each table takes a model with or without the collection `params/` on top, and with its layers one by one or stacked: then the
path has no layer number, and the arrays have the layers as their first axis. Paths don't show whether an embedding is also the
head, so models that leave it open have a second table `..._TIED`; by the first one, what is adapted is the look-up alone.

>>> import numpy as np
>>> from lora_jax.huggingface.names import match
>>> name = match({"layers": {"0": {"attn": {"q_proj": {"w": np.ones((6, 2, 3))}}}}}, TUNIX_LLAMA3)["layers/0/attn/q_proj/w"]
>>> name.tensors((6, 2, 3)), name.shape((6, 2, 3))
({(): 'model.layers.0.self_attn.q_proj.weight'}, (6, 6))
>>> name = match({"layers": {"attn": {"q_proj": {"w": np.ones((2, 6, 2, 3))}}}}, TUNIX_LLAMA3)["layers/attn/q_proj/w"]
>>> list(name.tensors((2, 6, 2, 3)).values())
['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
"""

import dataclasses
import re
from collections.abc import Mapping

from lora_jax.huggingface.names import HFName, Kind

Rules = dict[str, HFName | None]
Entries = dict[str, HFName]  # "#", in a path and in its name, is the layer's number


def _vector(path: str, name: str) -> Entries:
    return {path: HFName(name, "d -> d")}


def _embedding(path: str, name: str, tied: str = "") -> Entries:
    return {path: HFName(name, "v d -> v d", "embedding", tied=tied)}


def _dense(path: str, name: str = "", axes: str = "i o -> o i", kind: Kind = "linear") -> Entries:
    """A kernel, and the bias it may have. The name is as the path where it isn't given."""
    name = name or path.replace("/", ".")
    return {f"{path}/kernel": HFName(f"{name}.weight", axes, kind), **_vector(f"{path}/bias", f"{name}.bias")}


def _norm(path: str, name: str = "") -> Entries:
    name = name or path.replace("/", ".")
    return _vector(f"{path}/scale", f"{name}.weight") | _vector(f"{path}/bias", f"{name}.bias")


def _table(*parts: Mapping[str, HFName], root: str = "") -> Rules:
    """Entries as rules, for each layer by its number and for all of them stacked; `root`: the outermost module of both."""
    rules: Rules = {}
    for path, entry in ((path, entry) for part in parts for path, entry in part.items()):
        name = f"{root}.{entry.name}" if root else entry.name
        path = f"(?:params/)?{root}/{path}" if root else f"(?:params/)?{path}"
        rules[path.replace("#", r"(\d+)")] = dataclasses.replace(entry, name=name.replace("#", r"\1"))
        if "#" in path:
            stacked = dataclasses.replace(entry, name=name.replace("#", "{l}"), axes=f"l {entry.axes}")
            rules[re.sub("[/_]#", "", path)] = stacked
    return rules


def _bert(tied: str = "") -> Entries:
    layer = "encoder/layer/#"
    dense = ["attention/self/query", "attention/self/key", "attention/self/value"]
    dense += ["attention/output/dense", "intermediate/dense", "output/dense"]
    rules = _embedding("embeddings/word_embeddings/embedding", "embeddings.word_embeddings.weight", tied)
    for table in ("position_embeddings", "token_type_embeddings"):
        rules |= _embedding(f"embeddings/{table}/embedding", f"embeddings.{table}.weight")
    for module in dense:
        rules |= _dense(f"{layer}/{module}")
    for module in ("embeddings", f"{layer}/attention/output", f"{layer}/output"):
        rules |= _norm(f"{module}/LayerNorm")
    return rules | _dense("pooler/dense")


_BERT_HEADS = [
    _dense("classifier"),
    _dense("qa_outputs"),
    _dense("cls/seq_relationship"),
    _dense("cls/predictions/transform/dense"),
]
_BERT_HEADS += [_norm("cls/predictions/transform/LayerNorm"), _vector("cls/predictions/bias", "cls.predictions.bias")]

# transformers 4.57.6, FlaxBert*: FlaxBertModel has no `bert/`; the heads are those of its FlaxBertFor... classes.
FLAX_BERT: Rules = _table(_bert(), root="bert") | _table(_bert(), *_BERT_HEADS)

# Those that predict words (FlaxBertForMaskedLM, ForPreTraining, ForCausalLM): their decoder is the word embedding.
FLAX_BERT_TIED: Rules = _table(_bert("cls.predictions.decoder.weight"), root="bert") | _table(*_BERT_HEADS)


def _gpt2(tied: str = "") -> Entries:
    rules = _embedding("wte/embedding", "wte.weight", tied) | _embedding("wpe/embedding", "wpe.weight")
    for module in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
        rules |= _dense(f"h/#/{module}", axes="o i -> i o", kind="conv1d")  # its FlaxConv1D keeps (out, in), torch's (in, out)
    return rules | _norm("h/#/ln_1") | _norm("h/#/ln_2") | _norm("ln_f")


# transformers 4.57.6, FlaxGPT2LMHeadModel (its head is always the embedding) and FlaxGPT2Model (no `transformer/`).
FLAX_GPT2: Rules = _table(_gpt2("lm_head.weight"), root="transformer") | _table(_gpt2())


def _llama() -> Entries:
    rules = _embedding("embed_tokens/embedding", "embed_tokens.weight") | _vector("norm/weight", "norm.weight")
    modules = [f"self_attn/{x}_proj" for x in "qkvo"] + [f"mlp/{x}_proj" for x in ("gate", "up", "down")]
    for module in modules:
        rules |= _dense(f"layers/#/{module}")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        rules |= _vector(f"layers/#/{norm}/weight", f"layers.#.{norm}.weight")
    return rules


# transformers 4.57.6, FlaxLlamaForCausalLM (its head is always a kernel of its own) and FlaxLlamaModel (no `model/`).
FLAX_LLAMA: Rules = _table(_llama(), root="model") | _table(_llama(), _dense("lm_head"))


def _vit(layer: str, modules: Mapping[str, str]) -> Entries:
    """`layer` and `modules`: what a layer, and each dense module in it, is called there."""
    rules = {f"embeddings/{x}": HFName(f"embeddings.{x}") for x in ("cls_token", "position_embeddings")}
    patches = "embeddings/patch_embeddings/projection"
    rules |= _dense(patches, axes="h w i o -> o i h w", kind="conv") | _norm("layernorm") | _dense("pooler/dense")
    for module, name in modules.items():
        rules |= _dense(f"encoder/layer/#/{module}", f"{layer}.#.{name}")
    for norm in ("layernorm_before", "layernorm_after"):
        rules |= _norm(f"encoder/layer/#/{norm}", f"{layer}.#.{norm}")
    return rules


_VIT = [f"attention/attention/{x}" for x in ("query", "key", "value")]
_VIT += ["attention/output/dense", "intermediate/dense", "output/dense"]
_VIT_4 = _vit("encoder.layer", {module: module.replace("/", ".") for module in _VIT})
_VIT_5 = _vit("layers", dict(zip(_VIT, [f"attention.{x}_proj" for x in "qkvo"] + ["mlp.fc1", "mlp.fc2"])))

# transformers 4.57.6, FlaxViTForImageClassification and FlaxViTModel (no `vit/`), with the names of Hugging Face checkpoints,
# which are also PEFT's as long as transformers is older than 5.
FLAX_VIT: Rules = _table(_VIT_4, root="vit") | _table(_VIT_4, _dense("classifier"))

# The same with the module names of transformers 5.23, which renames a ViT's tensors as it loads them. An adapter for PEFT on it
# needs these names: PEFT passes over the others without a word.
FLAX_VIT_5: Rules = _table(_VIT_5, root="vit") | _table(_VIT_5, _dense("classifier"))


def _tunix(tied: str = "") -> list[Entries]:
    attn, mlp, name = "layers/#/attn", "layers/#/mlp", "model.layers.#"
    rules = _embedding("embedder/input_embedding", "model.embed_tokens.weight", tied)
    rules |= _vector("final_norm/w", "model.norm.weight")
    for x in "qkv":
        rules[f"{attn}/{x}_proj/w"] = HFName(f"{name}.self_attn.{x}_proj.weight", "d n h -> (n h) d")
    rules[f"{attn}/o_proj/w"] = HFName(f"{name}.self_attn.o_proj.weight", "n h d -> d (n h)")
    for x in ("gate", "up", "down"):
        rules |= _dense(f"{mlp}/{x}_proj", f"{name}.mlp.{x}_proj")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        rules |= _vector(f"layers/#/{norm}/w", f"{name}.{norm}.weight")
    head = {} if tied else {"lm_head/w": HFName("lm_head.weight", "d v -> v d")}
    return [rules, head]


def _tunix_qwen3() -> Entries:
    """What a Qwen 3 has beside: norms of queries and keys; in the mixture models a router and kernels of (experts, in, out)."""
    rules = _dense("layers/#/mlp/router", "model.layers.#.mlp.gate")
    for x in "qk":
        rules |= _vector(f"layers/#/attn/{x}_norm/w", f"model.layers.#.self_attn.{x}_norm.weight")
    for x in ("gate", "up", "down"):
        rules[f"layers/#/mlp/{x}_proj"] = HFName(f"model.layers.#.mlp.experts.{{e}}.{x}_proj.weight", "e i o -> o i")
    return rules


# google-tunix 0.1.7, tunix.models.llama3 and tunix.models.qwen3 (paths of `lj.nnx.functional`). TIED: `weight_tying=True`.
TUNIX_LLAMA3: Rules = _table(*_tunix())
TUNIX_LLAMA3_TIED: Rules = _table(*_tunix("lm_head.weight"))
TUNIX_QWEN3: Rules = _table(*_tunix(), _tunix_qwen3())
TUNIX_QWEN3_TIED: Rules = _table(*_tunix("lm_head.weight"), _tunix_qwen3())


def _gemma3() -> Entries:
    attn, name = "layer_#/attn", "model.layers.#"
    rules = _embedding("embedder/input_embedding", "model.embed_tokens.weight", "lm_head.weight")
    rules |= _vector("final_norm/scale", "model.norm.weight")
    rules[f"{attn}/q_einsum/w"] = HFName(f"{name}.self_attn.q_proj.weight", "n d h -> (n h) d")
    rules[f"{attn}/kv_einsum/w"] = HFName(f"{name}.self_attn.{{c:k|v}}_proj.weight", "c n d h -> (n h) d")
    rules[f"{attn}/qkv_einsum/w"] = HFName(f"{name}.self_attn.{{c:q|k|v}}_proj.weight", "c n d h -> (n h) d")
    rules[f"{attn}/attn_vec_einsum/w"] = HFName(f"{name}.self_attn.o_proj.weight", "n h d -> d (n h)")
    rules["layer_#/mlp/gating_einsum"] = HFName(f"{name}.mlp.{{c:gate|up}}_proj.weight", "c f d -> f d")
    rules["layer_#/mlp/linear"] = HFName(f"{name}.mlp.down_proj.weight", "f d -> d f")
    norms = {"pre_attention": "input", "post_attention": "post_attention", "pre_ffw": "pre_feedforward"}
    for norm, there in {**norms, "post_ffw": "post_feedforward"}.items():
        rules |= _vector(f"layer_#/{norm}_norm/scale", f"{name}.{there}_layernorm.weight")
    for norm, there in {"query": "q", "key": "k"}.items():
        rules |= _vector(f"{attn}/_{norm}_norm/scale", f"{name}.self_attn.{there}_norm.weight")
    return rules


# gemma 4.0.1, gm.nn.Gemma3_*: the text model, as Gemma3ForCausalLM names it. Both add one to a norm's scale. The image encoder
# and what joins it to the text have no names here, so an adapter on them can't be written by this table.
GEMMA3: Rules = {
    **_table(_gemma3()),
    r"(?:params/)?vision_encoder/.*": None,
    r"(?:params/)?embedder/mm_.*": None,
}

"""The families that the encoder computes: what each has, how its `config.json` says it, and its tensors' names.

A family is a `Family`, and `FAMILIES` has them by their model type. To add one, give it the parts of `BertConfig` that all its
models have, the fields of `config.json` that say the others, a function for what takes more than copying a field, and the name
of each module; list the fields of no account. A field that is in none of these is refused.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import HFName, listing
from lora_jax.models import encoder_config
from lora_jax.models.encoder_config import BertConfig, Fields, is_a

HEAD = "classifier"
LAST = f"{HEAD}/out_proj"  # the last layer of a head of several


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of encoders.

    Args:
      architecture: the name of transformers' class with a classification head.
      prefix: what the names of the encoder's tensors begin with there; checkpoints of the encoder alone leave it out.
      fields: `{field of config.json: field of BertConfig}`; those without a default in `BertConfig` must be there.
      parts: the fields of `BertConfig` that are alike in all models.
      read: further fields of `BertConfig` from those of `config.json`; `reads` names the ones that it looks at.
      modules: `{module here: module there}`, with `#` for the number of a layer. Those of the head, which begin with
        `classifier` here, have no prefix there.
      spare: what the names of tensors of other heads begin with, after the prefix.
      ignored: fields of `config.json` that change nothing here, beside those of all families.
    """

    architecture: str
    prefix: str
    fields: Mapping[str, str]
    parts: Fields = dataclasses.field(default_factory=dict)
    read: Callable[[Fields], Fields] = lambda fields: {}
    reads: tuple[str, ...] = ()
    modules: Mapping[str, str]
    spare: tuple[str, ...]
    ignored: tuple[str, ...] = ()


# What every family has, the names of labels among them.
READ = {"id2label", "model_type", "num_labels"}
# Of no account in any family: dropout and the beginning of training, generation, tokens, and how a run was set up.
IGNORED = {
    "_name_or_path", "_num_labels", "architectures", "attention_dropout", "attention_probs_dropout_prob", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "decoder_start_token_id", "directionality", "do_sample", "dropout",
    "dtype", "eos_token_id", "eos_token_ids", "finetuning_task", "gradient_checkpointing", "hidden_dropout_prob",
    "initializer_range", "label2id", "language", "length_penalty", "max_length", "name", "num_beams", "num_key_value_heads",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past", "pad_token_id", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "problem_type",
    "quantization_config", "repetition_penalty", "return_dict", "sbert_ce_default_activation_function",
    "sentence_transformers", "sep_token_id", "temperature", "tie_weights_", "tie_word_embeddings", "tokenizer_class", "top_k",
    "top_p", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache",
}  # fmt: skip
# What is read where it has this value, and refused where it has another.
ONLY = {
    "add_cross_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "position_embedding_type": "absolute",
    "pruned_heads": {},
    "rope_scaling": None,
}


# --- the table --------------------------------------------------------------------------------------------------------

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings",
)  # fmt: skip
_BERT_FIELDS = {name: name for name in (*_SIZES, "type_vocab_size", "hidden_act", "layer_norm_eps")}
_BERT_MODULES = {
    **{f"embeddings/{name}": f"embeddings.{name}_embeddings" for name in ("word", "position", "token_type")},
    "embeddings/norm": "embeddings.LayerNorm",
    **{f"encoder/layer_#/attention/{name}": f"encoder.layer.#.attention.self.{name}" for name in ("query", "key", "value")},
    "encoder/layer_#/attention/out": "encoder.layer.#.attention.output.dense",
    "encoder/layer_#/attention/norm": "encoder.layer.#.attention.output.LayerNorm",
    "encoder/layer_#/mlp/up": "encoder.layer.#.intermediate.dense",
    "encoder/layer_#/mlp/down": "encoder.layer.#.output.dense",
    "encoder/layer_#/mlp/norm": "encoder.layer.#.output.LayerNorm",
    HEAD: "classifier",  # the last layer alone, on what a sentence encoder pools
}
_TWO_LAYERS = {f"{HEAD}/dense": "classifier.dense", LAST: "classifier.out_proj"}

_BERT = Family(
    architecture="BertForSequenceClassification",
    prefix="bert.",
    fields=_BERT_FIELDS,
    modules={**_BERT_MODULES, "pooler": "pooler.dense"},
    spare=("cls.",),
)

_ROBERTA = Family(
    architecture="RobertaForSequenceClassification",
    prefix="roberta.",
    fields=_BERT_FIELDS,
    parts={"pooling": "cls", "head_act": "tanh"},
    read=encoder_config.after_padding,
    reads=("pad_token_id",),
    modules={**_BERT_MODULES, **_TWO_LAYERS},
    spare=("lm_head.", "pooler."),
)

_ELECTRA = Family(
    architecture="ElectraForSequenceClassification",
    prefix="electra.",
    fields=_BERT_FIELDS,
    parts={"pooling": "cls", "head_act": "gelu"},
    read=encoder_config.embedding_size,
    reads=("embedding_size",),
    modules={**_BERT_MODULES, **_TWO_LAYERS, "embeddings/project": "embeddings_project"},
    spare=("discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
    # They are for its multiple choice head.
    ignored=("summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"),
)

_DISTILBERT = Family(
    architecture="DistilBertForSequenceClassification",
    prefix="distilbert.",
    fields={
        "vocab_size": "vocab_size",
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "activation": "hidden_act",
    },
    parts={"type_vocab_size": 0, "pooling": "cls", "head_act": "relu"},
    modules={
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
        "encoder/layer_#/attention/query": "transformer.layer.#.attention.q_lin",
        "encoder/layer_#/attention/key": "transformer.layer.#.attention.k_lin",
        "encoder/layer_#/attention/value": "transformer.layer.#.attention.v_lin",
        "encoder/layer_#/attention/out": "transformer.layer.#.attention.out_lin",
        "encoder/layer_#/attention/norm": "transformer.layer.#.sa_layer_norm",
        "encoder/layer_#/mlp/up": "transformer.layer.#.ffn.lin1",
        "encoder/layer_#/mlp/down": "transformer.layer.#.ffn.lin2",
        "encoder/layer_#/mlp/norm": "transformer.layer.#.output_layer_norm",
        f"{HEAD}/dense": "pre_classifier",
        LAST: "classifier",
        HEAD: "classifier",
    },
    spare=("vocab_",),
    # Sinusoids are what the table began as; the checkpoint has it.
    ignored=("qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds"),
)

_MODERNBERT_IGNORED = (
    "cls_token_id", "decoder_bias", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor",
    "layer_norm_eps", "mlp_dropout", "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index",
    "sparse_prediction",
)  # fmt: skip
_MODERNBERT = Family(
    architecture="ModernBertForSequenceClassification",
    prefix="model.",
    fields={name: name for name in (*_SIZES, "attention_bias", "mlp_bias", "norm_bias")}
    | {"hidden_activation": "hidden_act", "norm_eps": "layer_norm_eps"}
    | {"classifier_activation": "head_act", "classifier_bias": "head_bias"},
    parts={"type_vocab_size": 0, "norm_first": True, "fused": True, "gated": True, "layer_norm_eps": 1e-5, "head_act": "gelu"}
    | {"attention_bias": False, "mlp_bias": False, "norm_bias": False, "head_bias": False, "head_norm": True},
    read=encoder_config.modernbert,
    reads=("local_attention", "layer_types", "global_attn_every_n_layers", "classifier_pooling", *encoder_config.ROPE),
    modules={
        "embeddings/word": "embeddings.tok_embeddings",
        "embeddings/norm": "embeddings.norm",
        "encoder/layer_#/attention/qkv": "layers.#.attn.Wqkv",
        "encoder/layer_#/attention/out": "layers.#.attn.Wo",
        "encoder/layer_#/attention/norm": "layers.#.attn_norm",
        "encoder/layer_#/mlp/up": "layers.#.mlp.Wi",
        "encoder/layer_#/mlp/down": "layers.#.mlp.Wo",
        "encoder/layer_#/mlp/norm": "layers.#.mlp_norm",
        "encoder/norm": "final_norm",
        f"{HEAD}/dense": "head.dense",
        f"{HEAD}/norm": "head.norm",
        LAST: "classifier",
        HEAD: "classifier",
    },
    spare=("decoder.",),
    ignored=_MODERNBERT_IGNORED,
)

FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, architecture="XLMRobertaForSequenceClassification"),
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "modernbert": _MODERNBERT,
}

# --- config.json ------------------------------------------------------------------------------------------------------


def read_config(fields: Fields) -> BertConfig:
    """The configuration of a classifier from the fields of a `config.json`.

    Raises:
      InputError: another architecture, a field that is missing, unknown or out of range, or one that asks for what the model
        can't do.

    >>> sizes = dict(vocab_size=8, dim=4, hidden_dim=8, n_layers=1, n_heads=2, max_position_embeddings=8)
    >>> read_config(dict(model_type="distilbert", **sizes)).head_act
    'relu'
    """
    model_type: Any = fields.get("model_type")
    if model_type not in tuple(FAMILIES):
        raise InputError(f"the model_type is {model_type!r}; this loader reads {', '.join(map(repr, FAMILIES))}")
    family = FAMILIES[model_type]
    fields = {name: value for name, value in fields.items() if value is not None}
    _refuse(family, fields)
    found = {"model_type": model_type, "num_labels": _num_labels(fields), **family.parts}
    found |= {ours: fields[theirs] for theirs, ours in family.fields.items() if theirs in fields}
    return BertConfig(**{**found, **family.read(fields)})


def _refuse(family: Family, fields: Fields) -> None:
    """What can't be read, whatever the sizes are."""
    for name, only in ONLY.items():
        if fields.get(name, only) != only:
            raise InputError(f"{name} is {fields[name]!r}; only {only!r} can be read")
    unknown = fields.keys() - {*family.fields, *family.ignored, *family.reads, *READ, *IGNORED, *ONLY}
    if unknown:
        raise InputError(f"it has fields that this loader does not know, for {family.architecture}: {listing(sorted(unknown))}")
    needed = {f.name for f in dataclasses.fields(BertConfig) if f.default is dataclasses.MISSING}
    missing = [theirs for theirs, ours in family.fields.items() if ours in needed and not is_a(fields.get(theirs), int)]
    if missing:
        raise InputError(f"it lacks a whole number for: {', '.join(missing)}")
    kinds = get_type_hints(BertConfig)
    for theirs, ours in family.fields.items():
        if theirs in fields and ours.endswith("_act"):
            encoder_config.check_activation(theirs, fields[theirs])
        elif theirs in fields:
            encoder_config.check(theirs, fields[theirs], kinds[ours])


def _num_labels(fields: Fields) -> int:
    labels, count = fields.get("id2label"), fields.get("num_labels", 2)
    if labels is not None and not isinstance(labels, dict):
        raise InputError(f"id2label must be an object, not {labels!r}")
    if not is_a(count, int) or count < 0:
        raise InputError(f"num_labels must be a whole number, not {count!r}")
    return count if labels is None else len(labels)


# --- names ------------------------------------------------------------------------------------------------------------

_LEAVES: dict[str, Any] = {"kernel": ("weight", "i o -> o i"), "embedding": ("weight", "", "embedding")}
_LEAVES |= {"scale": ("weight",), "bias": ("bias",)}


def name_of(path: str, family: Family, prefix: str) -> HFName:
    """The name in a checkpoint of a parameter here.

    >>> name_of("params/encoder/layer_3/mlp/up/kernel", FAMILIES["distilbert"], "distilbert.").name
    'distilbert.transformer.layer.3.ffn.lin1.weight'
    """
    module, _, leaf = path.removeprefix("params/").rpartition("/")
    layer = re.search(r"layer_(\d+)", module)
    theirs = family.modules[re.sub(r"layer_\d+", "layer_#", module)].replace("#", layer[1] if layer else "")
    tensor, *rest = _LEAVES[leaf]
    return HFName(f"{'' if module.startswith(HEAD) else prefix}{theirs}.{tensor}", *rest)

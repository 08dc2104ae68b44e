"""The families that the encoder computes: what each has, how its `config.json` says it, and its tensors' names.

A family is a `Family`, and `FAMILIES` has them by their model type. To add one, give it the parts of `BertConfig` from the
fields of its `config.json`, and the name of each module; list the fields of no account. A field that nothing reads is refused.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import HFName
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.classifiers import HEAD, LAST
from lora_jax.models.config_fields import Fields
from lora_jax.models.decoder_config import check_number
from lora_jax.models.encoder_config import BertConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of encoders.

    Args:
      architecture: the name of transformers' class with a classification head.
      prefix: what the names of the encoder's tensors begin with there; checkpoints of the encoder alone leave it out.
      parts: fields of `BertConfig` from those of a `config.json`, beside the sizes that all families have.
      modules: `{module here: module there}`, with `#` for the number of a layer. Those of the head, which begin with
        `classifier` here, have no prefix there.
      spare: what the names of tensors of other heads begin with, after the prefix.
      fields: the names in `config.json` of fields of `BertConfig`, where they differ.
      ignored: fields of `config.json` that change nothing here, beside those of all models.
    """

    architecture: str
    prefix: str
    parts: Callable[[Fields], dict[str, Any]]
    modules: Mapping[str, str]
    spare: tuple[str, ...]
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


# --- parts ------------------------------------------------------------------------------------------------------------


def _bert(fields: Fields) -> dict[str, Any]:
    return {"type_vocab_size": fields.whole("type_vocab_size"), "layer_norm_eps": fields.number("layer_norm_eps", 1e-12)}


def _roberta(fields: Fields) -> dict[str, Any]:
    """The first rows of its table of positions stand for padding and for ids below its."""
    rows, padding = fields.whole("max_position_embeddings"), fields.whole("pad_token_id", 1, least=0)
    if padding >= rows - 1:
        raise InputError(f"pad_token_id must be a whole number below max_position_embeddings - 1, {rows - 1}, not {padding}")
    positions = {"padding_id": padding, "max_position_embeddings": rows - padding - 1}
    return _bert(fields) | {"pooling": "cls", "head_act": "tanh"} | positions


def _electra(fields: Fields) -> dict[str, Any]:
    """Its embeddings may be smaller than the hidden states."""
    size = fields.whole("embedding_size")
    embeddings = {"embedding_size": None if size == fields.whole("hidden_size") else size}
    return _bert(fields) | {"pooling": "cls", "head_act": "gelu"} | embeddings


def _modernbert(fields: Fields) -> dict[str, Any]:
    """Local and global layers, their rotary bases, and what the head reads."""
    biases = ("attention_bias", "mlp_bias", "norm_bias", "head_bias")
    return {
        **{name: True for name in ("norm_first", "fused", "gated", "head_norm")},
        **{name: fields.flag(name) for name in biases},
        "type_vocab_size": 0,
        "layer_norm_eps": fields.number("layer_norm_eps", 1e-5),
        "head_act": fields.choice("head_act", FUNCTIONS, "gelu"),
        "pooling": fields.choice("classifier_pooling", ("cls", "mean"), "cls"),
        "window": fields.whole("local_attention", 128, least=0) // 2,
        "local_layers": tuple(i for i, kind in enumerate(_layer_types(fields)) if kind == "sliding_attention"),
        **_rope_thetas(fields),
    }


_KINDS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}  # of ModernBERT's layers, with their rotary bases


def _layer_types(fields: Fields) -> list[str]:
    kinds, every = fields.layer_types(), fields.whole("global_attn_every_n_layers", 3)
    layers = range(fields.layers())
    return ["sliding_attention" if i % every else "full_attention" for i in layers] if kinds is None else kinds


def _rope_thetas(fields: Fields) -> dict[str, float]:
    """The rotary base of each kind of layer: a field of its own up to version 4 of transformers, then `rope_parameters`."""
    settings = fields.get("rope_parameters") or {}
    objects = isinstance(settings, dict) and all(isinstance(value, dict) for value in settings.values())
    if not objects or set(settings) - set(_KINDS):
        raise InputError(f"rope_parameters must have an object for each of {', '.join(_KINDS)}, not {settings!r}")
    thetas = {}
    for (kind, usual), ours in zip(_KINDS.items(), ("rope_theta", "local_rope_theta")):
        own = {"rope_type": "default", "rope_theta": fields.number(ours, usual), **settings.get(kind, {})}
        thetas[ours] = own.pop("rope_theta")
        if own != {"rope_type": "default"}:
            raise InputError(f"rope_parameters: {kind} has {own!r}; only the rope_type 'default' can be read")
        check_number("rope_theta", thetas[ours], float)
    return thetas


# --- the table --------------------------------------------------------------------------------------------------------

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
    parts=_bert,
    modules={**_BERT_MODULES, "pooler": "pooler.dense"},
    spare=("cls.",),
)

_ROBERTA = Family(
    architecture="RobertaForSequenceClassification",
    prefix="roberta.",
    parts=_roberta,
    modules={**_BERT_MODULES, **_TWO_LAYERS},
    spare=("lm_head.", "pooler."),
)

_ELECTRA = Family(
    architecture="ElectraForSequenceClassification",
    prefix="electra.",
    parts=_electra,
    modules={**_BERT_MODULES, **_TWO_LAYERS, "embeddings/project": "embeddings_project"},
    spare=("discriminator_predictions.", "generator_predictions.", "generator_lm_head."),
    # They are for its multiple choice head.
    ignored=("summary_activation", "summary_last_dropout", "summary_type", "summary_use_proj"),
)

_DISTILBERT = Family(
    architecture="DistilBertForSequenceClassification",
    prefix="distilbert.",
    parts=lambda fields: {"type_vocab_size": 0, "pooling": "cls", "head_act": "relu"},
    fields={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
    },
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

_MODERNBERT = Family(
    architecture="ModernBertForSequenceClassification",
    prefix="model.",
    parts=_modernbert,
    fields={
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "head_act": "classifier_activation",
        "head_bias": "classifier_bias",
        "rope_theta": "global_rope_theta",
    },
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
    ignored=(
        "decoder_bias", "deterministic_flash_attn", "embedding_dropout", "initializer_cutoff_factor", "layer_norm_eps",
        "mlp_dropout", "reference_compile", "repad_logits_with_grad", "sparse_pred_ignore_index", "sparse_prediction",
    ),
)  # fmt: skip

FAMILIES = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": dataclasses.replace(_ROBERTA, architecture="XLMRobertaForSequenceClassification"),
    "distilbert": _DISTILBERT,
    "electra": _ELECTRA,
    "modernbert": _MODERNBERT,
}

# --- config.json ------------------------------------------------------------------------------------------------------

_SIZES = (
    "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings",
)  # fmt: skip


def read_config(fields: Mapping[str, Any]) -> BertConfig:
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
    read = Fields(fields, family.fields, {})
    read.only_an_encoder()
    read.only("position_embedding_type", "absolute")
    read.only("rope_scaling", None)
    found: dict[str, Any] = {name: read.whole(name) for name in _SIZES}
    found |= {"hidden_act": read.choice("hidden_act", FUNCTIONS, "gelu"), "num_labels": read.num_labels()}
    found["num_hidden_layers"] = read.layers()
    found |= {"initializer_range": read.number("initializer_range", 0.02), **family.parts(read)}
    read.ignore("num_key_value_heads", *family.ignored)
    read.refuse_others()
    return BertConfig(model_type=model_type, **found)


# --- names ------------------------------------------------------------------------------------------------------------

_LEAVES: dict[str, Any] = {"kernel": ("weight", "i o -> o i"), "embedding": ("weight", "", "embedding")}
_LEAVES |= {"scale": ("weight",), "bias": ("bias",)}
_STACKED: dict[str, Any] = {"kernel": ["l i o -> o i"], "scale": ["l o -> o"], "bias": ["l o -> o"]}


def name_of(path: str, family: Family, prefix: str, stacked: str = "{l}") -> HFName:
    """The name in a checkpoint of a parameter here; `stacked` is the number of a layer in the names of those in a stack.

    >>> name_of("params/encoder/layer_3/mlp/up/kernel", FAMILIES["distilbert"], "distilbert.").name
    'distilbert.transformer.layer.3.ffn.lin1.weight'
    """
    module, _, leaf = path.removeprefix("params/").rpartition("/")
    layer = re.search(r"/layer(?:s|_(\d+))/", module)
    theirs = family.modules[re.sub(r"/layer(s|_\d+)/", "/layer_#/", module)]
    tensor, *rest = _LEAVES[leaf]
    if layer is not None:
        theirs = theirs.replace("#", layer[1] or stacked)
        rest = rest if layer[1] else _STACKED[leaf]
    return HFName(f"{'' if module.startswith(HEAD) else prefix}{theirs}.{tensor}", *rest)

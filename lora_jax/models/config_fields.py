"""The fields of a `config.json`, each read with an error that names it; those that nothing reads are refused."""

from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.models.decoder_config import MOST_LAYERS, check_number

# Fields of any model that change nothing that is computed: dropout, which adapters have of their own, and the beginning of
# training, generation, tokens, and how a run was set up. Where a family has a use for one, it reads it all the same.
OF_NO_ACCOUNT = (
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "initializer_range", "attention_dropout", "auto_map", "pretraining_tp", "bos_token_id", "eos_token_id",
    "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict", "id2label",
    "label2id", "problem_type", "max_length", "do_sample", "temperature", "top_k", "top_p", "unsloth_fixed", "unsloth_version",
    "transformers.js_config", "_attn_implementation", "_attn_implementation_autoset", "chunk_size_feed_forward",
    "is_encoder_decoder", "torchscript", "finetuning_task", "tokenizer_class", "prefix", "gradient_checkpointing",
    "use_bfloat16", "sparsity_config", "_commit_hash", "_num_labels", "attention_probs_dropout_prob", "attn_implementation",
    "classifier_dropout", "directionality", "dropout", "eos_token_ids", "hidden_dropout_prob", "language", "length_penalty",
    "name", "num_beams", "num_return_sequences", "output_past", "pooler_fc_size", "pooler_num_attention_heads",
    "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "repetition_penalty",
    "sbert_ce_default_activation_function", "sentence_transformers", "tie_weights_",
)  # fmt: skip


class Fields:
    """The fields of a `config.json` under our names for them.

    Args:
      fields: the file's.
      names: its names of ours, where they differ.
      defaults: what its fields are where it lacks them.
    """

    def __init__(self, fields: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]):
        self._fields, self._names, self._defaults = fields, names, defaults
        self._read: set[str] = set(OF_NO_ACCOUNT)

    def name(self, name: str) -> str:
        """The file's name of one of ours."""
        return self._names.get(name, name)

    def get(self, name: str) -> Any:
        """A field's value or its default; `None` without either."""
        theirs = self.name(name)
        self._read.add(theirs)
        value = self._fields.get(theirs)
        return self._defaults.get(theirs) if value is None else value

    def has(self, name: str) -> bool:
        """Whether the file has the field, be it null."""
        return self.name(name) in self._fields

    def is_null(self, name: str) -> bool:
        """Whether the file has the field, and it is null."""
        return self.has(name) and self._fields[self.name(name)] is None

    def maybe_whole(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """A whole number, or the default where there is none."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "positive whole number" if least else "whole number"
            raise InputError(f"{self.name(name)} must be a {kind}, not {value!r}")
        return value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, which must be there or have a default."""
        value = self.maybe_whole(name, default, least)
        if value is None:
            raise InputError(f"it lacks {self.name(name)}")
        return value

    def maybe_number(self, name: str, default: float | None = None) -> float | None:
        """A positive number; null where the model has none of the kind."""
        if self.is_null(name):
            default = None
        value = self.get(name)
        if value is None:
            return default
        check_number(self.name(name), value, float)
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number, which must be there or have a default."""
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise InputError(f"it lacks {self.name(name)}")
        check_number(self.name(name), value, float)
        return value

    def coefficient(self, name: str, default: float) -> float:
        """A number of at least 0."""
        value = self.get(name)
        return 0.0 if value == 0 and not isinstance(value, bool) else self.number(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{self.name(name)} must be true or false, not {value!r}")
        return value

    def choice(self, name: str, allowed: Collection[str], default: str) -> Any:
        """One of some words."""
        value = self.get(name)
        value = default if value is None else value
        if value not in tuple(allowed):
            raise InputError(f"{self.name(name)} {value!r} is not one of {', '.join(sorted(allowed))}")
        return value

    def layers(self) -> int:
        """The number of layers."""
        count = self.whole("num_hidden_layers")
        if count > MOST_LAYERS:
            raise InputError(f"num_hidden_layers is {count}; at most {MOST_LAYERS} can be read")
        return count

    def layer_types(self) -> list[str] | None:
        """The kind of attention of each layer: `full_attention` or `sliding_attention`; `None` without the field."""
        kinds, count = self.get("layer_types"), self.layers()
        known = ("full_attention", "sliding_attention")
        fits = kinds is None or (isinstance(kinds, list) and len(kinds) == count and all(kind in known for kind in kinds))
        if not fits:
            raise InputError(f"layer_types must be {' or '.join(map(repr, known))} for each of {count} layers, not {kinds!r}")
        return kinds

    def num_labels(self) -> int:
        """How many labels a classifier has: by their names or, without any, by their number."""
        labels, count = self.get("id2label"), self.whole("num_labels", 2, least=0)
        if not isinstance(labels, dict | None):
            raise InputError(f"id2label must be an object, not {labels!r:.80}")
        return count if labels is None else len(labels)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that is there with any other value than these."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise InputError(f"{self.name(name)} is {value!r}; only {' or '.join(map(repr, allowed))} can be read")

    def ignore(self, *names: str) -> None:
        """These, by the file's names for them, change nothing in this model."""
        self._read.update(names)

    def only_an_encoder(self) -> None:
        """Refuse what makes a decoder of it, or takes heads away."""
        for name in ("is_decoder", "is_encoder_decoder", "add_cross_attention"):
            self.only(name, False)
        self.only("pruned_heads", {})
        self.ignore("tie_word_embeddings", "quantization_config")  # of heads that are not here, and of how files are stored

    def refuse_others(self) -> None:
        """Raise an InputError if there are fields that nothing has read."""
        unknown = [name for name, value in self._fields.items() if name not in self._read and value is not None]
        if unknown:
            listed = ", ".join(f"{name} ({self._fields[name]!r:.40})" for name in sorted(unknown))
            raise InputError(
                f"it has fields that this loader does not know: {listed}. They may change what the model computes: remove them "
                "from config.json if they do not"
            )

"""The fields of a `config.json`, each read with an error that names it; those that nothing reads are refused."""

from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.models.decoder_config import check_number

# Fields of any model that change nothing that is computed, or only what dropout does, which adapters have of their own.
OF_NO_ACCOUNT = (
    "architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "initializer_range", "attention_dropout", "auto_map", "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id",
    "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id", "decoder_start_token_id", "output_attentions",
    "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict", "id2label", "label2id", "problem_type",
    "max_length", "do_sample", "temperature", "top_k", "top_p", "unsloth_fixed", "unsloth_version", "transformers.js_config",
    "_attn_implementation", "_attn_implementation_autoset", "chunk_size_feed_forward", "is_encoder_decoder", "torchscript",
    "finetuning_task", "tokenizer_class", "prefix", "gradient_checkpointing", "use_bfloat16", "sparsity_config",
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

    def maybe_whole(self, name: str, default: int | None = None, least: int = 1) -> int | None:
        """A whole number, or the default where there is none."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "positive whole number" if least else "whole number"
            raise InputError(f"{self.name(name)} must be a {kind}, not {value!r}")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number, which must be there or have a default."""
        value = self.maybe_whole(name, default)
        if value is None:
            raise InputError(f"it lacks {self.name(name)}")
        return value

    def maybe_number(self, name: str, default: float | None = None) -> float | None:
        """A positive number; null, or 0, where the model has none of the kind."""
        if self.has(name) and self._fields[self.name(name)] is None:
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

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise InputError(f"{self.name(name)} must be true or false, not {value!r}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field that is there with any other value than these."""
        value = self.get(name)
        if value is not None and value not in allowed:
            raise InputError(f"{self.name(name)} is {value!r}; only {' or '.join(map(repr, allowed))} can be read")

    def ignore(self, *names: str) -> None:
        """These change nothing in this model."""
        self._read.update(map(self.name, names))

    def refuse_others(self) -> None:
        """Raise an InputError if there are fields that nothing has read."""
        unknown = [name for name, value in self._fields.items() if name not in self._read and value is not None]
        if unknown:
            listed = ", ".join(f"{name} ({self._fields[name]!r:.40})" for name in sorted(unknown))
            raise InputError(
                f"it has fields that this loader does not know: {listed}. They may change what the model computes: remove them "
                "from config.json if they do not"
            )

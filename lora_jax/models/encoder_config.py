"""The sizes and parts of an encoder, and what the fields of a `config.json` say of them that takes more than copying."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS

Fields = Mapping[str, Any]
Pooling = Literal["mean", "cls", "pooler"]

ACTIVATIONS = {name: FUNCTIONS[name] for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes and parts of an encoder with a classification head.

    Args:
      max_position_embeddings: the tokens of the longest text.
      type_vocab_size: the token types; 0: there are none.
      num_labels: the outputs of the head; 0: the model has no head and gives what the head would read.
      pooling: what the head reads: the `"mean"` of the tokens that are not padding, the first token (`"cls"`), or
        BERT's own `"pooler"`, a dense layer with tanh on the first token.
      model_type: the family, as in `config.json`.
      embedding_size: of the embeddings, which a dense layer brings to the hidden size; `None`: they have that already.
      padding_id: positions count the tokens that are not this one, and begin after it; `None`: they count all, from 0.
      rope_theta: the base of rotary positions in place of learned ones; `local_rope_theta`: that of the local layers.
      local_layers: the layers in which a token sees those at most `window` places away; in the others it sees all.
      norm_first: whether norms come before attention and MLP, rather than after the sum with what went in.
      fused: whether query, key and value are one dense layer.
      gated: whether the MLP is `down(act(first half of up(x)) * second half)`.
      attention_bias: whether the dense layers of attention have biases; `mlp_bias`, `head_bias`, `norm_bias`: likewise.
      head_act: what follows the dense layer that the head begins with; `None`: the head is the last layer alone.
      head_norm: whether a norm follows that.
      normalize: whether what a model without a head gives is scaled to length 1.

    Raises:
      InputError: sizes that do not fit together, or an unknown activation.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    num_labels: int = 2
    pooling: Pooling = "pooler"
    model_type: str = "bert"
    embedding_size: int | None = None
    padding_id: int | None = None
    rope_theta: float | None = None
    local_rope_theta: float | None = None
    local_layers: tuple[int, ...] = ()
    window: int | None = None
    norm_first: bool = False
    fused: bool = False
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    norm_bias: bool = True
    head_bias: bool = True
    head_act: str | None = None
    head_norm: bool = False
    normalize: bool = False

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            raise InputError(f"the heads must divide the hidden size, but it has {sizes}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise InputError(f"the size of a head must be even, to be rotated in pairs, not {self.head_dim}")
        for name in ("hidden_act", "head_act"):
            if getattr(self, name) is not None:
                check_activation(name, getattr(self, name))

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.hidden_size // self.num_attention_heads


def check_activation(name: str, value: Any) -> None:
    """Raise an InputError that names the field unless there is such an activation."""
    known = sorted(ACTIVATIONS)
    if value not in known:
        raise InputError(f"{name} {value!r} is not one of {', '.join(known)}")


# --- fields of config.json --------------------------------------------------------------------------------------------


def check(name: str, value: Any, kind: type) -> None:
    """Raise an InputError unless the value is true or false, or a positive and finite number of its kind."""
    if kind is bool:
        if not isinstance(value, bool):
            raise InputError(f"{name} must be true or false, not {value!r}")
    elif not (is_a(value, int) or (kind is float and is_a(value, float))) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a positive {'whole number' if kind is int else 'number'}, not {value!r}")


def is_a(value: Any, kind: type) -> bool:
    """Whether the value is of this kind of number, which true and false are not."""
    return isinstance(value, kind) and not isinstance(value, bool)


def after_padding(fields: Fields) -> Fields:
    """RoBERTa's table of positions, whose first rows stand for padding and for ids below its."""
    padding: Any = fields.get("pad_token_id", 1)
    rows = fields["max_position_embeddings"]
    if not is_a(padding, int) or not 0 <= padding < rows - 1:
        raise InputError(f"pad_token_id must be a whole number below max_position_embeddings - 1, {rows - 1}, not {padding!r}")
    return {"padding_id": padding, "max_position_embeddings": rows - padding - 1}


def embedding_size(fields: Fields) -> Fields:
    """ELECTRA's embeddings, which may be smaller than the hidden states."""
    size: Any = fields.get("embedding_size")
    if not is_a(size, int) or size < 1:
        raise InputError(f"embedding_size must be a whole number of at least 1, not {size!r}")
    return {"embedding_size": None if size == fields["hidden_size"] else size}


_KINDS = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}  # of ModernBERT's layers, with their rotary bases
ROPE = ("rope_parameters", "global_rope_theta", "local_rope_theta")


def modernbert(fields: Fields) -> Fields:
    """Local and global layers, their rotary bases, and what the head reads."""
    width = fields.get("local_attention", 128)
    if not is_a(width, int) or width < 0:
        raise InputError(f"local_attention must be a whole number, not {width!r}")
    pooling = fields.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise InputError(f"classifier_pooling must be 'cls' or 'mean', not {pooling!r}")
    local = tuple(i for i, kind in enumerate(_layer_types(fields)) if kind == "sliding_attention")
    thetas = dict(zip(("rope_theta", "local_rope_theta"), _rope_thetas(fields)))
    return {"window": width // 2, "local_layers": local, "pooling": pooling, **thetas}


def _layer_types(fields: Fields) -> list[str]:
    kinds, count = fields.get("layer_types"), fields["num_hidden_layers"]
    if kinds is None:
        every = fields.get("global_attn_every_n_layers", 3)
        if not is_a(every, int) or every < 1:
            raise InputError(f"global_attn_every_n_layers must be a whole number of at least 1, not {every!r}")
        return ["sliding_attention" if i % every else "full_attention" for i in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count or not set(map(str, kinds)) <= set(_KINDS):
        raise InputError(f"layer_types must be {' or '.join(map(repr, _KINDS))} for each of the {count} layers, not {kinds!r}")
    return kinds


def _rope_thetas(fields: Fields) -> list[float]:
    """The rotary base of each kind of layer: a field of its own up to version 4 of transformers, then `rope_parameters`."""
    settings = fields.get("rope_parameters") or {}
    objects = isinstance(settings, dict) and all(isinstance(value, dict) for value in settings.values())
    if not objects or set(settings) - set(_KINDS):
        raise InputError(f"rope_parameters must have an object for each of {', '.join(_KINDS)}, not {settings!r}")
    thetas = []
    for (kind, usual), old in zip(_KINDS.items(), ROPE[1:]):
        own = {"rope_type": "default", "rope_theta": fields.get(old, usual), **settings.get(kind, {})}
        theta = own.pop("rope_theta")
        if own != {"rope_type": "default"}:
            raise InputError(f"rope_parameters: {kind} has {own!r}; only the rope_type 'default' can be read")
        check("rope_theta", theta, float)
        thetas.append(float(theta))
    return thetas

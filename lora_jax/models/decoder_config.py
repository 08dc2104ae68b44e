"""What a decoder is made of: its sizes, and its parts, each chosen for itself."""

import dataclasses
from typing import Any, Literal, get_args

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.experts import Experts
from lora_jax.models.rotary import Rope, Scaling

MOST_LAYERS = 10_000  # a broken file must not ask for more work than any real one
Norm = Literal["rms", "offset", "layer"]
Norms = Literal["before", "after", "both"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and the parts of a decoder.

    Args:
      model_type: the family, as a Hugging Face `config.json` calls it.
      vocab_size, hidden_size, intermediate_size, num_hidden_layers: as there, like the next three.
      num_attention_heads, num_key_value_heads, head_dim: the heads of queries, those of keys and values, and the size of each.
      max_position_embeddings: the tokens of the longest text.
      rms_norm_eps: what is added under the root of each norm, of whatever kind.
      norm: `"rms"`: `x / rms(x)` times a scale; `"offset"`: times 1 + scale; `"layer"`: LayerNorm with scale and bias.
      norms: whether attention and MLP have a norm before them, after them, or both.
      parallel: both read the layer's input, and their outputs are added to it together.
      gated: whether the MLP is `down(act(gate(x)) * up(x))` or `down(act(up(x)))`.
      activation: one of `activations.FUNCTIONS`.
      fused: whether gate and up, and query, key and value, are one projection each. `"blocks"`: one part after the other;
        `"heads"`: head by head.
      qkv_bias: whether the query, key and value projections have biases.
      output_bias: whether the output projection has one.
      mlp_bias: whether the projections of the MLP have biases.
      tie_word_embeddings: whether the head is the embedding.
      qk_norm: whether queries and keys have norms: of each head, or of all heads together.
      query_scale: what the scores are multiplied by; `None`: `head_dim^-0.5`.
      sinks: whether each head has a score that takes part in its softmax and has no value.
      attention_cap: scores s become `cap tanh(s / cap)`; `None`: they stay.
      logit_cap: so do the logits.
      embedding_scale, residual_scale, logit_scale: what the embeddings, the outputs of attention and MLP, and the logits are
        multiplied by.
      learnt_positions: whether positions have embeddings of their own, in place of rotations.
      rope_theta: the base of the rotary frequencies.
      rope_scaling: how they are scaled, if they are.
      rotary_dim: how many values of a head are rotated; `None`: all.
      sliding_rope: the rotation in sliding layers; `None`: the same as in the others.
      unrotated_layers: the layers without positions.
      sliding_window: the tokens that a query of a sliding layer sees, itself included.
      sliding_layers: the layers that see no more than that; the others see all tokens before.
      experts: in place of the MLP, in some layers.
      bos_token_id, pad_token_id: the ids that begin a text, and that fill a row; `None`: there is none.
      eos_token_ids: the ids that end a text.
      source: the `config.json` that this was read from, as JSON text; of no account for the model.

    Raises:
      InputError: sizes or parts that do not fit together.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=2, max_position_embeddings=8)
    >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    >>> config = DecoderConfig(sliding_window=3, sliding_layers=(1,), **heads, **sizes)
    >>> config.windows, config.frequencies().tolist()
    ((None, 3), [1.0])
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    norm: Norm = "rms"
    norms: Norms = "before"
    parallel: bool = False
    gated: bool = True
    activation: str = "silu"
    fused: Literal["blocks", "heads"] | None = None
    qk_norm: Literal["heads", "width"] | None = None
    query_scale: float | None = None
    sinks: bool = False
    attention_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    learnt_positions: bool = False
    rotary_dim: int | None = None
    sliding_rope: Rope | None = None
    unrotated_layers: tuple[int, ...] = ()
    experts: Experts | None = None
    source: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self):
        for name in SIZES:
            check_number(name, getattr(self, name), int)
        if self.num_hidden_layers > MOST_LAYERS:
            raise InputError(f"num_hidden_layers is {self.num_hidden_layers}; at most {MOST_LAYERS} can be read")
        for name in ("rms_norm_eps", "rope_theta"):
            check_number(name, getattr(self, name), float)
        for name, allowed in (("norm", get_args(Norm)), ("norms", get_args(Norms)), ("activation", FUNCTIONS)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}, num_key_value_heads {self.num_key_value_heads}"
            raise InputError(f"the key-value heads must divide the attention heads, but there are {heads}")
        if self.fused == "heads" and self.num_attention_heads != self.num_key_value_heads:
            raise InputError(
                f"a joined projection by heads needs as many key-value heads as heads, not {self.num_key_value_heads}"
            )
        if self.parallel and self.norms != "before":
            raise InputError(f"parallel needs norms='before', not {self.norms!r}")
        if self.rotated % 2 or not 0 < self.rotated <= self.head_dim:
            what = "head_dim" if self.rotary_dim is None else f"the rotated part of head_dim {self.head_dim}"
            raise InputError(f"{what} must be even and at most a head's, to be rotated in pairs, not {self.rotated}")
        if self.sliding_layers:
            check_number("sliding_window", self.sliding_window, int)
        if self.experts is not None:
            for name in ("count", "chosen", "width"):
                check_number(f"experts.{name}", getattr(self.experts, name), int)
            if self.experts.chosen > self.experts.count:
                raise InputError(f"a token can't choose {self.experts.chosen} of {self.experts.count} experts")

    @property
    def rotated(self) -> int:
        """How many values of a head are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        sliding = set(self.sliding_layers)
        return tuple(self.sliding_window if i in sliding else None for i in range(self.num_hidden_layers))

    def frequencies(self) -> np.ndarray:
        """The rotary frequencies of layers that do not slide, for a short text: `(rotated / 2,)` in float32."""
        return np.asarray(Rope(self.rope_theta, self.rope_scaling).frequencies(self.rotated, 1))

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotation of each layer; `None`: none."""
        still = set(range(self.num_hidden_layers) if self.learnt_positions else self.unrotated_layers)
        usual = Rope(self.rope_theta, self.rope_scaling)
        sliding = set(self.sliding_layers) if self.sliding_rope is not None else ()
        own = [self.sliding_rope if i in sliding else usual for i in range(self.num_hidden_layers)]
        return tuple(None if i in still else rope for i, rope in enumerate(own))

    @property
    def active_width(self) -> int:
        """The inner width that a token goes through in a layer, of all the experts that it chooses where there are some."""
        return self.intermediate_size if self.experts is None else self.experts.chosen * self.experts.width

    @property
    def has_experts(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        layers = () if self.experts is None else set(self.experts.layers)
        return tuple(i in layers for i in range(self.num_hidden_layers))


SIZES = tuple(f.name for f in dataclasses.fields(DecoderConfig) if f.type is int)


def check_number(name: str, value: Any, kind: type) -> None:
    """Raise an InputError unless a value is a positive number, whole if `kind` is int."""
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a positive {'whole number' if kind is int else 'number'}, not {value!r}")

"""The sizes and parts of an encoder."""

import dataclasses
from typing import Literal

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS

Pooling = Literal["mean", "cls", "pooler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes and parts of an encoder with a classification head.

    Args:
      vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as in `config.json`.
      max_position_embeddings: the tokens of the longest text.
      type_vocab_size: the token types; 0: there are none.
      hidden_act: what stands between the MLP's layers, one of `activations.FUNCTIONS`.
      layer_norm_eps: what is added under the root of each norm.
      num_labels: the outputs of the head; 0: the model has no head and gives what the head would read.
      pooling: what the head reads: the `"mean"` of the tokens that are not padding, the first token (`"cls"`), or
        BERT's own `"pooler"`, a dense layer with tanh on the first token.
      model_type: the family, as in `config.json`.
      embedding_size: of the embeddings, which a dense layer brings to the hidden size; `None`: they have that already.
      padding_id: positions count the tokens that are not this one, and begin after it; `None`: they count all, from 0.
      rope_theta: the base of rotary positions in place of learned ones; `None`: these are learned.
      local_rope_theta: that of the local layers.
      local_layers: the layers in which a token sees the nearest alone; in the others it sees all.
      window: how many places away the farthest of these is.
      norm_first: whether norms come before attention and MLP, rather than after the sum with what went in.
      fused: whether query, key and value are one dense layer.
      gated: whether the MLP is `down(act(first half of up(x)) * second half)`.
      attention_bias: whether the dense layers of attention have biases.
      mlp_bias, norm_bias, head_bias: likewise those of the MLP, the norms, and the first dense layer of the head.
      head_act: what follows the dense layer that the head begins with; `None`: the head is the last layer alone.
      head_norm: whether a norm follows that.
      initializer_range: the deviation of a new head's kernels.
      normalize: whether what a model without a head gives is scaled to length 1.

    Raises:
      InputError: sizes that do not fit together, or an unknown activation.

    >>> sizes = dict(vocab_size=8, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, **sizes).head_dim
    2
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
    initializer_range: float = 0.02
    normalize: bool = False

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            raise InputError(f"the heads must divide the hidden size, but it has {sizes}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise InputError(f"the size of a head must be even, to be rotated in pairs, not {self.head_dim}")
        for name in ("hidden_act", "head_act"):
            if getattr(self, name) not in (*FUNCTIONS, None):
                raise InputError(f"{name} {getattr(self, name)!r} is not one of {', '.join(sorted(FUNCTIONS))}")

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def apart(self) -> int:
        """How many layers have other parameters than those after them: the first has no norm before attention."""
        return int(self.norm_first)

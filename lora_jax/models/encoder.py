"""Encoders of the BERT family with a classification head, as one Linen model: its configuration says which parts it has."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.encoder_config import BertConfig
from lora_jax.models.rotary import Rope, rotate, turns
from lora_jax.models.stacking import Remat, again, chosen, scanned

# --- layers -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with its residual and norm: `(batch, length, hidden)`."""

    config: BertConfig
    param_dtype: Any
    has_norm: bool

    @nn.compact
    def __call__(self, x, bias, rotation):
        mix = functools.partial(self._mix, bias=bias, rotation=rotation)
        return _residual(self, x, mix) if self.has_norm else x + mix(x)

    def _mix(self, x, bias, rotation):
        config = self.config
        query, key, value = self._projections(x)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores / math.sqrt(config.head_dim) + bias).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return self._dense(config.hidden_size, "out")(mixed)

    def _projections(self, x) -> Any:
        """Query, key and value: `(batch, length, heads, head_dim)` each."""
        size, by_head = self.config.hidden_size, (*x.shape[:-1], self.config.num_attention_heads, self.config.head_dim)
        if self.config.fused:
            parts = jnp.split(self._dense(3 * size, "qkv")(x), 3, axis=-1)
        else:
            parts = [self._dense(size, name)(x) for name in ("query", "key", "value")]
        return [part.reshape(by_head) for part in parts]

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, self.config.attention_bias, param_dtype=self.param_dtype, name=name)


class MLP(nn.Module):
    """The two dense layers after attention with their residual and norm: `(batch, length, hidden)`."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        return _residual(self, x, self._inner)

    def _inner(self, x):
        config = self.config
        dense = functools.partial(nn.Dense, use_bias=config.mlp_bias, param_dtype=self.param_dtype)
        act, width = FUNCTIONS[config.hidden_act], config.intermediate_size
        if config.gated:
            first, second = jnp.split(dense(2 * width, name="up")(x), 2, axis=-1)
            hidden = act(first) * second
        else:
            hidden = act(dense(width, name="up")(x))
        return dense(config.hidden_size, name="down")(hidden)


class Layer(nn.Module):
    """One encoder layer, `x -> (x, None)`; `has_norm` says whether attention has a norm, `which` picks one of several views."""

    config: BertConfig
    param_dtype: Any
    has_norm: bool

    @nn.compact
    def __call__(self, x, views, which):
        x = Attention(self.config, self.param_dtype, self.has_norm, name="attention")(x, *chosen(views, which))
        return MLP(self.config, self.param_dtype, name="mlp")(x), None


class Encoder(nn.Module):
    """All encoder layers, one by one or scanned but for those that differ, and where norms come first one after the last."""

    config: BertConfig
    param_dtype: Any
    scan_layers: bool
    remat: Remat | None

    @nn.compact
    def __call__(self, x, seen, positions):
        config, count = self.config, self.config.num_hidden_layers
        local = [i in config.local_layers for i in range(count)]
        views, which = self._views(seen, positions, sorted(set(local))), [sorted(set(local)).index(kind) for kind in local]
        layer = again(Layer, self.remat, self.scan_layers)
        first = config.apart if self.scan_layers else count
        for i in range(first):
            has_norm = i > 0 or not config.norm_first  # the embeddings have just been normalised
            x, _ = layer(config, self.param_dtype, has_norm, name=f"layer_{i}")(x, [views[which[i]]], None)
        if first < count:
            layers = scanned(layer, count - first, nn.broadcast, 0)(config, self.param_dtype, True, name="layers")
            x, _ = layers(x, views, jnp.asarray(which[first:]) if len(views) > 1 else None)
        return _norm(self, "norm")(x) if config.norm_first else x

    def _views(self, seen: jax.Array, positions: jax.Array, kinds: Sequence[bool]) -> list[Any]:
        """What is added to the scores in each kind of layer, global or local, and the cosines and sines of its positions."""
        config, places = self.config, np.arange(seen.shape[-1])
        near = np.abs(places[:, None] - places) <= (len(places) if config.window is None else config.window)
        thetas = [config.local_rope_theta if is_local else config.rope_theta for is_local in kinds]
        ropes = [None if theta is None else turns(Rope(theta), config.head_dim, positions) for theta in thetas]
        masks = jnp.broadcast_arrays(*(seen & near[None, None] if is_local else seen for is_local in kinds))
        return list(zip([jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min) for mask in masks], ropes))


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, as far as there are any, normalised: `(batch, length, hidden)`."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, input_ids, token_type_ids, positions):
        config = self.config
        size = config.embedding_size or config.hidden_size
        embed = functools.partial(nn.Embed, features=size, param_dtype=self.param_dtype)
        x = embed(config.vocab_size, name="word")(input_ids)
        if config.rope_theta is None:
            before = 0 if config.padding_id is None else config.padding_id + 1  # the rows before those of a text
            x = x + embed(config.max_position_embeddings + before, name="position")(positions)
        if config.type_vocab_size:
            x = x + embed(config.type_vocab_size, name="token_type")(token_type_ids)
        x = _norm(self, "norm")(x)
        if config.embedding_size is not None:
            x = nn.Dense(config.hidden_size, param_dtype=self.param_dtype, name="project")(x)
        return x


class Head(nn.Module):
    """A dense layer with an activation, a norm where there is one, and the last layer: `(batch, num_labels)`."""

    config: BertConfig
    param_dtype: Any
    act: str

    @nn.compact
    def __call__(self, x):
        config = self.config
        x = nn.Dense(config.hidden_size, config.head_bias, param_dtype=self.param_dtype, name="dense")(x)
        x = FUNCTIONS[self.act](x)
        x = _norm(self, "norm")(x) if config.head_norm else x
        return nn.Dense(config.num_labels, param_dtype=self.param_dtype, name="out_proj")(x)


class Bert(nn.Module):
    """An encoder with a classification head: `(batch, length)` token ids -> `(batch, num_labels)` logits.

    Without a head, for which `num_labels` is 0, it gives the pooled vectors, `(batch, hidden)`.

    Args:
      config: its sizes and parts.
      param_dtype: the dtype of the parameters, and of the computation but for attention weights.
      scan_layers: whether the layers' parameters are stacked, and scanned over.
      remat: what the backward pass computes again, as in `load`.

    >>> sizes = dict(vocab_size=8, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> model = Bert(BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, num_labels=3, **sizes))
    >>> ids = jnp.ones((2, 5), jnp.int32)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    >>> jax.eval_shape(model.apply, variables, ids).shape
    (2, 3)
    """

    config: BertConfig
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat | None = None

    @nn.compact
    def __call__(
        self, input_ids, attention_mask=None, token_type_ids=None, *, segment_ids=None, num_segments: int | None = None
    ):
        """The logits of each text.

        Args:
          input_ids: `(batch, length)`.
          attention_mask: `(batch, length)`: 0 for padding.
          token_type_ids: `(batch, length)`.
          segment_ids: `(batch, length)`: several texts in a row, packed: 1, 2, ... in order for the tokens of each, 0 for
            padding. Each text gets what it gets alone. A row may be longer than the model's positions, but none of its texts:
            it gets NaN where positions are learnt.
          num_segments: with `segment_ids`, the most texts of a row: the logits are `(batch, num_segments, num_labels)` then.
            Those of texts that a row lacks mean nothing, and texts beyond get none.

        Raises:
          InputError: a text is longer than the model's positions, or arguments do not go together.
        """
        config = self.config
        _check(config, input_ids, token_type_ids, packed=segment_ids is not None)
        _check_segments(input_ids, attention_mask, segment_ids, num_segments)
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
        seen = mask[:, None, None, :]
        if segment_ids is not None:
            seen = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & (segment_ids > 0)[:, None, None, :]
        types = jnp.zeros(input_ids.shape, jnp.int32) if token_type_ids is None else token_type_ids
        positions = _positions(input_ids, config.padding_id, segment_ids)
        x = Embeddings(config, self.param_dtype, name="embeddings")(input_ids, types, positions)
        x = Encoder(config, self.param_dtype, self.scan_layers, self.remat, name="encoder")(x, seen, positions)
        pooled = _pooled(x, config.pooling == "mean", mask, segment_ids, num_segments)
        if config.pooling == "pooler":
            pooled = jnp.tanh(nn.Dense(config.hidden_size, param_dtype=self.param_dtype, name="pooler")(pooled))
        if not config.num_labels:
            return _unit(pooled) if config.normalize else pooled
        if config.head_act is not None:
            return Head(config, self.param_dtype, config.head_act, name="classifier")(pooled)
        return nn.Dense(config.num_labels, param_dtype=self.param_dtype, name="classifier")(pooled)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _check(config: BertConfig, input_ids: jax.Array, token_type_ids: jax.Array | None, packed: bool) -> None:
    if input_ids.shape[-1] > config.max_position_embeddings and not packed:
        positions = config.max_position_embeddings
        raise InputError(f"input_ids has the shape {input_ids.shape}, but the model has {positions} positions: cut the texts")
    if token_type_ids is not None and not config.type_vocab_size:
        raise InputError(f"token_type_ids: a model of the type {config.model_type!r} has no token types: leave them out")


def _check_segments(input_ids: jax.Array, attention_mask: Any, segment_ids: Any, num_segments: Any) -> None:
    if segment_ids is None:
        if num_segments is not None:
            raise InputError("num_segments is for rows of several texts: give segment_ids, too, or leave it out")
        return
    if segment_ids.shape != input_ids.shape:
        raise InputError(f"segment_ids has the shape {segment_ids.shape}, but input_ids has {input_ids.shape}")
    if attention_mask is not None:
        raise InputError("attention_mask can't be given together with segment_ids, which are 0 for padding: leave it out")
    if isinstance(num_segments, bool) or not isinstance(num_segments, int) or num_segments < 1:
        raise InputError(f"num_segments must say how many texts a row with segment_ids has at most, not {num_segments!r}")


def _norm(module: Any, name: str) -> nn.LayerNorm:
    config = module.config
    options = {"use_bias": config.norm_bias, "param_dtype": module.param_dtype, "use_fast_variance": False}
    return nn.LayerNorm(config.layer_norm_eps, **options, name=name)


def _residual(module: Any, x: jax.Array, branch: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`x + branch(x)`, with a norm of x before the branch or of the sum."""
    if module.config.norm_first:
        return x + branch(_norm(module, "norm")(x))
    y = branch(x)
    return _norm(module, "norm")(x + y)


def _positions(input_ids: jax.Array, padding_id: int | None, segment_ids: jax.Array | None) -> jax.Array:
    """The position of each token, `(batch or 1, length)`: its place in its text or, with a padding id, its row of the table."""
    if padding_id is None:
        places = jnp.arange(input_ids.shape[-1])[None]
        return places if segment_ids is None else places - _before(jnp.broadcast_to(places, input_ids.shape), segment_ids)
    real = (input_ids != padding_id).astype(jnp.int32)
    count = jnp.cumsum(real, axis=-1)
    if segment_ids is not None:
        count = count - _before(count - real, segment_ids)
    return count * real + padding_id


def _before(count: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """What a count of the tokens before each, `(batch, length)`, was at the beginning of its segment."""
    begins = jnp.diff(segment_ids, prepend=segment_ids[:, :1]) != 0
    return lax.cummax(jnp.where(begins, count, 0), axis=1)


def _pooled(x: jax.Array, mean: bool, mask: jax.Array, segment_ids: jax.Array | None, num_segments: Any) -> jax.Array:
    """The mean or the first of the tokens of each row, `(batch, hidden)`, or of each segment, `(batch, segments, hidden)`."""
    if segment_ids is None:
        members, first = mask[:, None], x[:, :1]
    else:
        members = segment_ids[:, None, :] == jnp.arange(1, num_segments + 1)[None, :, None]
        first = jnp.take_along_axis(x, members.argmax(-1)[:, :, None], axis=1)
    weights = members.astype(x.dtype)
    means = jnp.einsum("bsl,blh->bsh", weights, x) / jnp.maximum(weights.sum(-1, keepdims=True), 1)
    pooled = means if mean else first
    return pooled[:, 0] if segment_ids is None else pooled


def _unit(x: jax.Array) -> jax.Array:
    """The rows scaled to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

"""Encoders of the BERT family with a classification head, as one Linen model: its configuration says which parts it has."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.models.encoder_config import ACTIVATIONS, BertConfig
from lora_jax.models.rotary import Rope, rotate, turns

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
        act, width = ACTIVATIONS[config.hidden_act], config.intermediate_size
        if config.gated:
            first, second = jnp.split(dense(2 * width, name="up")(x), 2, axis=-1)
            hidden = act(first) * second
        else:
            hidden = act(dense(width, name="up")(x))
        return dense(config.hidden_size, name="down")(hidden)


class Layer(nn.Module):
    """One encoder layer; `has_norm` says whether attention has a norm."""

    config: BertConfig
    param_dtype: Any
    has_norm: bool

    @nn.compact
    def __call__(self, x, bias, rotation):
        x = Attention(self.config, self.param_dtype, self.has_norm, name="attention")(x, bias, rotation)
        return MLP(self.config, self.param_dtype, name="mlp")(x)


class Encoder(nn.Module):
    """All encoder layers, and where norms come first one after the last."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x, mask):
        config = self.config
        kinds = {is_local: self._places(mask, is_local) for is_local in (False, True)}
        for i in range(config.num_hidden_layers):
            has_norm = i > 0 or not config.norm_first  # the embeddings have just been normalised
            layer = Layer(config, self.param_dtype, has_norm, name=f"layer_{i}")
            x = layer(x, *kinds[i in config.local_layers])
        return _norm(self, "norm")(x) if config.norm_first else x

    def _places(self, mask: jax.Array, is_local: bool) -> tuple[jax.Array, Any]:
        """What is added to the scores in a kind of layer, and the cosines and sines of its positions."""
        config, places = self.config, np.arange(mask.shape[1])
        seen = mask[:, None, None, :]
        if is_local and config.window is not None:
            seen = seen & (np.abs(places[:, None] - places) <= config.window)[None, None]
        theta = config.local_rope_theta if is_local else config.rope_theta
        rotation = None if theta is None else turns(Rope(theta), config.head_dim, jnp.asarray(places)[None])
        return jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min), rotation


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, as far as there are any, normalised: `(batch, length, hidden)`."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, input_ids, token_type_ids):
        config = self.config
        size = config.embedding_size or config.hidden_size
        embed = functools.partial(nn.Embed, features=size, param_dtype=self.param_dtype)
        x = embed(config.vocab_size, name="word")(input_ids)
        if config.rope_theta is None:
            first, positions = _positions(input_ids, config.padding_id)
            x = x + embed(config.max_position_embeddings + first, name="position")(positions)
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
        x = ACTIVATIONS[self.act](x)
        x = _norm(self, "norm")(x) if config.head_norm else x
        return nn.Dense(config.num_labels, param_dtype=self.param_dtype, name="out_proj")(x)


class Bert(nn.Module):
    """An encoder with a classification head: `(batch, length)` token ids -> `(batch, num_labels)` logits.

    Without a head, for which `num_labels` is 0, it gives the pooled vectors, `(batch, hidden)`.
    """

    config: BertConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        config = self.config
        _check(config, input_ids, token_type_ids)
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
        types = jnp.zeros(input_ids.shape, jnp.int32) if token_type_ids is None else token_type_ids
        x = Embeddings(config, self.param_dtype, name="embeddings")(input_ids, types)
        x = Encoder(config, self.param_dtype, name="encoder")(x, mask)
        if config.pooling == "mean":
            weights = mask.astype(x.dtype)
            pooled = jnp.einsum("bl,blh->bh", weights, x) / jnp.maximum(weights.sum(-1, keepdims=True), 1)
        else:
            pooled = x[:, 0]
        if config.pooling == "pooler":
            pooled = jnp.tanh(nn.Dense(config.hidden_size, param_dtype=self.param_dtype, name="pooler")(pooled))
        if not config.num_labels:
            return _unit(pooled) if config.normalize else pooled
        if config.head_act is not None:
            return Head(config, self.param_dtype, config.head_act, name="classifier")(pooled)
        return nn.Dense(config.num_labels, param_dtype=self.param_dtype, name="classifier")(pooled)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _check(config: BertConfig, input_ids: jax.Array, token_type_ids: jax.Array | None) -> None:
    if input_ids.shape[-1] > config.max_position_embeddings:
        positions = config.max_position_embeddings
        raise InputError(f"input_ids has the shape {input_ids.shape}, but the model has {positions} positions: cut the texts")
    if token_type_ids is not None and not config.type_vocab_size:
        raise InputError(f"token_type_ids: a model of the type {config.model_type!r} has no token types: leave them out")


def _norm(module: Any, name: str) -> nn.LayerNorm:
    config = module.config
    return nn.LayerNorm(config.layer_norm_eps, use_bias=config.norm_bias, param_dtype=module.param_dtype, name=name)


def _residual(module: Any, x: jax.Array, branch: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """`x + branch(x)`, with a norm of x before the branch or of the sum."""
    if module.config.norm_first:
        return x + branch(_norm(module, "norm")(x))
    y = branch(x)
    return _norm(module, "norm")(x + y)


def _positions(input_ids: jax.Array, padding_id: int | None) -> tuple[int, jax.Array]:
    """How many rows of the table come before those of a text, and the row of each token."""
    if padding_id is None:
        return 0, jnp.arange(input_ids.shape[-1])[None]
    real = (input_ids != padding_id).astype(jnp.int32)
    return padding_id + 1, jnp.cumsum(real, axis=-1) * real + padding_id


def _unit(x: jax.Array) -> jax.Array:
    """The rows scaled to length 1."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

"""Decoders of the Llama family as a Linen model, with an explicit key-value cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.core.errors import InputError
from lora_jax.models.decoder_config import LlamaConfig
from lora_jax.sharding import batch_sharding

# The kernels that a mesh axis `model` cuts, before a non-linearity by columns and after it by rows.
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"), ("o_proj", "down_proj", "embed_tokens")
Remat = Literal["full", "products"]
# What a layer keeps for its backward pass, where that is not everything; the rest is computed again.
REMAT: dict[str, Any] = {"full": None, "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "real", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens so far.

    Args:
      layers: for each layer its keys and values `(batch, max_length, kv_heads, head_dim)`; stacked along axis 0 when scanned.
      real: `(batch, max_length)`: which places hold a token that is not padding.
      length: how many places are taken.
    """

    layers: Any
    real: jax.Array
    length: jax.Array


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` in float32, times a scale."""

    eps: float
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = x.astype(jnp.float32)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def _rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + half) of each head by the angles `(batch, length, half)`."""
    cos, sin = (f(angles)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, block: int | None) -> jax.Array:
    """Causal attention `(batch, length, heads, head_dim)`, at most `block` queries at a time.

    A block reads the keys up to its last query only, and its scores are computed again in the backward pass: that costs a
    product of them once more, and saves those with the keys after it. The blocks are computed one after the other, in the
    backward pass too, as a compiler that is free to may hold the scores of all of them at once.
    """
    length = query.shape[1]
    if block is None or block >= length:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None)
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if mask is None else mask
    # Not to be merged with what the layer's own remat computes again, or the scores of all blocks would be kept.
    one = jax.checkpoint(lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask))
    ends = [(start, min(start + block, length)) for start in range(0, length, block)]
    parts: list[jax.Array] = []
    for i, j in ends:
        queries = query[:, i:j]
        if parts:
            queries, parts[-1] = lax.optimization_barrier((queries, parts[-1]))
        parts.append(one(queries, key[:, :j], value[:, :j], mask[:, :, i:j, :j]))
    return jnp.concatenate(parts, axis=1)


def _dense(name: str, features: int, use_bias: bool, param_dtype: Any, mesh: Any) -> nn.Dense:
    """A projection; on a mesh with its kernel whole along all axes but `model` where it is used."""
    product = None if mesh is None else functools.partial(_whole_product, NamedSharding(mesh, _along_model(name, mesh)))
    return nn.Dense(features, use_bias, param_dtype=param_dtype, name=name, dot_general=product)


def _along_model(name: str, mesh: Any) -> jax.P:
    if "model" not in mesh.shape:
        return jax.P()
    return jax.P(None, "model") if name in COLUMNS else jax.P("model")


def _keep_rows(x: jax.Array, mesh: Any) -> jax.Array:
    """x, and in the backward pass its cotangent, with its rows where a batch has them and all else as the compiler likes.

    Or it cuts some of a layer's backward pass as fsdp cuts the kernels and moves activations, which are larger than the codes.
    """
    if mesh is None:
        return x
    rows = (*batch_sharding(mesh).spec, None)[0]
    free = [jax.P.UNCONSTRAINED] * (x.ndim - 1)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P(rows, *free)))


def _whole_product(sharding: NamedSharding, x: jax.Array, kernel: jax.Array, *args: Any, **options: Any) -> jax.Array:
    return lax.dot_general(x, lax.with_sharding_constraint(kernel, sharding), *args, **options)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: `(batch, length, hidden)`."""

    config: LlamaConfig
    param_dtype: Any
    attention_block: int | None
    gather: Any

    @nn.compact
    def __call__(self, x, angles, mask, cache, start):
        config, keep = self.config, functools.partial(_keep_rows, mesh=self.gather)

        def heads(name, count):
            dense = _dense(name, count * config.head_dim, config.qkv_bias, self.param_dtype, self.gather)
            # Or a TPU's compiler lays out the kernels of all layers anew, for what the rotation below does with the heads.
            return lax.optimization_barrier(keep(dense(x))).reshape(*x.shape[:-1], count, config.head_dim)

        query = _rotate(heads("q_proj", config.num_attention_heads), angles)
        key = _rotate(heads("k_proj", config.num_key_value_heads), angles)
        value = heads("v_proj", config.num_key_value_heads)
        if cache is not None:
            key, value = cache = tuple(
                lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0)) for old, new in zip(cache, (key, value))
            )
        mixed = _attend(query, key, value, mask, self.attention_block if cache is None else None)
        out = _dense("o_proj", config.hidden_size, config.output_bias, self.param_dtype, self.gather)
        return out(keep(mixed.reshape(*x.shape[:-1], -1))), cache


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`: `(batch, length, hidden)`."""

    config: LlamaConfig
    param_dtype: Any
    gather: Any

    @nn.compact
    def __call__(self, x):
        config, keep = self.config, functools.partial(_keep_rows, mesh=self.gather)
        dense = functools.partial(_dense, use_bias=config.mlp_bias, param_dtype=self.param_dtype, mesh=self.gather)
        hidden = nn.silu(keep(dense("gate_proj", config.intermediate_size)(x)))
        hidden = hidden * keep(dense("up_proj", config.intermediate_size)(x))
        return dense("down_proj", config.hidden_size)(keep(hidden))


class Layer(nn.Module):
    """One decoder layer, `x -> (x, cache)`; `which` picks its mask where the layers have several."""

    config: LlamaConfig
    param_dtype: Any
    attention_block: int | None
    activations: Any
    gather: Any

    @nn.compact
    def __call__(self, x, angles, masks, which, cache, start):
        norm = functools.partial(RMSNorm, self.config.rms_norm_eps, self.param_dtype)
        mask = masks[0] if which is None else jnp.stack(masks)[which]
        mixed, cache = Attention(self.config, self.param_dtype, self.attention_block, self.gather, name="self_attn")(
            norm(name="input_layernorm")(x), angles, mask, cache, start
        )
        x = x + mixed
        x = x + MLP(self.config, self.param_dtype, self.gather, name="mlp")(norm(name="post_attention_layernorm")(x))
        return _constrain(x, self.activations), cache


def _constrain(x: jax.Array, sharding: Any) -> jax.Array:
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


class Llama(nn.Module):
    """A decoder with a language-model head: `(batch, length)` token ids -> `(batch, length, vocab)` logits.

    Args of a call:
      input_ids: `(batch, length)`.
      attention_mask: `(batch, length)`: 0 for padding, on the left or the right. The logits of padding mean nothing.
      segment_ids: `(batch, length)`: tokens see only tokens of the same id, so that packed documents stay apart.
      positions: `(batch, length)`; without them they count what is not padding, and start again with each segment.
      cache: a `Cache` to continue; the result is `(logits, cache)` then. Once it is full, the logits are NaN.
      last_only: logits for the last token of each row only, `(batch, 1, vocab)`.
      hidden: in place of the logits, what the head makes them of, `(batch, length, hidden)`.

    `activations` is where the hidden states stay on a mesh, as `sharding.batch_sharding` says: left to itself the compiler may
    keep all rows on every device and cut their width, as an fsdp axis cuts the embedding, and then adds up each product.
    `gather` is a mesh along all of whose axes but `model` each kernel of the layers is made whole where it is used: quantised
    ones then move as what they are made of, and rows stay where they are.
    """

    config: LlamaConfig
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat | None = None
    attention_block: int | None = None
    activations: Any = None
    gather: Any = None

    @nn.compact
    def __call__(
        self,
        input_ids,
        attention_mask=None,
        *,
        segment_ids=None,
        positions=None,
        cache: Cache | None = None,
        last_only=False,
        hidden=False,
    ):
        config = self.config
        for name, array in (("attention_mask", attention_mask), ("segment_ids", segment_ids), ("positions", positions)):
            if array is not None and array.shape != input_ids.shape:
                raise InputError(f"{name} has the shape {array.shape}, but input_ids has {input_ids.shape}")
        if cache is not None and segment_ids is not None:
            raise InputError("segment_ids can't be given together with a cache: decode packed documents apart")
        real = None if attention_mask is None else jnp.asarray(attention_mask, bool)
        if positions is None:
            positions = _positions(input_ids.shape, real, segment_ids, cache)
        angles = positions[:, :, None].astype(jnp.float32) * config.frequencies()[None, None, :]
        start = None if cache is None else cache.length
        if cache is not None:
            cache = _extend(cache, input_ids.shape, real)
        masks = [_mask(input_ids.shape[1], window, real, segment_ids, cache, start) for window in self._distinct()]
        embed = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=self.param_dtype, name="embed_tokens")
        x = _constrain(embed(input_ids), self.activations)
        x, layers = self._layers(x, angles, masks, None if cache is None else cache.layers, start)
        x = RMSNorm(config.rms_norm_eps, self.param_dtype, name="norm")(x[:, -1:] if last_only else x)
        if hidden:
            logits = x
        elif config.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(config.vocab_size, use_bias=False, param_dtype=self.param_dtype, name="lm_head")(x)
        if cache is None:
            return logits
        overrun = cache.length > cache.real.shape[1]
        return jnp.where(overrun, jnp.full_like(logits, jnp.nan), logits), dataclasses.replace(cache, layers=layers)

    def _distinct(self) -> list[int | None]:
        """The windows that occur."""
        return sorted(set(self.config.windows), key=lambda window: window or 0)

    def _layers(self, x, angles, masks, caches, start):
        """All layers, one by one or scanned."""
        which = [self._distinct().index(window) for window in self.config.windows]
        layer: Any = Layer
        options = self.config, self.param_dtype, self.attention_block, self.activations, self.gather
        if self.remat:
            layer = nn.remat(Layer, prevent_cse=not self.scan_layers, policy=REMAT[self.remat])
        if self.scan_layers:
            several = jnp.asarray(which) if len(masks) > 1 else None
            masks = _explicit(masks, x.shape[1]) if len(masks) > 1 else masks
            axes: Any = (nn.broadcast, nn.broadcast, 0, 0, nn.broadcast)
            scanned = nn.scan(
                layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.config.num_hidden_layers,
                in_axes=axes,
            )  # fmt: skip
            layers = scanned(*options, name="layers")
            return layers(x, angles, masks, several, caches, start)
        moved = []
        for i, choice in enumerate(which):
            own = None if caches is None else caches[i]
            made = layer(*options, name=f"layer_{i}")
            x, own = made(x, angles, [masks[choice]], None, own, start)
            moved.append(own)
        return x, moved


def _positions(shape: tuple[int, ...], real: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None) -> jax.Array:
    index = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    if segment_ids is not None:
        new = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return index - lax.cummax(jnp.where(new, index, 0), axis=1)
    if real is not None:
        index = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    return index if cache is None else index + cache.real.sum(1, keepdims=True)


def _extend(cache: Cache, shape: tuple[int, ...], real: jax.Array | None) -> Cache:
    """The cache with places taken for new tokens, which the layers fill."""
    if shape[1] > cache.real.shape[1]:
        raise InputError(f"input_ids has {shape[1]} tokens a row, but the cache has room for {cache.real.shape[1]}")
    new = jnp.ones(shape, bool) if real is None else real
    taken = lax.dynamic_update_slice(cache.real, new, (0, cache.length))
    return dataclasses.replace(cache, real=taken, length=cache.length + shape[1])


def _mask(
    length: int,
    window: int | None,
    real: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    start: Any,
) -> jax.Array | None:
    """Which keys each query sees, `(batch or 1, 1, queries, keys)`; `None`: all up to itself."""
    if window is None and real is None and segment_ids is None and cache is None:
        return None
    queries = jnp.arange(length)[:, None]
    if cache is not None:
        real, queries = cache.real, queries + start
    keys = jnp.arange(length if cache is None else cache.real.shape[1])[None, :]
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    seen = seen[None, None]
    if real is not None:
        seen = seen & real[:, None, None, :]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    return seen


def _explicit(masks: Sequence[jax.Array | None], length: int) -> list[jax.Array]:
    """The masks of layers that differ, all as arrays of one shape."""
    plain = jnp.tril(jnp.ones((1, 1, length, length), bool))
    return [plain if mask is None else mask for mask in masks]


def init_cache(model: Llama, batch: int, max_length: int, dtype: Any = None) -> Cache:
    """An empty cache for `batch` rows of at most `max_length` tokens, padding included."""
    config = model.config
    shape = batch, max_length, config.num_key_value_heads, config.head_dim

    def zeros(*leading: int) -> tuple[jax.Array, ...]:
        return (jnp.zeros((*leading, *shape), dtype or model.param_dtype),) * 2

    count = config.num_hidden_layers
    layers = zeros(count) if model.scan_layers else [zeros() for _ in range(count)]
    return Cache(layers, jnp.zeros((batch, max_length), bool), jnp.int32(0))

"""Decoders as one Linen model of parts that `DecoderConfig` chooses, with an explicit key-value cache."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.experts import MixtureOfExperts
from lora_jax.models.rotary import rotate, turns
from lora_jax.models.stacking import Remat, again, chosen, scanned
from lora_jax.sharding import batch_sharding

# The kernels that a mesh axis `model` cuts, before a non-linearity by columns and after it by rows.
COLUMNS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "lm_head")
ROWS = ("o_proj", "down_proj", "embed_tokens")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers", "real", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """The keys and values of the tokens so far.

    Args:
      layers: for each layer its keys and values `(batch, max_length, kv_heads, head_dim)`; stacked along axis 0 when scanned.
      real: `(batch, max_length)`: which places hold a token that is not padding.
      length: how many places are taken, a scalar.

    >>> cache = Cache([(jnp.zeros((1, 8, 1, 2)),) * 2], jnp.zeros((1, 8), bool), jnp.int32(0))  # as `init_cache` makes it
    >>> cache.real.shape, int(cache.length)
    ((1, 8), 0)
    """

    layers: Any
    real: jax.Array
    length: jax.Array


# Where a layer's norms stand, by their names: before and after attention, before and after the MLP.
NORMS: dict[str, tuple[str | None, ...]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


class Norm(nn.Module):
    """`x / sqrt(mean(x^2) + eps)` times a scale, rounded once; LayerNorm takes off the mean first and adds a bias."""

    config: DecoderConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        kind, shape = self.config.norm, (x.shape[-1],)
        init = nn.initializers.zeros if kind == "offset" else nn.initializers.ones
        scale = self.param("scale", init, shape, self.param_dtype)
        wide = x.astype(jnp.float32)
        along_last = lambda vector: vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        if kind == "layer":
            wide = wide - wide.mean(-1, keepdims=True)
        normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.config.rms_norm_eps)
        normed = normed * along_last(1 + scale.astype(jnp.float32) if kind == "offset" else scale)
        if kind == "layer":
            normed = normed + along_last(self.param("bias", nn.initializers.zeros, shape, self.param_dtype))
        return normed.astype(x.dtype)


def _attend(query, key, value, mask: jax.Array | None, block: int | None, product: Any) -> jax.Array:
    """Causal attention `(batch, length, heads, head_dim)`, at most `block` queries at a time, each by `product`.

    A block reads the keys up to its last query only, and its scores are computed again in the backward pass: that costs a
    product of them once more, and saves those with the keys after it. The blocks are computed one after the other, in the
    backward pass too, as a compiler that is free to may hold the scores of all of them at once.
    """
    length = query.shape[1]
    if block is None or block >= length:
        return product(query, key, value, mask)
    mask = jnp.tril(jnp.ones((1, 1, length, length), bool)) if mask is None else mask
    # Not to be merged with what the layer's own remat computes again, or the scores of all blocks would be kept.
    one = jax.checkpoint(product)
    ends = [(start, min(start + block, length)) for start in range(0, length, block)]
    parts: list[jax.Array] = []
    for i, j in ends:
        queries = query[:, i:j]
        if parts:
            queries, parts[-1] = lax.optimization_barrier((queries, parts[-1]))
        parts.append(one(queries, key[:, :j], value[:, :j], mask[:, :, i:j, :j]))
    return jnp.concatenate(parts, axis=1)


def _plain_attention(scale: float | None, query, key, value, mask) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=mask is None, scale=scale)


def _attention(scale: float | None, cap: float | None, sinks: Any, query, key, value, mask) -> jax.Array:
    """Attention whose scores are capped, or share their softmax with each head's sink `(heads,)`."""
    batch, queries, heads, size = query.shape
    keys, groups = key.shape[1:3]
    grouped = query.reshape(batch, queries, groups, heads // groups, size)
    scores = jnp.einsum("bqgnd,bkgd->bgnqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * (size**-0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    mask = jnp.tril(jnp.ones((1, 1, queries, keys), bool)) if mask is None else mask
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(scores.dtype).reshape(1, groups, -1, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :keys].astype(value.dtype)
    return jnp.einsum("bgnqk,bkgd->bqgnd", weights, value).reshape(query.shape)


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
    """Causal grouped-query attention: `(batch, length, hidden)`."""

    config: DecoderConfig
    param_dtype: Any
    attention_block: int | None
    gather: Any

    @nn.compact
    def __call__(self, x, rotation, mask, cache, start):
        config = self.config
        query, key, value = self._heads(x)
        if not config.learnt_positions:
            query, key = (rotate(part, *rotation) for part in (query, key))
        if cache is not None:
            key, value = cache = tuple(
                lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start, 0, 0)) for old, new in zip(cache, (key, value))
            )
        sinks = None
        if config.sinks:
            sinks = self.param("sinks", nn.initializers.normal(0.02), (config.num_attention_heads,), self.param_dtype)
        product = functools.partial(_plain_attention, config.query_scale)
        if config.sinks or config.attention_cap is not None:
            product = functools.partial(_attention, config.query_scale, config.attention_cap, sinks)
        mixed = _attend(query, key, value, mask, self.attention_block if cache is None else None, product)
        out = _dense("o_proj", config.hidden_size, config.output_bias, self.param_dtype, self.gather)
        return out(_keep_rows(mixed.reshape(*x.shape[:-1], -1), self.gather)), cache

    def _heads(self, x):
        """The queries, keys and values `(batch, length, heads, head_dim)`, with their norms."""
        config, size = self.config, self.config.head_dim
        counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        if config.fused is None:
            parts = [self._project(name, count * size, x) for name, count in zip(("q_proj", "k_proj", "v_proj"), counts)]
        else:
            joined = self._project("qkv_proj", sum(counts) * size, x)
            if config.fused == "heads":
                joined = jnp.moveaxis(joined.reshape(*x.shape[:-1], -1, 3, size), -2, -3).reshape(joined.shape)
            parts = jnp.split(joined, [counts[0] * size, (counts[0] + counts[1]) * size], axis=-1)
        norms = [] if config.qk_norm is None else [Norm(config, self.param_dtype, name=name) for name in ("q_norm", "k_norm")]
        for i, norm in enumerate(norms):
            shape = (*x.shape[:-1], -1, size if config.qk_norm == "heads" else counts[i] * size)
            parts[i] = norm(parts[i].reshape(shape))
        return [part.reshape(*x.shape[:-1], -1, size) for part in parts]

    def _project(self, name, features, x):
        projected = _dense(name, features, self.config.qkv_bias, self.param_dtype, self.gather)(x)
        # Or a TPU's compiler lays out the kernels of all layers anew, for what the rotation does with the heads.
        return lax.optimization_barrier(_keep_rows(projected, self.gather))


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or without a gate `down(act(up(x)))`: `(batch, length, hidden)`."""

    config: DecoderConfig
    param_dtype: Any
    gather: Any

    @nn.compact
    def __call__(self, x):
        config, act = self.config, FUNCTIONS[self.config.activation]
        dense = functools.partial(_dense, use_bias=config.mlp_bias, param_dtype=self.param_dtype, mesh=self.gather)
        project = lambda name, parts: _keep_rows(dense(name, parts * config.intermediate_size)(x), self.gather)
        if not config.gated:
            hidden = act(project("up_proj", 1))
        elif config.fused is not None:
            gate, up = jnp.split(project("gate_up_proj", 2), 2, axis=-1)
            hidden = act(gate) * up
        else:
            hidden = act(project("gate_proj", 1))
            hidden = hidden * project("up_proj", 1)
        return dense("down_proj", config.hidden_size)(_keep_rows(hidden, self.gather))


class Layer(nn.Module):
    """One decoder layer, `x -> (x, (cache, router's logits))`; `which` picks its view where the layers have several."""

    config: DecoderConfig
    param_dtype: Any
    attention_block: int | None
    activations: Any
    gather: Any
    has_experts: bool
    dense_experts: bool

    @nn.compact
    def __call__(self, x, views, which, cache, start):
        config = self.config
        rotation, mask = chosen(views, which)
        mix = Attention(config, self.param_dtype, self.attention_block, self.gather, name="self_attn")
        before, after, before_mlp, after_mlp = NORMS[config.norms]
        mixed, cache = mix(self._norm(before, x), rotation, mask, cache, start)
        mixed = _scaled(self._norm(after, mixed), config.residual_scale)
        x, seen = x + mixed, x if config.parallel else x + mixed
        moved, routed = self._mlp(self._norm(before_mlp, seen))
        x = x + _scaled(self._norm(after_mlp, moved), config.residual_scale)
        return _constrain(x, self.activations), (cache, routed)

    def _norm(self, name, x):
        return x if name is None else Norm(self.config, self.param_dtype, name=name)(x)

    def _mlp(self, x):
        if not self.has_experts:
            return MLP(self.config, self.param_dtype, self.gather, name="mlp")(x), None
        act = FUNCTIONS[self.config.activation]
        experts: Any = self.config.experts
        options = self.param_dtype, self.dense_experts, self.activations
        return MixtureOfExperts(experts, act, *options, name="mlp")(x)


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def _constrain(x: jax.Array, sharding: Any) -> jax.Array:
    return x if sharding is None else lax.with_sharding_constraint(x, sharding)


class Decoder(nn.Module):
    """A decoder with a language-model head: `(batch, length)` token ids -> `(batch, length, vocab)` logits.

    Args:
      config: its sizes and parts.
      param_dtype: the dtype of the parameters, and of the computation but for norms and attention weights.
      scan_layers: whether the layers' parameters are stacked, and scanned over.
      remat: what the backward pass computes again, as in `load`.
      attention_block: the attention of at most so many queries at a time, as in `load`.
      activations: where the hidden states stay on a mesh, as `sharding.batch_sharding` says: left to itself the compiler may
        keep all rows on every device and cut their width, as an fsdp axis cuts the embedding, and then adds up each product.
      gather: a mesh along all of whose axes but `model` each kernel of the layers is made whole where it is used: quantised
        ones then move as what they are made of, and rows stay where they are.
      dense_experts: whether every expert sees every token, which pays off where they are few.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> model = Decoder(DecoderConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes))
    >>> ids = jnp.ones((2, 5), jnp.int32)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), ids)
    >>> jax.eval_shape(model.apply, variables, ids).shape
    (2, 5, 8)
    """

    config: DecoderConfig
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat | None = None
    attention_block: int | None = None
    activations: Any = None
    gather: Any = None
    dense_experts: bool = False

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
        routing=False,
    ):
        """The logits, or what else is asked for.

        Args:
          input_ids: `(batch, length)`.
          attention_mask: `(batch, length)`: 0 for padding, on the left or the right. The logits of padding mean nothing.
          segment_ids: `(batch, length)`: tokens see only tokens of the same id, so that packed documents stay apart.
          positions: `(batch, length)`; without them they count what is not padding, and start again with each segment.
          cache: a `Cache` to continue; the result is `(logits, cache)` then. Once it is full, the logits are NaN.
          last_only: logits for the last token of each row only, `(batch, 1, vocab)`.
          hidden: in place of the logits, what the head makes them of, `(batch, length, hidden)`.
          routing: with the result, as a pair, the logits of the routers: `(layers with experts, batch, length, experts)`.

        Raises:
          InputError: the shapes do not go together, or options do not.
        """
        config = self.config
        for name, array in (("attention_mask", attention_mask), ("segment_ids", segment_ids), ("positions", positions)):
            if array is not None and array.shape != input_ids.shape:
                raise InputError(f"{name} has the shape {array.shape}, but input_ids has {input_ids.shape}")
        if cache is not None and segment_ids is not None:
            raise InputError("segment_ids can't be given together with a cache: decode packed documents apart")
        real = None if attention_mask is None else jnp.asarray(attention_mask, bool)
        if positions is None:
            positions = _positions(input_ids.shape, real, segment_ids, cache)
        start = None if cache is None else cache.length
        if cache is not None:
            cache = _extend(cache, input_ids.shape, real)
        views = [
            (turns(rope, config.rotated, positions), _mask(input_ids.shape[1], window, real, segment_ids, cache, start))
            for rope, window in self._distinct()
        ]
        embed = nn.Embed(config.vocab_size, config.hidden_size, param_dtype=self.param_dtype, name="embed_tokens")
        x = _scaled(embed(input_ids), config.embedding_scale)
        if config.learnt_positions:
            sizes = config.max_position_embeddings, config.hidden_size
            x = x + nn.Embed(*sizes, param_dtype=self.param_dtype, name="embed_positions")(positions)
        x = _constrain(x, self.activations)
        x, (layers, routed) = self._layers(x, views, None if cache is None else cache.layers, start)
        x = Norm(config, self.param_dtype, name="norm")(x[:, -1:] if last_only else x)
        logits = x if hidden else self._head(embed, x)
        if cache is not None:
            overrun = cache.length > cache.real.shape[1]
            logits = jnp.where(overrun, jnp.full_like(logits, jnp.nan), logits)
            return logits, dataclasses.replace(cache, layers=layers)
        return (logits, jnp.stack(routed)) if routing else logits

    def _head(self, embed, x):
        config = self.config
        if config.tie_word_embeddings:
            logits = embed.attend(x)
        else:
            logits = nn.Dense(config.vocab_size, use_bias=False, param_dtype=self.param_dtype, name="lm_head")(x)
        return shaped_logits(config, logits)

    def _distinct(self) -> list[Any]:
        """The (rotation, window) pairs that occur, in the order of the layers."""
        return list(dict.fromkeys(zip(self.config.ropes, self.config.windows)))

    def _layers(self, x, views, caches, start):
        """All layers, one by one or scanned."""
        config, layer = self.config, again(Layer, self.remat, self.scan_layers)
        which = [self._distinct().index(view) for view in zip(config.ropes, config.windows)]
        options = config, self.param_dtype, self.attention_block, self.activations, self.gather
        if self.scan_layers:
            several = jnp.asarray(which) if len(views) > 1 else None
            views = _explicit(views, x.shape[1]) if len(views) > 1 else views
            stacked = scanned(layer, config.num_hidden_layers, nn.broadcast, 0, 0, nn.broadcast)
            layers = stacked(*options, config.has_experts[0], self.dense_experts, name="layers")
            return layers(x, views, several, caches, start)
        moved, routed = [], []
        for i, choice in enumerate(which):
            own = None if caches is None else caches[i]
            made: Any = layer(*options, config.has_experts[i], self.dense_experts, name=f"layer_{i}")
            x, (own, logits) = made(x, [views[choice]], None, own, start)
            moved.append(own)
            routed += [] if logits is None else [logits]
        return x, (moved, routed)


def shaped_logits(config: DecoderConfig, logits: jax.Array) -> jax.Array:
    """Logits as the family scales and caps them."""
    logits = _scaled(logits, config.logit_scale)
    return logits if config.logit_cap is None else config.logit_cap * jnp.tanh(logits / config.logit_cap)


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


def _explicit(views: Sequence[Any], length: int) -> list[Any]:
    """The views of layers that differ, with masks that are all arrays of one shape."""
    plain = jnp.tril(jnp.ones((1, 1, length, length), bool))
    masks = jnp.broadcast_arrays(*(plain if mask is None else mask for _, mask in views))
    return [(rotation, mask) for (rotation, _), mask in zip(views, masks)]


def init_cache(model: Decoder, batch: int, max_length: int, dtype: Any = None) -> Cache:
    """An empty cache for `batch` rows of at most `max_length` tokens, padding included."""
    config = model.config
    shape = batch, max_length, config.num_key_value_heads, config.head_dim

    def zeros(*leading: int) -> tuple[jax.Array, ...]:
        return (jnp.zeros((*leading, *shape), dtype or model.param_dtype),) * 2

    count = config.num_hidden_layers
    layers = zeros(count) if model.scan_layers else [zeros() for _ in range(count)]
    return Cache(layers, jnp.zeros((batch, max_length), bool), jnp.int32(0))

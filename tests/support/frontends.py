"""The models of the contract table: each builds (fn, variables, args) in a dtype, small, and with sizes chosen so that no
activation has the shape of a kernel."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax as lj


@dataclasses.dataclass
class Case:
    """A function of parameters and inputs, and what to adapt.

    `shared`: whether JAX itself can vmap it over the inputs alone (it can't a ragged product with a shared kernel).
    """

    fn: Callable[..., Any]
    variables: Any
    args: tuple[Any, ...]
    config: lj.LoraConfig
    shared: bool = True


FRONTENDS: dict[str, Callable[[Any], Case]] = {}


def frontend(build: Callable[[Any], Case]) -> Callable[[Any], Case]:
    FRONTENDS[build.__name__] = build
    return build


def config(targets: Any = "all-linear", alpha: float = 5, **options: Any) -> lj.LoraConfig:
    return lj.LoraConfig(rank=3, alpha=alpha, targets=targets, **options)


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal numbers, drawn by NumPy: JAX would compile a program for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def params(dtype: Any, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Random parameters of standard deviation 1/sqrt(the last axis but one), so that activations stay near 1."""
    deviation = lambda s: np.sqrt(s[-2] if len(s) > 1 else s[0])
    draw = lambda seed, s: np.random.default_rng(seed).normal(size=s) / deviation(s)
    return {k: jnp.asarray(draw(i + 1, s).astype(dtype)) for i, (k, s) in enumerate(shapes.items())}


def weights(shapes: Any, dtype: Any) -> Any:
    """Random parameters for a tree of shapes: small ones, and scales near 1."""

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=leaf.shape)
        if leaf.ndim > 1:
            values = values / np.sqrt(leaf.shape[-1 if "embedding" in name else -2])
        else:
            values = values / 10 + ("scale" in name)
        return jnp.asarray(values.astype(dtype))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def linen(module: nn.Module, *args: Any, dtype: Any, config: lj.LoraConfig) -> Case:
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return Case(module.apply, weights(shapes, dtype), args, config)


@frontend
def plain_function(dtype: Any) -> Case:
    def fn(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ p["up"] * 0.5 + p["bias"][None])
        return h @ (p["down"] / 2.0)

    return Case(fn, params(dtype, up=(7, 11), bias=(11,), down=(11, 5)), (normal(9, 4, 7, dtype=dtype),), config())


@frontend
def linen_mlp(dtype: Any) -> Case:
    model = nn.Sequential([nn.Dense(17, dtype=dtype), nn.gelu, nn.LayerNorm(dtype=dtype), nn.Dense(6, dtype=dtype)])
    return linen(model, normal(1, 3, 10, dtype=dtype), dtype=dtype, config=config())


@frontend
def linen_attention(dtype: Any) -> Case:
    model = nn.MultiHeadDotProductAttention(num_heads=4, qkv_features=20, out_features=14, dtype=dtype)
    return linen(model, normal(1, 2, 6, 14, dtype=dtype), dtype=dtype, config=config(["query", "key", "value", "out"]))


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.Dense(19, dtype=self.dtype, name="up")(h)
        return x + nn.Dense(12, dtype=self.dtype, name="down")(nn.gelu(h)), None


class Stack(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.remat(Block, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return layers(self.dtype, name="layers")(x, None)[0]


@frontend
def linen_scan_remat(dtype: Any) -> Case:
    return linen(Stack(dtype), normal(1, 3, 5, 12, dtype=dtype), dtype=dtype, config=config())


@frontend
def linen_scan_some_layers(dtype: Any) -> Case:
    return linen(Stack(dtype), normal(1, 3, 5, 12, dtype=dtype), dtype=dtype, config=config(layers=[0, 2]))


class Tied(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        embed = nn.Embed(23, 10, dtype=self.dtype, name="embed")
        x = nn.tanh(nn.Dense(10, dtype=self.dtype, name="mix")(embed(ids)))
        return embed.attend(x)


@frontend
def linen_tied_embedding(dtype: Any) -> Case:
    ids = jnp.array([[1, 4, 22], [0, 4, 7]])
    return linen(Tied(dtype), ids, dtype=dtype, config=config(["embed", "mix"]))


@frontend
def conv_1d(dtype: Any) -> Case:
    model = nn.Sequential([
        nn.Conv(8, (3,), strides=2, padding=1, dtype=dtype), nn.relu,
        nn.Conv(12, (4,), padding="SAME", feature_group_count=4, kernel_dilation=2, dtype=dtype),
    ])  # fmt: skip
    return linen(model, normal(1, 2, 15, 6, dtype=dtype), dtype=dtype, config=config(rank_pattern={"kernel": 2}))


@frontend
def conv_2d(dtype: Any) -> Case:
    model = nn.Sequential([
        nn.Conv(8, (3, 2), strides=(2, 1), padding="VALID", dtype=dtype), nn.relu,
        nn.Conv(10, (2, 2), padding=((1, 0), (0, 1)), feature_group_count=2, dtype=dtype),
        nn.ConvTranspose(7, (3, 3), strides=(2, 2), dtype=dtype),
    ])  # fmt: skip
    return linen(model, normal(1, 2, 9, 8, 4, dtype=dtype), dtype=dtype, config=config())


@frontend
def gemma_einsum(dtype: Any) -> Case:
    """(N, D, H) query, (2, K, D, H) keys and values, (N, H, D) output."""

    def fn(p: Any, x: Any) -> Any:
        q = jnp.einsum("btd,ndh->btnh", x, p["q"])
        k, v = jnp.einsum("btd,ckdh->cbtkh", x, p["kv"])
        groups = q.reshape(*q.shape[:2], 2, 2, q.shape[-1])
        weights = jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", groups, k))
        mixed = jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
        return jnp.einsum("btnh,nhd->btd", mixed, p["o"])

    variables = params(dtype, q=(4, 13, 6), kv=(2, 2, 13, 6), o=(4, 6, 13))
    return Case(fn, variables, (normal(8, 2, 5, 13, dtype=dtype),), config())


@frontend
def transposed_kernel(dtype: Any) -> Case:
    def fn(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["up"].T) @ jnp.swapaxes(p["down"].astype(dtype), 0, 1)

    return Case(fn, params(dtype, up=(11, 7), down=(5, 11)), (normal(9, 4, 7, dtype=dtype),), config())


@frontend
def experts_einsum(dtype: Any) -> Case:
    def fn(p: Any, x: Any) -> Any:
        gate = jax.nn.softmax(x @ p["router"])
        h = jax.nn.gelu(jnp.einsum("td,edf->etf", x, p["up"]))
        return jnp.einsum("te,etf,efd->td", gate, h, p["down"])

    variables = params(dtype, router=(8, 4), up=(4, 8, 11), down=(4, 11, 8))
    return Case(fn, variables, (normal(9, 6, 8, dtype=dtype),), config(["up", "down"], batch_axes={"up": [0], "down": [0]}))


@frontend
def experts_ragged(dtype: Any) -> Case:
    def fn(p: Any, x: Any, sizes: Any) -> Any:
        h = jax.nn.gelu(jax.lax.ragged_dot(x, p["up"], sizes))
        return jax.lax.ragged_dot(h, jnp.swapaxes(p["down"], 1, 2), sizes)

    variables = params(dtype, up=(4, 8, 11), down=(4, 8, 11))
    return Case(fn, variables, (normal(9, 9, 8, dtype=dtype), jnp.array([3, 0, 4, 2])), config(), shared=False)


@frontend
def experts_gathered(dtype: Any) -> Case:
    """Each token picks its expert's matrix out of the stack; another one is sliced out."""

    def fn(p: Any, x: Any) -> Any:
        chosen = p["experts"][jnp.array([1, 1, 3, 0, 2, 3])]
        shared = jax.lax.dynamic_index_in_dim(p["shared"], jnp.int32(1), keepdims=False)
        return jnp.einsum("ti,tio->to", x, chosen) + x @ shared + x @ p["shared"][0]

    variables = params(dtype, experts=(4, 8, 11), shared=(2, 8, 11))
    return Case(fn, variables, (normal(9, 6, 8, dtype=dtype),), config())


@frontend
def moved_about(dtype: Any) -> Case:
    """Reshape, split, concatenate, stack, reverse, pad, scale and sum on the way to the product."""

    def fn(p: Any, x: Any) -> Any:
        q, k = jnp.split(p["qk"].reshape(8, 6, 5), [2], axis=1)
        joint = jnp.concatenate([q.reshape(8, 10), -p["v"][::-1]], axis=1)
        pair = jnp.stack([p["v"], p["w"] * 2.0])
        y = jnp.einsum("ti,sio->tso", x, pair)
        tall = jnp.concatenate([p["v"], p["w"]], axis=0)
        z = jnp.concatenate([x, x], axis=1) @ tall
        padded = x @ jnp.pad(p["v"], ((0, 0), (1, 2)), constant_values=0.5)
        heads, mean = jnp.einsum("ti,inh->tnh", x, k).reshape(6, -1), x @ p["taps"].mean(1)
        return jnp.concatenate([x @ joint, y.reshape(6, -1), z, padded, heads, mean], axis=1)

    variables = params(dtype, qk=(8, 30), v=(8, 7), w=(8, 7), taps=(8, 3, 5))
    return Case(fn, variables, (normal(9, 6, 8, dtype=dtype),), config())


@frontend
def scaled_along_axes(dtype: Any) -> Case:
    """Weights that arrays scale, or masks cut, along in axes, out axes or a stack."""

    def fn(p: Any, x: Any) -> Any:
        outs, keep = 2 + jnp.arange(7, dtype=dtype), jnp.arange(8) % 3 > 0
        y = x @ (p["w"] * outs[None] / p["gain"][:, None])
        z = x @ jnp.where(keep[:, None], jnp.broadcast_to(jnp.tanh(x.mean(0))[:, None], (8, 7)) * p["v"], 0.5)
        heads = jnp.einsum("ti,inh->tnh", x, p["heads"] * p["head_gain"]).reshape(6, -1)
        shrink = 1 / (1 + jnp.arange(16, dtype=dtype)).reshape(2, 1, 8)
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"] * shrink)
        taps = p["taps"] * outs[None, None, :5] * (1 + jnp.arange(3, dtype=dtype))[:, None, None]
        conv = jax.lax.conv_general_dilated(x[None], taps, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return jnp.concatenate([y, z, heads, x, conv[0]], axis=1)

    shapes = {"w": (8, 7), "gain": (8,), "v": (8, 7), "heads": (8, 2, 5), "head_gain": (1, 2, 5), "stack": (2, 8, 8)}
    return Case(fn, params(dtype, taps=(3, 8, 5), **shapes), (normal(9, 6, 8, dtype=dtype),), config())


@frontend
def control_flow(dtype: Any) -> Case:
    """cond, while, a scan that carries its weight, and jit, each around the product."""

    def fn(p: Any, x: Any) -> Any:
        x = jax.lax.cond(x.sum() > 0, lambda w: jnp.tanh(x @ w), lambda w: jnp.sin(x @ w * 0.5), p["branch"])
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["loop"]), x)
        (x, _), ys = jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), c[0].sum()), (x, p["carry"]), None, length=2)
        return jax.jit(lambda w, x: x @ w)(p["out"], x) + ys.sum()

    variables = params(dtype, branch=(8, 8), loop=(8, 8), carry=(8, 8), out=(8, 7))
    return Case(fn, variables, (normal(9, 6, 8, dtype=dtype),), config())


class NnxModel(nnx.Module):
    def __init__(self, dtype: Any):
        rngs = nnx.Rngs(0)
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=12, qkv_features=14, decode=False, **options)
        self.norm = nnx.LayerNorm(12, **options)
        self.layers = nnx.List([nnx.Linear(12, 17, **options), nnx.Linear(17, 12, **options)])

    def __call__(self, x: Any) -> Any:
        x = x + self.attention(self.norm(x))
        return x + self.layers[1](nnx.gelu(self.layers[0](x)))


@frontend
def nnx_modules(dtype: Any) -> Case:
    fn, shapes = lj.nnx.functional(nnx.eval_shape(lambda: NnxModel(dtype)))
    return Case(fn, weights(shapes, dtype), (normal(1, 2, 5, 12, dtype=dtype),), config())


@frontend
def flax_bert(dtype: Any) -> Case:
    from transformers import BertConfig, FlaxBertModel

    sizes = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=22,
        max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = FlaxBertModel(sizes, dtype=dtype, _do_init=False)

    def fn(variables: Any, ids: Any) -> Any:
        mask, types = jnp.ones_like(ids), jnp.zeros_like(ids)
        out = model.module.apply({"params": variables}, ids, mask, types, jnp.arange(ids.shape[1])[None], None)
        return out.last_hidden_state, out.pooler_output

    # Larger adapters saturate the attention: the gradients of queries and keys would be what float32 leaves of a difference.
    return Case(fn, weights(model.params_shape_tree, dtype), (jnp.array([[3, 1, 49, 7, 8]]),), config(alpha=1))


@frontend
def flax_gpt2(dtype: Any) -> Case:
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    sizes = GPT2Config(
        vocab_size=50, n_positions=20, n_embd=16, n_layer=2, n_head=2, n_inner=22, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    model = FlaxGPT2LMHeadModel(sizes, dtype=dtype, _do_init=False)

    def fn(variables: Any, ids: Any) -> Any:
        return model.module.apply({"params": variables}, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]).logits

    targets = ["c_attn", "c_proj", "c_fc", "wte"]
    return Case(fn, weights(model.params_shape_tree, dtype), (jnp.array([[3, 1, 49, 7, 8]]),), config(targets))

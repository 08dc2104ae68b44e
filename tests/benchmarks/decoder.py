"""The decoder that the benchmarks and the structural tests share, as a plain Linen model.

Token and learned position embeddings, pre-LayerNorm blocks, `nn.Dense` without biases, masked softmax attention as two
einsums, a final LayerNorm and an untied head. `dense` makes the adapted layers, so that one model serves as the base
and, with `LowRankDense`, as the low-rank model written by hand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

Flavour = Literal["unrolled", "remat", "scan"]
TARGETS = ("query", "key", "value", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder and of its batch."""

    width: int = 512
    heads: int = 8
    layers: int = 6
    hidden: int = 2048
    vocabulary: int = 8192
    length: int = 256
    batch: int = 4
    rank: int = 8

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class LowRankDense(nn.Module):
    """`x W + s (x A) B` by hand; A and B stand in a collection of their own."""

    features: int
    rank: int
    scale: float = 2.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (n, self.features))
        a = self.variable("lora", "a", lambda: nn.initializers.normal(n**-0.5)(self.make_rng("params"), (n, self.rank)))
        b = self.variable("lora", "b", jnp.zeros, (self.rank, self.features))
        return x @ kernel + self.scale * ((x @ a.value) @ b.value)


class Block(nn.Module):
    sizes: Sizes
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        sizes = self.sizes
        h = nn.LayerNorm(name="norm_attention")(x)
        heads = (*x.shape[:2], sizes.heads, sizes.width // sizes.heads)
        query, key, value = (self.dense(sizes.width, name=name)(h).reshape(heads) for name in TARGETS[:3])
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / heads[-1] ** 0.5
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(mask[None, None], scores, -1e30))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + self.dense(sizes.width, name="out")(mixed)
        h = nn.LayerNorm(name="norm_mlp")(x)
        h = nn.gelu(self.dense(sizes.hidden, name="up")(h))
        return x + self.dense(sizes.width, name="down")(h), None


class Decoder(nn.Module):
    sizes: Sizes
    flavour: Flavour = "unrolled"
    dense: Callable[..., nn.Module] = nn.Dense

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        sizes = self.sizes
        position = nn.Embed(sizes.length, sizes.width, name="position")(jnp.arange(tokens.shape[1]))
        x = nn.Embed(sizes.vocabulary, sizes.width, name="token")(tokens) + position[None]
        block = Block if self.flavour == "unrolled" else nn.remat(Block, prevent_cse=self.flavour == "remat")
        if self.flavour == "scan":
            axes = {"params": 0, "lora": 0}
            stack = nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=sizes.layers)
            x, _ = stack(sizes, self.dense, name="layers")(x, None)
        else:
            for layer in range(sizes.layers):
                x, _ = block(sizes, self.dense, name=f"layer_{layer}")(x)
        x = nn.LayerNorm(name="norm")(x)
        return nn.Dense(sizes.vocabulary, use_bias=False, name="head")(x)


def plain(sizes: Sizes, flavour: Flavour = "unrolled") -> Decoder:
    """The base model."""
    return Decoder(sizes, flavour, lambda features, name: nn.Dense(features, use_bias=False, name=name))


def by_hand(sizes: Sizes, flavour: Flavour = "unrolled") -> Decoder:
    """The model with the low-rank products written into it."""
    return Decoder(sizes, flavour, lambda features, name: LowRankDense(features, sizes.rank, name=name))


def batch(sizes: Sizes) -> jax.Array:
    """Random tokens (batch, length + 1): inputs and, one further, their targets."""
    return jax.random.randint(jax.random.key(1), (sizes.batch, sizes.length + 1), 0, sizes.vocabulary)


def loss(apply: Callable[..., jax.Array], variables: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token, in float32."""
    logits = apply(variables, tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def floor(sizes: Sizes, flavour: Flavour = "unrolled") -> int:
    """The FLOPs of the products that a train step can't do without.

    Forward; backward to the activations (not through the first layer's query, key and value, as nothing is trained
    below them, except under a scan, where all layers are alike); the gradients of A and B. With remat, what a block's
    backward pass reads is computed again: all of it but the results of its last products.
    """
    tokens, width, hidden, rank = sizes.tokens, sizes.width, sizes.hidden, sizes.rank

    def base(n_in: int, n_out: int) -> int:
        return 2 * tokens * n_in * n_out

    def pair(n_in: int, n_out: int) -> int:
        """Forward; as much again to the activations, and to A and B."""
        return 2 * tokens * rank * (n_in + n_out)

    square = base(width, width), pair(width, width)
    up = base(width, hidden), pair(width, hidden)
    attention = 4 * tokens * sizes.length * width
    kernels = [square] * 4 + [up] * 2
    forward = sum(b + p for b, p in kernels) + attention
    backward = sum(b + 2 * p for b, p in kernels) + 2 * attention
    recomputed = 0 if flavour == "unrolled" else forward - base(hidden, width) - 2 * tokens * rank * width
    head = 2 * base(width, sizes.vocabulary)
    unneeded = 0 if flavour == "scan" else 3 * (square[0] + 2 * tokens * rank * width)
    return sizes.layers * (forward + backward + recomputed) + head - unneeded

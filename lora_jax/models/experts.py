"""Mixtures of experts: each token goes through the few of a layer's MLPs that its router chooses. No token is dropped."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a decoder.

    Args:
      count: how many a layer has.
      chosen: how many of them a token goes through.
      width: their inner width.
      layers: the layers that have experts, in place of one MLP.
      weights: how the logits of the chosen become weights: `"softmax"`: theirs of the softmax over all; `"normalized"`: the
        same, brought to the sum 1; `"chosen"`: the softmax over the chosen, which is the same numbers by another rounding.
      bias: whether router and experts have biases.
      interleaved: whether gate and up alternate in the joined kernel.
      limit: gpt-oss's: gates are cut at it, ups at it and its negative, and the product is `(up + 1) gate sigmoid(alpha gate)`.
      alpha: of that product.
      balance: what the model's training multiplied the balance loss by.
    """

    count: int
    chosen: int
    width: int
    layers: tuple[int, ...]
    weights: Literal["softmax", "normalized", "chosen"] = "normalized"
    bias: bool = False
    interleaved: bool = False
    limit: float | None = None
    alpha: float = 1.702
    balance: float = 0.001


class ExpertKernels(nn.Module):
    """A kernel for each expert, and a bias where they have one."""

    shape: tuple[int, ...]
    use_bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self) -> tuple[jax.Array, Any]:
        init = nn.initializers.lecun_normal(in_axis=1, out_axis=tuple(range(2, len(self.shape))), batch_axis=0)
        kernel = self.param("kernel", init, self.shape, self.param_dtype)
        bias = (self.shape[0], *self.shape[2:])
        return kernel, self.param("bias", nn.initializers.zeros, bias, self.param_dtype) if self.use_bias else None


class MixtureOfExperts(nn.Module):
    """`sum_e weight_e down_e(act(gate_e(x)) * up_e(x))` over the chosen experts e: `(batch, length, hidden)`, and the
    router's logits `(batch, length, experts)`.

    The tokens are sorted by expert, so that each expert's are one group of a `ragged_dot`; or, if `dense`, every expert sees
    every token, which costs more products and no sorting. On a mesh (`rows` says where a batch is) each device sorts its own
    tokens, and the kernels come to them; along the axis `model` the experts' inner width is cut.
    """

    experts: Experts
    activation: Callable[[jax.Array], jax.Array]
    param_dtype: Any
    dense: bool = False
    rows: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        experts, hidden = self.experts, x.shape[-1]
        logits = nn.Dense(experts.count, experts.bias, param_dtype=self.param_dtype, name="router")(x)
        weights, indices = _route(logits.reshape(-1, experts.count), experts)
        halves = (experts.width, 2) if experts.interleaved else (2, experts.width)
        kernels = {
            name: ExpertKernels((experts.count, *shape), experts.bias, self.param_dtype, name=name)()
            for name, shape in (("gate_up_proj", (hidden, *halves)), ("down_proj", (experts.width, hidden)))
        }
        run = self._dense if self.dense else self._ragged if self.rows is None else self._on_mesh()
        return run(x.reshape(-1, hidden), kernels, weights.astype(x.dtype), indices).reshape(x.shape), logits

    def _on_mesh(self) -> Callable[..., jax.Array]:
        """`_ragged` of each device's own tokens."""
        mesh, rows = self.rows.mesh, jax.P(*self.rows.spec[:1])
        cut = "model" if "model" in mesh.shape else None
        inner = (cut, None) if self.experts.interleaved else (None, cut)
        places = {"gate_up_proj": (jax.P(None, None, *inner), jax.P(None, *inner)), "down_proj": (jax.P(None, cut), jax.P())}
        if not self.experts.bias:
            places = {name: (kernel, None) for name, (kernel, _) in places.items()}

        def local(x: jax.Array, kernels: Any, weights: jax.Array, indices: jax.Array) -> jax.Array:
            if cut is None:
                return self._ragged(x, kernels, weights, indices)
            kernel, bias = kernels["down_proj"]
            share = None if bias is None else bias / mesh.shape[cut]  # which the sum adds up again
            return lax.psum(self._ragged(x, kernels | {"down_proj": (kernel, share)}, weights, indices), cut)

        return jax.shard_map(local, mesh=mesh, in_specs=(rows, places, rows, rows), out_specs=rows)

    def _ragged(self, x: jax.Array, kernels: Any, weights: jax.Array, indices: jax.Array) -> jax.Array:
        order = jnp.argsort(indices.reshape(-1), stable=True)
        owner, sizes = indices.reshape(-1)[order], jnp.bincount(indices.reshape(-1), length=self.experts.count)

        def product(x: jax.Array, kernel: jax.Array, bias: Any) -> jax.Array:
            out = lax.ragged_dot(x, kernel.reshape(*kernel.shape[:2], -1), sizes.astype(jnp.int32))
            return out if bias is None else out + bias.reshape(kernel.shape[0], -1)[owner]

        inner = self._gated(product(x[order // self.experts.chosen], *kernels["gate_up_proj"]))
        out = product(inner, *kernels["down_proj"])[jnp.argsort(order)].reshape(*indices.shape, -1)
        return jnp.einsum("tk,tkh->th", weights, out)

    def _dense(self, x: jax.Array, kernels: Any, weights: jax.Array, indices: jax.Array) -> jax.Array:
        def product(x: jax.Array, kernel: jax.Array, bias: Any) -> jax.Array:
            out = jnp.einsum("eti,eio->eto", x, kernel.reshape(*kernel.shape[:2], -1))
            return out if bias is None else out + bias.reshape(kernel.shape[0], 1, -1)

        every = jnp.broadcast_to(x, (self.experts.count, *x.shape))
        out = product(self._gated(product(every, *kernels["gate_up_proj"])), *kernels["down_proj"])
        chosen = indices[:, :, None] == jnp.arange(self.experts.count)[None, None]
        share = jnp.where(chosen, weights[:, :, None], 0).sum(1).astype(x.dtype)
        return jnp.einsum("te,eth->th", share, out)

    def _gated(self, joined: jax.Array) -> jax.Array:
        """`act(gate) * up` of the joined product `(*tokens, 2 * width)`."""
        experts = self.experts
        if experts.interleaved:
            gate, up = (joined.reshape(*joined.shape[:-1], -1, 2)[..., i] for i in range(2))
        else:
            gate, up = jnp.split(joined, 2, axis=-1)
        if experts.limit is None:
            return self.activation(gate) * up
        gate, up = jnp.minimum(gate, experts.limit), jnp.clip(up, -experts.limit, experts.limit)
        return (up + 1) * gate * nn.sigmoid(gate * experts.alpha)


def _route(logits: jax.Array, experts: Experts) -> tuple[jax.Array, jax.Array]:
    """The weights and indices `(tokens, chosen)` of each token's experts."""
    if experts.weights == "chosen":
        best, indices = lax.top_k(logits, experts.chosen)
        return jax.nn.softmax(best, axis=-1), indices
    weights, indices = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), experts.chosen)
    return weights / weights.sum(-1, keepdims=True) if experts.weights == "normalized" else weights, indices


def balance_loss(logits: jax.Array, chosen: int, real: jax.Array | None = None) -> jax.Array:
    """How unevenly the experts are used: `chosen` where all are used alike, up to their number where some are used alone.

    `experts * sum_e f_e p_e`, with f_e the share of choices that fall on the expert e, times `chosen`, and p_e its mean
    probability, over all tokens and layers (Switch Transformers, equations 4 to 6, https://arxiv.org/abs/2101.03961).

    Args:
      logits: of the routers, `(layers, batch, length, experts)`.
      chosen: how many experts a token goes through.
      real: `(batch, length)`: which tokens count; `None`: all.

    >>> balance_loss(jnp.zeros((1, 2, 3, 4)), 1).round(3).item()
    1.0
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    _, indices = lax.top_k(probabilities, chosen)
    used = jax.nn.one_hot(indices, logits.shape[-1]).sum(-2)
    counts = jnp.ones(logits.shape[1:3], jnp.float32) if real is None else jnp.asarray(real, jnp.float32)
    weights = jnp.broadcast_to(counts, logits.shape[:3])
    mean = lambda x: jnp.einsum("lbte,lbt->e", x, weights) / weights.sum()
    return logits.shape[-1] * jnp.sum(mean(used) * mean(probabilities))

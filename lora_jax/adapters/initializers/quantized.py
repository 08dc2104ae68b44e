"""Initialisers for a quantised base."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax.adapters import quant
from lora_jax.adapters.algebra import delta_matrices, fit, kernel_matrices, true_ranks, within_ranks
from lora_jax.adapters.initializers.common import Adapters, as_kernel, map_matrices, sides, svd, with_kernels
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import InputError

DTYPES = ("nf4", "int4", "int8")


def loftq(
    variables: Any,
    adapters: Adapters,
    dtype: Literal["nf4", "int4", "int8"] = "nf4",
    *,
    block: int | None = 64,
    iterations: int = 1,
) -> tuple[Any, dict[str, Adapter]]:
    """A quantised base, and pairs that make up for its error (LoftQ, https://arxiv.org/abs/2310.08659).

    `Q = quantise(W - s A B)` and `s A B = the best approximation of W - Q of rank r`, by turns, from `A B = 0` on: `Q + s A B`
    is nearer to W than Q. PEFT leaves the scale s out, which is right for `alpha = r` only.

    Only the adapted kernels are quantised. They are returned dequantised, as arrays of their own dtype, so that they save
    no memory. Needs qwix (`pip install lora-jax[quant]`).

    Args:
      variables: the base tree.
      adapters: what `init` made.
      dtype: `"nf4"` (QLoRA's, https://arxiv.org/abs/2305.14314), `"int4"` or `"int8"`, scaled by the largest magnitude.
      block: how many values along a kernel's in axes (flattened) share a scale; `None`: all of an output.
      iterations: how many times both steps are made.

    Raises:
      InputError: an adapter can't be initialised so, an option is out of range, or a kernel's in axes can't be cut into blocks.
      ImportError: qwix is not installed.

    >>> import lora_jax as lj
    >>> fn, base = lambda p, x: x @ p["w"], {"w": jax.random.normal(jax.random.key(0), (64, 8))}
    >>> adapters = lj.init(jax.random.key(1), lj.LoraConfig(rank=4), fn, base, jnp.ones((1, 64)))
    >>> rounded, adapters = loftq(base, adapters)
    >>> error = lambda kernel: float(jnp.linalg.norm(kernel - base["w"]))
    >>> error(lj.merge(rounded, adapters)["w"]) < error(rounded["w"])
    True
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(repr, DTYPES))}, not {dtype!r}")
    if iterations < 1:
        raise InputError(f"iterations must be at least 1, not {iterations}")
    pairs = with_kernels(variables, adapters)
    for path, (kernel, pair) in pairs.items():
        _check_block(path, kernel.shape, pair, block)
    quantized.qwix()
    found = {path: _loftq(kernel, pair, dtype, block, iterations) for path, (kernel, pair) in pairs.items()}
    leaves, treedef = paths.flatten(variables)
    leaves |= {path: base for path, (base, _) in found.items()}
    return jax.tree.unflatten(treedef, list(leaves.values())), {**adapters, **{path: pair for path, (_, pair) in found.items()}}


def _check_block(path: str, shape: tuple[int, ...], pair: LowRank, block: int | None) -> None:
    fan_in, _ = sides(pair)
    if block is not None and (block < 1 or fan_in % block):
        raise InputError(
            f"block: the {fan_in} values along the in axes of {path} (shape {shape}) can't be cut into blocks of {block}: "
            "give a divisor, or None for one scale for each output"
        )


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _loftq(kernel: jax.Array, pair: LowRank, dtype: str, block: int | None, iterations: int) -> tuple[jax.Array, LowRank]:
    """The dequantised kernel and the pair; one matrix of a stack after the other."""
    within = jnp.arange(pair.rank)[None] < true_ranks(pair)[:, None]

    def one(kernel: jax.Array, pair: LowRank, on: jax.Array) -> tuple[jax.Array, LowRank]:
        flat = kernel_matrices(kernel, pair.layout)

        def turn(_: Any, state: tuple[jax.Array, LowRank]) -> tuple[jax.Array, LowRank]:
            rounded = quantized.dense(quant.rounded(flat - delta_matrices(state[1]), dtype, 1, block))
            rounded = rounded.astype(kernel.dtype).astype(flat.dtype)
            found = fit(pair, *svd(flat - rounded))
            return rounded, dataclasses.replace(found, a=jnp.where(on[None], found.a, 0), b=jnp.where(on[:, None], found.b, 0))

        rounded, found = jax.lax.fori_loop(0, iterations, turn, (flat, pair))
        return rounded[0].astype(kernel.dtype), found

    rounded, found = map_matrices(one, kernel, pair, within)
    return as_kernel(rounded, kernel, pair.layout), within_ranks(pair, found.a, found.b)

"""Starting values of low-rank pairs that need nothing but shapes, for `init`.

Each start is a function `(key, targets) -> {path: (a, b)}` with `a: (*batch, *in, r)` and `b: (*batch, r, *out)`. `A B` is
zero, so that step 0 is exactly the base model.

What is random comes out of one stream of blocks of one size, each with a key of its own: one small program for a model of any
number of kernels and shapes, which takes less time to compile than a draw for each shape. It is cut up as NumPy arrays, since
cutting would take a program for each shape again; inside `jit` all stays JAX's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.targets import Target
from lora_jax.core import paths
from lora_jax.core.host import host, namespace

BLOCK = 2**14  # how many numbers a key gives
Pairs = dict[str, tuple[Any, Any]]
Start = Callable[[jax.Array, Sequence[Target]], Pairs]


def kaiming(key: jax.Array, targets: Sequence[Target]) -> Pairs:
    """A uniform in `+-1/sqrt(fan_in)`, B zero: PEFT's default (`kaiming_uniform_(a=sqrt(5))`)."""
    bounds = [1 / math.sqrt(target.sides[0]) for target in targets]
    drawn = _drawn(_uniform, key, {target.path: math.prod(target.factor_shapes[0]) for target in targets}, bounds)
    return {target.path: _beside_zeros(drawn[target.path], *target.factor_shapes) for target in targets}


def gaussian(key: jax.Array, targets: Sequence[Target]) -> Pairs:
    """A normal with standard deviation 1/r, B zero (PEFT's `init_lora_weights="gaussian"`)."""
    drawn = _drawn(_normal, key, {target.path: math.prod(target.factor_shapes[0]) for target in targets})
    return {target.path: _beside_zeros(drawn[target.path] / target.rank, *target.factor_shapes) for target in targets}


def embedding(key: jax.Array, targets: Sequence[Target]) -> Pairs:
    """A zero, B standard normal: for tables that are looked up (PEFT's `lora_embedding_A`, `lora_embedding_B`)."""
    drawn = _drawn(_normal, key, {target.path: math.prod(target.factor_shapes[1]) for target in targets})
    return {target.path: _beside_zeros(drawn[target.path], *target.factor_shapes[::-1])[::-1] for target in targets}


def orthogonal(key: jax.Array, targets: Sequence[Target]) -> Pairs:
    """Neither A nor B zero, and A B = 0 (PEFT's `init_lora_weights="orthogonal"`).

    `A = G Q0 / 10` and `B = Q1^T H / 10`, where Q0 and Q1 are the even and the odd rows of a random orthogonal r x r matrix, so
    that `Q0 Q1^T = 0`, and G `(in, r/2)` and H `(r/2, out)` are normal; r is even. One draw for each matrix of a stack.
    """
    counts = {t.path: math.prod(t.shape[axis] for axis in t.layout.batch) for t in targets}
    sizes = lambda side: {t.path: counts[t.path] * t.sides[side] * t.rank // 2 for t in targets}
    rows = _rotations(key, {t.path: (t.rank, counts[t.path]) for t in targets})
    g, h = _drawn(_normal, key, sizes(0), part=1), _drawn(_normal, key, sizes(1), part=2)

    def one(t: Target) -> tuple[Any, Any]:
        (a_shape, b_shape), q = t.factor_shapes, rows[t.path]
        a = _product(g[t.path].reshape(counts[t.path], -1, t.rank // 2) / 10, q[:, 0::2])
        b = _product(q[:, 1::2].swapaxes(1, 2), h[t.path].reshape(counts[t.path], t.rank // 2, -1) / 10)
        return a.reshape(a_shape), b.reshape(b_shape)

    return {t.path: one(t) for t in targets}


BY_NAME: dict[str, Start] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}


# --- drawing ----------------------------------------------------------------------------------------------------------


def _uniform(key: jax.Array, bound: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (BLOCK,), minval=-bound, maxval=bound)


def _normal(key: jax.Array, bound: jax.Array) -> jax.Array:
    return jax.random.normal(key, (BLOCK,))


def _drawn(
    draw: Callable[..., jax.Array],
    key: jax.Array,
    sizes: Mapping[str, int],
    bounds: Sequence[float] | None = None,
    part: int | None = None,
) -> dict[str, Any]:
    """So many numbers for each path, from keys of its own (from one part of it, where a start needs several)."""
    if not sizes:
        return {}
    counts = [math.ceil(size / BLOCK) for size in sizes.values()]
    hashes = np.repeat([paths.stable_hash(path) for path in sizes], counts).astype(np.uint32)
    numbers = np.concatenate([np.arange(count) for count in counts]).astype(np.uint32)
    flat = host(_blocks(draw, part, key, hashes, numbers, np.repeat(bounds or [1.0] * len(sizes), counts))).reshape(-1)
    starts = BLOCK * np.cumsum([0, *counts])
    return {path: flat[start : start + size] for (path, size), start in zip(sizes.items(), starts)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _blocks(
    draw: Callable[..., jax.Array], part: int | None, key: jax.Array, hashes: Any, numbers: Any, bounds: Any
) -> jax.Array:
    """The blocks `(count, BLOCK)`, one after the other, so that a key gives the same with any kind of generator."""

    def block(which: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        path, number, bound = which
        own = _own_key(key, path, part)
        # The first is of the path's own key, as all was when it was drawn at once.
        return draw(jax.lax.select(number == 0, own, jax.random.fold_in(own, number)), bound)

    return jax.lax.map(block, (hashes, numbers, bounds))


def _own_key(key: jax.Array, path: Any, part: int | None) -> jax.Array:
    own = jax.random.fold_in(key, path)
    return own if part is None else jax.random.split(own, 3)[part]


def _rotations(key: jax.Array, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Random orthogonal matrices `(count, rank, rank)` for each path with its `(rank, count)`."""
    found: dict[str, Any] = {}
    for rank, count in dict.fromkeys(sizes.values()):
        alike = [path for path, size in sizes.items() if size == (rank, count)]
        hashes = np.array([paths.stable_hash(path) for path in alike], np.uint32)
        found |= zip(alike, host(_orthogonal(key, hashes, rank, count)))
    return found


@functools.partial(jax.jit, static_argnums=(2, 3))
def _orthogonal(key: jax.Array, hashes: Any, rank: int, count: int) -> jax.Array:
    return jax.lax.map(lambda path: jax.random.orthogonal(_own_key(key, path, 0), rank, (count,)), hashes)


def _beside_zeros(drawn: Any, shape: tuple[int, ...], zeros_shape: tuple[int, ...]) -> tuple[Any, Any]:
    return drawn.reshape(shape), namespace(drawn).zeros(zeros_shape, drawn.dtype)


def _product(x: Any, y: Any) -> Any:
    return np.matmul(x, y) if isinstance(x, np.ndarray) else jnp.matmul(x, y, precision="highest")

"""Starting values of a low-rank pair that need nothing but shapes, for `init`.

Each start is a function `(key, shape, layout, rank) -> (a, b)` of the kernel's shape, with `a: (*batch, *in, r)` and
`b: (*batch, r, *out)`. `A B` is zero, so that step 0 is exactly the base model.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Layout

Pair = tuple[jax.Array, jax.Array]
Start = Callable[[jax.Array, tuple[int, ...], Layout, int], Pair]


def kaiming(key: jax.Array, shape: tuple[int, ...], layout: Layout, rank: int) -> Pair:
    """A uniform in `+-1/sqrt(fan_in)`, B zero: PEFT's default (`kaiming_uniform_(a=sqrt(5))`).

    >>> a, b = kaiming(jax.random.key(0), (16, 8), Layout((), (0,), (1,)), 4)
    >>> bool(jnp.abs(a).max() <= 1 / 4), bool((b == 0).all())
    (True, True)
    """
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    bound = 1 / math.sqrt(math.prod(shape[axis] for axis in layout.inputs))
    return jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), jnp.zeros(b_shape)


def gaussian(key: jax.Array, shape: tuple[int, ...], layout: Layout, rank: int) -> Pair:
    """A normal with standard deviation 1/r, B zero (PEFT's `init_lora_weights="gaussian"`)."""
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    return jax.random.normal(key, a_shape) / rank, jnp.zeros(b_shape)


def orthogonal(key: jax.Array, shape: tuple[int, ...], layout: Layout, rank: int) -> Pair:
    """Neither A nor B zero, and A B = 0 (PEFT's `init_lora_weights="orthogonal"`).

    `A = G Q0 / 10` and `B = Q1^T H / 10`, where Q0 and Q1 are the even and the odd rows of a random orthogonal r x r matrix, so
    that `Q0 Q1^T = 0`, and G `(in, r/2)` and H `(r/2, out)` are normal; r is even. One draw for each matrix of a stack.

    >>> a, b = orthogonal(jax.random.key(0), (16, 8), Layout((), (0,), (1,)), 4)
    >>> bool(jnp.allclose(a @ b, 0.0, atol=1e-6)), bool(a.any() and b.any())
    (True, True)
    """
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    batch, inputs = a_shape[: len(layout.batch)], a_shape[len(layout.batch) : -1]
    outputs = b_shape[len(batch) + 1 :]
    keys = jax.random.split(key, 3)
    rows = jax.random.orthogonal(keys[0], rank, batch)
    g = jax.random.normal(keys[1], (*batch, math.prod(inputs), rank // 2)) / 10
    h = jax.random.normal(keys[2], (*batch, rank // 2, math.prod(outputs))) / 10
    a = jnp.matmul(g, rows[..., 0::2, :], precision="highest")
    b = jnp.matmul(rows[..., 1::2, :].mT, h, precision="highest")
    return a.reshape(a_shape), b.reshape(b_shape)


def embedding(key: jax.Array, shape: tuple[int, ...], layout: Layout, rank: int) -> Pair:
    """A zero, B standard normal: for a table that is looked up (PEFT's `lora_embedding_A`, `lora_embedding_B`)."""
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    return jnp.zeros(a_shape), jax.random.normal(key, b_shape)


BY_NAME: dict[str, Start] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}

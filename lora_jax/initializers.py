"""Starting values of a low-rank pair.

Each initialiser is a function `(key, kernel, layout, rank) -> (base, a, b)`: the base (changed by some methods; here always as
it was), `a: (*batch, *in, r)` and `b: (*batch, r, *out)`. With A or B zero, step 0 is exactly the base model.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapter import Layout

Initializer = Callable[[jax.Array, Any, Layout, int], tuple[Any, jax.Array, jax.Array]]


def kaiming(key: jax.Array, kernel: Any, layout: Layout, rank: int) -> tuple[Any, jax.Array, jax.Array]:
    """A uniform in `+-1/sqrt(fan_in)`, B zero: PEFT's default (`kaiming_uniform_(a=sqrt(5))`).

    >>> base, a, b = kaiming(jax.random.key(0), jnp.ones((16, 8)), Layout((), (0,), (1,)), 4)
    >>> bool(jnp.abs(a).max() <= 1 / 4), bool((b == 0).all())
    (True, True)
    """
    a_shape, b_shape = layout.factor_shapes(kernel.shape, rank)
    bound = 1 / math.sqrt(math.prod(kernel.shape[axis] for axis in layout.inputs))
    return kernel, jax.random.uniform(key, a_shape, minval=-bound, maxval=bound), jnp.zeros(b_shape)


def gaussian(key: jax.Array, kernel: Any, layout: Layout, rank: int) -> tuple[Any, jax.Array, jax.Array]:
    """A normal with standard deviation 1/r, B zero (PEFT's `init_lora_weights="gaussian"`)."""
    a_shape, b_shape = layout.factor_shapes(kernel.shape, rank)
    return kernel, jax.random.normal(key, a_shape) / rank, jnp.zeros(b_shape)


def orthogonal(key: jax.Array, kernel: Any, layout: Layout, rank: int) -> tuple[Any, jax.Array, jax.Array]:
    """A with orthonormal columns, one draw for each matrix of a stack, B zero.

    >>> base, a, b = orthogonal(jax.random.key(0), jnp.ones((16, 8)), Layout((), (0,), (1,)), 4)
    >>> bool(jnp.allclose(a.T @ a, jnp.eye(4), atol=1e-5))
    True
    """
    a_shape, b_shape = layout.factor_shapes(kernel.shape, rank)
    batch = a_shape[: len(layout.batch)]
    flat = jax.random.orthogonal(key, math.prod(a_shape[len(batch) : -1]), batch, m=rank)
    return kernel, flat.reshape(a_shape), jnp.zeros(b_shape)


def embedding(key: jax.Array, kernel: Any, layout: Layout, rank: int) -> tuple[Any, jax.Array, jax.Array]:
    """A zero, B standard normal: for a table that is looked up (PEFT's `lora_embedding_A`, `lora_embedding_B`)."""
    a_shape, b_shape = layout.factor_shapes(kernel.shape, rank)
    return kernel, jnp.zeros(a_shape), jax.random.normal(key, b_shape)


BY_NAME: dict[str, Initializer] = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}

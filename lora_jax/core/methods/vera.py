"""VeRA: random matrices that all kernels share and nobody trains, with two trained vectors for each kernel.

`W + A diag(d) B diag(b)` (https://arxiv.org/abs/2310.11454), as PEFT starts it. Its scale is 1.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Layout


@dataclasses.dataclass
class Shared:
    """The matrices A `(largest in, rank)` and B `(rank, largest out)`, of which each kernel takes the part that fits.

    Kernels of one shape share one array. Each row of A and column of B has a key of its own, so that a larger kernel among
    the targets changes the smaller ones' by no more than the factor that PEFT's bound `sqrt(6 / largest in)` gives.

    Args:
      rank: r.
      fan_in: the largest number of inputs.
      dtype: of the matrices.
    """

    rank: int
    fan_in: int
    dtype: Any
    made: dict[tuple[int, ...], jax.Array] = dataclasses.field(default_factory=dict)

    def pair(self, key: jax.Array, layout: Layout, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """A `(*batch, *in, r)` and B `(*batch, r, *out)` of a kernel of this shape, the same for each matrix of a stack."""
        a_shape, b_shape = layout.factor_shapes(shape, self.rank)
        batch = len(layout.batch)
        lines = lambda index, count, bound: self._lines(jax.random.fold_in(key, index), count, bound)
        a = lambda: lines(0, math.prod(a_shape[batch:-1]), math.sqrt(6 / self.fan_in)).reshape(a_shape[batch:])
        b = lambda: lines(1, math.prod(b_shape[batch + 1 :]), math.sqrt(6 / self.rank)).T.reshape(b_shape[batch:])
        return self._once((0, *a_shape), a), self._once((1, *b_shape), b)

    def _lines(self, key: jax.Array, count: int, bound: float) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
        return jax.vmap(lambda key: jax.random.uniform(key, (self.rank,), minval=-bound, maxval=bound))(keys)

    def _once(self, name: tuple[int, ...], make: Any) -> jax.Array:
        if name not in self.made:
            self.made[name] = jnp.broadcast_to(make().astype(self.dtype), name[1:])
        return self.made[name]


def scales(layout: Layout, shape: tuple[int, ...], rank: int, d_initial: float, dtype: Any) -> dict[str, jax.Array]:
    """A kernel's d `(*batch, r)`, all `d_initial`, and b `(*batch, *out)`, zero: step 0 is the base model."""
    _, (*b_shape,) = layout.factor_shapes(shape, rank)
    batch = len(layout.batch)
    out_shape = (*b_shape[:batch], *b_shape[batch + 1 :])
    return {"lambda_d": jnp.full(b_shape[: batch + 1], d_initial, dtype), "lambda_b": jnp.zeros(out_shape, dtype)}

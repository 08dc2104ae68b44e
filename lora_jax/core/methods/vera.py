"""VeRA: random matrices that all kernels share and nobody trains, with two trained vectors for each kernel.

`W + A diag(d) B diag(b)` (https://arxiv.org/abs/2310.11454), as PEFT starts it. Its scale is 1.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Layout
from lora_jax.core.factor import RANK, Factor, scaled_along
from lora_jax.core.host import host, namespace
from lora_jax.core.rules.products import Product
from lora_jax.core.weight import LowRankTerm, Method, WeightContext


@dataclasses.dataclass
class Shared:
    """The matrices A `(largest in, rank)` and B `(rank, largest out)`, of which each kernel takes the part that fits.

    Kernels of one shape share one array. Each row of A and column of B has a key of its own, so that a larger kernel among
    the targets changes the smaller ones' by no more than the factor that PEFT's bound `sqrt(6 / largest in)` gives.

    Args:
      key: a PRNG key.
      rank: r.
      fan_in: the largest number of inputs.
      fan_out: the largest number of outputs.
      dtype: of the matrices.
    """

    key: jax.Array
    rank: int
    fan_in: int
    fan_out: int
    dtype: Any
    made: dict[tuple[int, ...], Any] = dataclasses.field(default_factory=dict)

    def pair(self, layout: Layout, shape: tuple[int, ...]) -> tuple[Any, Any]:
        """A `(*batch, *in, r)` and B `(*batch, r, *out)` of a kernel of this shape, the same for each matrix of a stack."""
        a_shape, b_shape = layout.factor_shapes(shape, self.rank)
        batch = len(layout.batch)
        fan_in, fan_out = math.prod(a_shape[batch:-1]), math.prod(b_shape[batch + 1 :])
        a = self._once((0, *a_shape), lambda: self._rows[:fan_in].reshape(a_shape[batch:]))
        return a, self._once((1, *b_shape), lambda: self._columns[:fan_out].T.reshape(b_shape[batch:]))

    @functools.cached_property
    def _rows(self) -> Any:
        return host(_lines(self.key, 0, math.sqrt(6 / self.fan_in), self.fan_in, self.rank, self.dtype))

    @functools.cached_property
    def _columns(self) -> Any:
        return host(_lines(self.key, 1, math.sqrt(6 / self.rank), self.fan_out, self.rank, self.dtype))

    def _once(self, name: tuple[int, ...], make: Callable[[], Any]) -> Any:
        if name not in self.made:
            array = make()
            self.made[name] = namespace(array).broadcast_to(array, name[1:])
        return self.made[name]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _lines(key: jax.Array, which: int, bound: float, count: int, rank: int, dtype: Any) -> jax.Array:
    """Lines `(count, rank)`, each of a key of its own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, which), jnp.arange(count))
    draw = lambda key: jax.random.uniform(key, (rank,), minval=-bound, maxval=bound)
    return jax.vmap(draw)(keys).astype(dtype)


def vera_scales(layout: Layout, shape: tuple[int, ...], rank: int, d_initial: float, like: Any) -> dict[str, Any]:
    """A kernel's d `(*batch, r)`, all `d_initial`, and b `(*batch, *out)`, zero: step 0 is the base model.

    They are of the kind and dtype of the array `like`.
    """
    _, (*b_shape,) = layout.factor_shapes(shape, rank)
    batch, numbers = len(layout.batch), namespace(like)
    out_shape = (*b_shape[:batch], *b_shape[batch + 1 :])
    d, b = numbers.full(tuple(b_shape[: batch + 1]), d_initial, like.dtype), numbers.zeros(out_shape, like.dtype)
    return {"lambda_d": d, "lambda_b": b}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scales"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class VeraScales(Method):
    """The diagonals d and b, each a factor that lies along axes of one of the two matrices.

    In a product each scales the smallest array that it lies along: the inner one, the result or x. Where none has its axes it
    is multiplied into its matrix.
    """

    scales: tuple[Factor, ...]

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        return dataclasses.replace(self, scales=tuple(map(fn, self.scales)))

    def before(self, context: WeightContext, product: Product, x: Any) -> Any:
        return scaled_along(x, self._at("x", product), product.x_labels)

    def inside(self, product: Product, z: Any, labels: Sequence[int]) -> Any:
        return scaled_along(z, self._at("inner", product), labels)

    def after(self, term: LowRankTerm, product: Product, x: Any, y: Any) -> Any:
        return scaled_along(y, self._at("result", product), product.out_labels)

    def folded(self, factors: tuple[Factor, ...], product: Product | None) -> tuple[Factor, ...]:
        changed = list(factors)
        for scale in self._at("factor", product):
            at = next(i for i, factor in enumerate(changed) if set(scale.axes) <= set(factor.axes))
            array = scaled_along(changed[at].array, [scale], changed[at].axes)
            changed[at] = dataclasses.replace(changed[at], array=array)
        return tuple(changed)

    def _at(self, place: str, product: Product | None) -> list[Factor]:
        """The scales that a product applies at a place."""
        return [scale for scale in self.scales if _place(scale, product) == place]


def _place(scale: Factor, product: Product | None) -> str:
    axes = set(scale.axes)
    if product is None or not product.labelled:
        return "factor"
    if RANK in axes:
        return "inner"
    return "result" if axes <= set(product.out_labels) else "x" if axes <= set(product.x_labels) else "factor"

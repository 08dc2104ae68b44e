"""Dropout on the input of the low-rank branch, with a new mask for each use (https://arxiv.org/abs/2106.09685, section 5)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import paths
from lora_jax.core.rules.products import Product
from lora_jax.core.weight import Method, WeightContext


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key"], meta_fields=["rate"])
@dataclasses.dataclass(frozen=True)
class Dropout(Method):
    """x with a share of its numbers set to zero and the others scaled up.

    Inside `shard_map` each shard that x varies over draws its own mask; with `check_vma=False` JAX does not know which those
    are, and all shards draw the same one.
    """

    key: Any
    rate: float
    keyed: ClassVar[bool] = True

    def map_keys(self, fn: Callable[[Any], Any]) -> Self:
        return dataclasses.replace(self, key=fn(self.key))

    def before(self, context: WeightContext, product: Product, x: Any) -> Any:
        key, context.masks = jax.random.fold_in(self.key, context.masks), context.masks + 1
        for axis in sorted(jax.typeof(x).manual_axis_type.varying):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        mask = jax.random.bernoulli(key, 1.0 - self.rate, x.shape)
        return jnp.where(mask, x / (1.0 - self.rate), jnp.zeros_like(x))


def dropout(path: str, rate: float, key: Any) -> Dropout | None:
    """Of a rate, where the caller of `lora` gave a key; each parameter has a key of its own."""
    return None if key is None or not rate else Dropout(paths.fold_in(key, path), rate)

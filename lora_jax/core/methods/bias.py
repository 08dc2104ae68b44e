"""A bias beside B (PEFT's `lora_bias`): each product with the weight gives it more."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax

from lora_jax.core.factor import RANK, Factor
from lora_jax.core.interpreter import NotLowRank
from lora_jax.core.rules.products import Product
from lora_jax.core.weight import LowRankTerm, Method


@functools.partial(jax.tree_util.register_dataclass, data_fields=["bias"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Bias(Method):
    """A number for each output, that the whole product alone can take."""

    bias: Factor
    needs_product: ClassVar[str] = "a bias"

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        return dataclasses.replace(self, bias=fn(self.bias))

    def with_axis(self, axis: int, size: int) -> Self:
        return self if axis in self.bias.axes else dataclasses.replace(self, bias=self.bias.explicit(axis, size))

    def divide(self, axes: Sequence[int]) -> None:
        if not set(axes) <= set(self.bias.axes):
            raise NotLowRank("an in axis is taken apart, and its adapter has a bias, which only the whole product can take")

    def times(self) -> None:
        raise NotLowRank("it is multiplied with something, and its adapter has a bias")

    def after(self, term: LowRankTerm, product: Product, x: Any, y: Any) -> Any:
        others = {axis for factor in term.factors for axis in factor.axes} - {RANK, *self.bias.axes}
        return y + product.along_outputs(self.bias, others, y.dtype)

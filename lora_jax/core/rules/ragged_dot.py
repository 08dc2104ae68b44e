"""Rows of x in groups, one matrix for each group (grouped experts): two narrow grouped products."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat
from lora_jax.core.contraction import explicit_sharding
from lora_jax.core.deferred import use
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.interpreter import Context, Equation, NotLowRank, is_implicit
from lora_jax.core.rules.products import Inside, Product, as_activation, axis_roles, precision


@dataclasses.dataclass(eq=False)
class RaggedDot(Product):
    """A product of grouped rows with the matrices of their groups.

    Args:
      group_sizes: how many rows each group has.
    """

    group_sizes: Any

    @functools.cached_property
    def _axes(self) -> tuple[int, int, int]:
        """The group, in and out axes of the weight."""
        by_role = {role: axis for axis, role in self.roles.items()}
        return by_role["batch"], by_role["in"], by_role["out"]

    def with_base(self, x: Any, kept: Sequence[int] = ()) -> Any:
        bind = lambda x, base: jax_compat.bind(self.eqn, [x, base, self.group_sizes])[0]
        return use(bind, x, self.weight.base)

    def low_rank(self, x: Any, factors: tuple[Factor, ...], inside: Inside) -> Any:
        group, inner, outer = self._axes
        first, second = sorted(factors, key=lambda factor: inner not in factor.axes)
        if outer in first.axes or inner in second.axes:
            raise NotLowRank("the adapter's layout is not that of grouped matrices (batch: group, in, out)")
        rows = explicit_sharding(x)
        z = self._grouped(x, first, (group, inner, RANK), rows and rows.update(spec=jax.P(rows.spec[0], None)))
        return self._grouped(inside(z, ()), second, (group, RANK, outer), self.sharding)

    def scaled_base(self, x: Any, gains: Sequence[Factor], dtype: Any) -> Any:
        base = self.result if x is self.x else self.base_result(x.astype(self.x.dtype))
        return functools.reduce(jnp.multiply, (self._for_each_row(gain, dtype) for gain in gains), base.astype(dtype))

    def along_outputs(self, part: Factor, others: set[int], dtype: Any) -> Any:
        return self._for_each_row(part, dtype)

    def _for_each_row(self, part: Factor, dtype: Any) -> Any:
        """What a factor `(groups, out)` says for each row, `(rows, out)`: a grouped product with ones."""
        group, _, outer = self._axes
        if not set(part.axes) <= {group, outer}:
            raise NotLowRank("the adapter's magnitude or bias does not lie along the groups and out axes of this use")
        whole = dataclasses.replace(part, array=part.array[None], axes=(RANK, *part.axes))
        ones = jnp.ones((self.x.shape[0], 1), part.array.dtype)
        return self._grouped(ones, whole, (group, RANK, outer), self.sharding).astype(dtype)

    def _grouped(self, x: Any, factor: Factor, axes: tuple[int, ...], sharding: jax.NamedSharding | None) -> Any:
        """x times a factor `(groups, in, out)`, or `(in, out)` where all groups share it."""
        own = [axis for axis in axes if axis in factor.axes]
        array = lax.transpose(factor.array, [factor.dim(axis) for axis in own]).astype(x.dtype)
        options: Any = {"precision": precision(self.eqn), "out_sharding": sharding}
        return lax.ragged_dot(x, array, self.group_sizes, **options) if len(own) == 3 else lax.dot(x, array, **options)


def ragged_dot_general(context: Context, eqn: Equation, x: Any, weight: Any, group_sizes: Any, *offset: Any) -> list[Any]:
    """The weight is the stack of matrices."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, _) = numbers.dot_dimension_numbers
    group, x = numbers.rhs_group_dimensions, as_activation(context, eqn, x)
    if not is_implicit(x) and not is_implicit(weight):
        return jax_compat.bind(eqn, [x, weight, group_sizes, *offset])
    if is_implicit(x) or (xc, xb) != ((1,), ()) or numbers.lhs_ragged_dimensions != (0,) or len(group) != 1 or offset:
        raise NotLowRank("only rows in groups times one matrix per group stays low-rank in a ragged product")
    roles = axis_roles(len(weight.shape), wc, group)
    return [weight.multiply(context, RaggedDot(eqn, x, weight, roles, group_sizes))]

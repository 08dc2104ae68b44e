"""`conv(x, W + A B) = conv(x, W) + conv(x, A) B`: A has W's window and in-channels, B the out-channels."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat
from lora_jax.core.contraction import contract
from lora_jax.core.deferred import use
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.interpreter import Context, Equation, NotLowRank, is_implicit
from lora_jax.core.rules.products import Inside, Product, as_activation, precision


@dataclasses.dataclass(eq=False)
class Convolution(Product):
    """A convolution of x with the weight."""

    @property
    def _out_axis(self) -> int:
        return self.eqn.params["dimension_numbers"].rhs_spec[0]

    @functools.cached_property
    def out_labels(self) -> Sequence[int]:
        """The out-channels alone lie along an axis of the weight."""
        labels = [RANK] * self.result.ndim
        labels[self.eqn.params["dimension_numbers"].out_spec[1]] = self._out_axis
        return labels

    def with_base(self, x: Any, kept: Sequence[int] = ()) -> Any:
        if kept:
            raise NotLowRank("the adapter's magnitude does not lie along the out axis of this convolution")
        return use(lambda x, base: jax_compat.bind(self.eqn, [x, base])[0], x, self.weight.base)

    def low_rank(self, x: Any, factors: tuple[Factor, ...], inside: Inside) -> Any:
        out_axis, shape = self._out_axis, self.weight.shape
        a, b = sorted(factors, key=lambda factor: out_axis in factor.axes)
        if out_axis in a.axes or set(b.axes) != {out_axis, RANK}:
            raise NotLowRank(
                "the adapter's layout is not that of a convolution (in: window and in-channels, out: out-channels)"
            )
        for axis in range(len(shape)):
            a = a if axis in (*a.axes, out_axis) else a.explicit(axis, shape[axis])
        labels = [RANK if axis == out_axis else axis for axis in range(len(shape))]
        kernel = lax.transpose(a.array.astype(x.dtype), [a.dim(label) for label in labels])
        groups = self.eqn.params["feature_group_count"]
        kernel = jnp.concatenate([kernel] * groups, axis=out_axis)  # every group of in-channels meets the same A
        z = jax_compat.bind_with(self.eqn, [x, kernel], preferred_element_type=None, out_sharding=self._inner_sharding)[0]
        return self._times_b(inside(z, ()), b, groups)

    @property
    def _inner_sharding(self) -> jax.NamedSharding | None:
        """That of the result, but for the channels, of which there are few."""
        if self.sharding is None:
            return None
        channel = self.eqn.params["dimension_numbers"].out_spec[1]
        entries = [None if axis == channel else entry for axis, entry in enumerate(self.sharding.spec)]
        return self.sharding.update(spec=jax.P(*entries))

    def _times_b(self, z: Any, b: Factor, groups: int) -> Any:
        """A convolution with a window of one place: each group of z with the part of B that makes its out-channels."""
        channel = self.eqn.params["dimension_numbers"].out_spec[1]
        rank, size = z.shape[channel] // groups, self.weight.shape[self._out_axis] // groups
        z = z.reshape(*z.shape[:channel], groups, rank, *z.shape[channel + 1 :])
        array = jnp.moveaxis(b.array, b.dim(RANK), 0).astype(z.dtype).reshape(rank, groups, size)
        labels = list(range(z.ndim))
        out = [*labels[: channel + 1], z.ndim, *labels[channel + 2 :]]
        y = contract(z, labels, array, [channel + 1, channel, z.ndim], out, precision=precision(self.eqn))
        return y.reshape(*y.shape[:channel], groups * size, *y.shape[channel + 2 :])


def conv_general_dilated(context: Context, eqn: Equation, x: Any, weight: Any) -> list[Any]:
    """The weight is the kernel."""
    x = as_activation(context, eqn, x)
    if is_implicit(x):
        raise NotLowRank("it is the input of a convolution, not its kernel")
    if not is_implicit(weight):
        return jax_compat.bind(eqn, [x, weight])
    if eqn.params["batch_group_count"] != 1:
        raise NotLowRank("the convolution has a batch_group_count")
    out_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    roles = {axis: "out" if axis == out_axis else "in" for axis in range(len(weight.shape))}
    return [weight.multiply(context, Convolution(eqn, x, weight, roles))]

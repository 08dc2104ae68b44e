"""FLOPs of a program, from its jaxpr: over all layers, where a compiler counts the body of a scan once."""

import math
from collections.abc import Iterator
from typing import Any

from lora_jax.core.jax_compat import open_jaxpr

_AGAIN = "rematted_computation"  # JAX's name for what the backward pass of a `jax.checkpoint` computes again


def dot_flops(jaxpr: Any, *, again: bool = True) -> int:
    """The FLOPs of all `dot_general`s and ragged products, on all devices.

    A scan's body counts times its length, that of a `shard_map` times the devices, and of a `cond` the dearest branch.

    Args:
      jaxpr: of the program.
      again: also count what the backward pass of a `jax.checkpoint` computes again.

    Raises:
      NotImplementedError: the jaxpr has convolutions, or products in a `while` loop.

    >>> import jax, jax.numpy as jnp
    >>> dot_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    48
    >>> loss = lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x).sum()
    >>> [dot_flops(jax.make_jaxpr(jax.grad(loss))(jnp.eye(2)), again=again) for again in (True, False)]
    [112, 96]
    >>> mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> rows = jax.shard_map(lambda x: x @ jnp.eye(3), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    >>> dot_flops(jax.make_jaxpr(rows)(jnp.ones((8, 3))))
    144
    """
    total = 0
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        if not again and _AGAIN in str(eqn.source_info.name_stack):
            continue
        inner = [dot_flops(sub, again=again) for sub in _sub_jaxprs(eqn)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                size = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
                total += 2 * size * math.prod(eqn.outvars[0].aval.shape)
            case "ragged_dot_general":
                total += _ragged_flops(eqn)
            case "conv_general_dilated":
                raise NotImplementedError("the FLOPs of conv_general_dilated are not counted here")
            case "scan":
                total += eqn.params["length"] * sum(inner)
            case "shard_map":
                total += math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"]) * sum(inner)
            case "while" if any(inner):
                raise NotImplementedError("the number of a while loop's iterations is not in the jaxpr")
            case "cond":
                total += max(inner)
            case _:
                total += sum(inner)
    return total


def _ragged_flops(eqn: Any) -> int:
    """Each row of the left side is in one group: a product with that group's part of the right side, or a part of its sum."""
    rows, other, *_ = (var.aval.shape for var in eqn.invars)
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = dims.dot_dimension_numbers
    seen = {*contracted, *batch, *dims.rhs_group_dimensions}
    return 2 * math.prod(rows) * math.prod(size for axis, size in enumerate(other) if axis not in seen)


def _sub_jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if hasattr(open_jaxpr(item)[0], "eqns"):
                yield item

"""FLOPs of a program, from its jaxpr: over all layers, where a compiler counts the body of a scan once."""

import math
from collections.abc import Iterator
from typing import Any

from lora_jax.core.jax_compat import open_jaxpr


def dot_flops(jaxpr: Any) -> int:
    """The FLOPs of all `dot_general`s and ragged products, a scan's body times its length, and the dearest branch of a `cond`.

    Raises:
      NotImplementedError: the jaxpr has convolutions, or products in a `while` loop.

    >>> import jax, jax.numpy as jnp
    >>> dot_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    48
    """
    total = 0
    for eqn in open_jaxpr(jaxpr)[0].eqns:
        inner = [dot_flops(sub) for sub in _sub_jaxprs(eqn)]
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

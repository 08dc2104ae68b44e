"""Arrays as NumPy's where they are at hand: cut, filled and reshaped without a compiled program for each shape.

Inside `jit` they stay JAX's, and the same code goes for both.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def host(array: jax.Array) -> Any:
    """An array's values, unless it is being traced."""
    return array if isinstance(array, Tracer) else np.asarray(array)


def namespace(array: Any) -> Any:
    """The module with an array's functions: `numpy` or `jax.numpy`.

    >>> namespace(np.ones(2)).__name__, namespace(jnp.ones(2)).__name__
    ('numpy', 'jax.numpy')
    """
    return np if isinstance(array, np.ndarray) else jnp


def on_device(tree: Any) -> Any:
    """The tree with JAX's arrays, copied, so that a step may be given their memory; leaves that are one array stay one."""
    made: dict[int, jax.Array] = {}

    def put(array: Any) -> Any:
        if isinstance(array, np.ndarray) and id(array) not in made:
            made[id(array)] = jax.device_put(array.copy())  # `jnp.array` would compile a program for each shape
        return made.get(id(array), array)

    return jax.tree.map(put, tree)

"""Quantised kernels (`qwix.QArray`s) in the core: made dense where they are used, and never kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core import paths
from lora_jax.core.deferred import Deferred
from lora_jax.core.weight import Weight


def qwix() -> Any:
    """The library, or an error that says how to get it."""
    try:
        import qwix as library
    except ModuleNotFoundError:
        reason = "quantised kernels need qwix, which is not installed: pip install 'lora-jax[quant]'"
        raise ModuleNotFoundError(reason, name="qwix") from None
    return library


def dense_shape(leaf: Any) -> Any:
    """A quantised array as the shape and dtype of what it stands for; any other leaf as it is."""
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.scale.dtype) if paths.is_quantized(leaf) else leaf


def dense(leaf: Any) -> Any:
    """A quantised array multiplied out; any other leaf as it is.

    Args:
      leaf: a leaf of a parameter tree.

    Returns:
      An array of its shape, in the dtype of its scales.

    Raises:
      ImportError: qwix is not installed.

    >>> import lora_jax as lj
    >>> kernel = jnp.linspace(-1.0, 1.0, 64 * 2).reshape(64, 2)
    >>> bool(jnp.allclose(dense(lj.quantize({"w": kernel}, ["w"], "int8")["w"]), kernel, atol=0.01))
    True
    """
    if not paths.is_quantized(leaf):
        return leaf
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        if leaf.qtype == "nf4":
            return by_blocks(jnp.multiply, _nf4_values(leaf.qvalue, leaf.scale.dtype), leaf.scale)
        return qwix().dequantize(leaf)


def _nf4_levels() -> Any:
    every = qwix().QArray(jnp.arange(16, dtype=jnp.uint4), jnp.ones(1, jnp.float32), qtype="nf4")
    return qwix().dequantize(every)


def nf4_codes(values: Any) -> Any:
    """The number of the nearest level, level by level: qwix holds the distances of a whole kernel for it."""
    nearest, code = jnp.full(values.shape, jnp.inf, jnp.float32), jnp.zeros(values.shape, jnp.int32)
    for number, level in enumerate(_nf4_levels()):
        distance = jnp.abs(level - values)
        nearest, code = jnp.minimum(nearest, distance), jnp.where(distance < nearest, number, code)
    return code.astype(jnp.uint4)


def _nf4_values(codes: Any, dtype: Any) -> Any:
    """The level of each code, by selects: for a look-up a TPU would hold a whole kernel in 32 bits."""
    levels = list(_nf4_levels().astype(dtype))
    for bit in range(4):
        odd = (codes.astype(jnp.int32) >> bit) & 1 == 1
        levels = [jnp.where(odd, high, low) for low, high in zip(levels[::2], levels[1::2])]
    return levels[0]


def by_blocks(fn: Callable[[Any, Any], Any], values: Any, scale: Any) -> Any:
    """`fn(values, scale)` with the scale of each value's block."""
    split, along = [], []
    for size, count in zip(values.shape, scale.shape):
        whole = count in (1, size)
        split += [size] if whole else [count, size // count]
        along += [count] if whole else [count, 1]
    return fn(values.reshape(split), scale.reshape(along)).reshape(values.shape)


def base(leaf: Any) -> Any:
    """A parameter as the base of a weight: a quantised one is made dense at each use."""
    if not paths.is_quantized(leaf):
        return leaf
    spec = dense_shape(leaf)
    return Deferred(leaf, spec.shape, spec.dtype, dense, aligned=True)


def frozen(leaf: Any) -> Any:
    """A parameter without an adapter: a quantised one is a weight without terms."""
    return Weight(base(leaf), ()) if paths.is_quantized(leaf) else leaf

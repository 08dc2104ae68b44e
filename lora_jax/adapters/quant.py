"""Quantised base kernels: `qwix.QArray`s (int8, int4, nf4, fp8), made dense where they are used and never kept.

QLoRA (https://arxiv.org/abs/2305.14314) trains pairs beside such kernels. qwix is an optional extra
(`pip install lora-jax[quant]`), imported when a kernel is quantised or used.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_jax.adapters.words import DTYPES
from lora_jax.adapters.words import check as check
from lora_jax.core import paths
from lora_jax.core.errors import InputError
from lora_jax.core.quantized import by_blocks, dense, nf4_codes, qwix
from lora_jax.core.quantized import dense_shape as dense_shape

__all__ = ["DTYPES", "dense", "quantization_error", "quantize"]


def quantize(variables: Any, targets: Sequence[Any], dtype: str = "nf4", *, block: int | None = 64) -> Any:
    """The tree with some kernels quantised, for `lora(fn)` with or without adapters.

    Each value is rounded to one of 16 or 256 levels times a scale that a block of values along one axis shares: the last axis
    but one if its size is a multiple of the block, or else the longest whose size is. A kernel keeps its sharding.

    Args:
      variables: the parameters.
      targets: patterns, as in `LoraConfig`.
      dtype: `"nf4"`, `"int4"`, `"int8"` or `"fp8"` (float8 e4m3).
      block: how many values share a scale; `None`: a whole axis.

    Returns:
      The tree, with a `qwix.QArray` in the place of each target.

    Raises:
      InputError: a pattern matches nothing, a target is no float array of two axes or more or is quantised already, no axis of
        it can be cut into blocks, or an option is out of range.
      ImportError: qwix is not installed.

    >>> import lora_jax as lj
    >>> params = quantize({"w": jnp.linspace(-1.0, 1.0, 64 * 32).reshape(64, 32), "b": jnp.ones(32)}, ["w"], "int8", block=32)
    >>> params["w"].qvalue.dtype.name, params["w"].scale.shape
    ('int8', (2, 32))
    """
    check("dtype", dtype, block)
    leaves, treedef = paths.flatten(variables)
    chosen = paths.select(leaves, [paths.normalize(pattern) for pattern in targets], "targets")
    axes = {path: block_axis(path, leaves[path], block) for path in chosen}
    found = {path: rounded(leaves[path], dtype, axis, block) for path, axis in axes.items()}
    return jax.tree.unflatten(treedef, list((leaves | found).values()))


def block_axis(path: str, leaf: Any, block: int | None) -> int:
    """The axis along which values share a scale."""
    if paths.is_quantized(leaf):
        raise InputError(f"targets: {path} is quantised already")
    shape = getattr(leaf, "shape", ())
    if len(shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise InputError(f"targets: {path} of the shape {shape} is no float kernel of two axes or more, so it stays dense")
    whole = [axis for axis, size in enumerate(shape) if block is None or size % block == 0]
    if not whole:
        raise InputError(f"block: no axis of {path} of the shape {shape} can be cut into blocks of {block}: give a divisor")
    # Blocks along the last axis cut through a TPU's lanes: its compiler copies the kernels of all layers to avoid that.
    last_but_one = len(shape) - 2
    return last_but_one if block is not None and last_but_one in whole else max(whole, key=lambda axis: shape[axis])


def rounded(array: jax.Array, dtype: str, axis: int, block: int | None) -> Any:
    """An array with one scale for each block along an axis, and for each place on the others.

    Each shard rounds its own blocks; an axis whose blocks the mesh cuts through is gathered first.
    """
    return _rounded(array, DTYPES[dtype], ((axis, block or array.shape[axis]),))


def rounded_like(array: jax.Array, quantized: Any) -> Any:
    """An array rounded to the kind and in the blocks of a quantised one."""
    blocks = tuple((axis, size // count) for axis, (size, count) in enumerate(zip(array.shape, quantized.scale.shape)))
    return _rounded(array, quantized.qtype, tuple((axis, block) for axis, block in blocks if block > 1))


def _rounded(array: jax.Array, qtype: Any, blocks: tuple[tuple[int, int], ...]) -> Any:
    sharding = None if isinstance(array, Tracer) else getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _round(array, qtype, blocks, None)
    shard = sharding.shard_shape(array.shape)
    cut = {axis for axis, block in blocks if shard[axis] % block}
    entries = (None if axis in cut else entry for axis, entry in enumerate(sharding.spec))
    whole = NamedSharding(sharding.mesh, jax.P(*entries)) if cut else sharding
    found = _round(jax.device_put(array, whole), qtype, blocks, whole)
    return dataclasses.replace(found, qvalue=jax.device_put(found.qvalue, sharding))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _round(array: jax.Array, qtype: Any, blocks: tuple[tuple[int, int], ...], sharding: Any) -> Any:
    tiles = dict(blocks)
    others = tuple(i for i in range(array.ndim) if i not in tiles)

    def make(array: jax.Array) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            dtype = array.dtype
            if dtype == jnp.float16:
                array = array.astype(jnp.float32)  # qwix takes its scales below 2^-7 for zero
            found = qwix().quantize(array, qtype, channelwise_axes=others, tiled_axes=tiles)
            if qtype == "nf4":
                # In float32, or whether the quotient is rounded to bfloat16 would depend on the compiler.
                wide, scale = (x.astype(jnp.float32) for x in (array, found.scale))
                found = dataclasses.replace(found, qvalue=nf4_codes(by_blocks(jnp.divide, wide, scale)))
            return dataclasses.replace(found, scale=found.scale.astype(dtype))

    if sharding is None:
        return make(array)
    # As local arrays: of sharded ones some of qwix's reshapes are refused on a mesh of explicit axes.
    return jax.shard_map(make, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(array)


def quantization_error(variables: Any, quantized: Any) -> dict[str, float]:
    """`||W - Q|| / ||W||` (Frobenius) of each quantised kernel.

    Args:
      variables: the dense parameters.
      quantized: the same tree after `quantize`.

    Raises:
      InputError: two leaves of a tree have one path.
      ImportError: qwix is not installed.

    >>> params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
    >>> {path: round(error, 3) for path, error in quantization_error(params, quantize(params, ["w"])).items()}
    {'w': 0.094}
    """
    before, after = (paths.flatten(tree)[0] for tree in (variables, quantized))
    return {path: _relative_error(before[path], dense(leaf)) for path, leaf in after.items() if paths.is_quantized(leaf)}


def _relative_error(kernel: jax.Array, near: jax.Array) -> float:
    wide = kernel.astype(jnp.float32)
    return _norm(wide - near.astype(jnp.float32)) / _norm(wide)


def _norm(array: jax.Array) -> float:
    return math.sqrt(float(jnp.sum(jnp.square(array))))


# --- in use -----------------------------------------------------------------------------------------------------------

"""Parameters from the tensors of files: cast, quantised and put on their devices, one after the other."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from lora_jax.adapters import quant, words
from lora_jax.core import paths
from lora_jax.huggingface.checkpoint_files import Tensors
from lora_jax.huggingface.names import HFName
from lora_jax.sharding import part_shardings

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None
KERNELS = r"re:.*/layer(s|_\d+)/(?!mlp/router/).*/kernel"  # of the layers, in each of the models here; routers stay exact
_AT_A_TIME = 2**18  # values
_ALIGNMENT = 64  # bytes


def parts(tensors: Tensors, name: str) -> Iterator[tuple[slice, np.ndarray]]:
    """A tensor some rows at a time, so that a large one is not held a second time beside what it is copied to."""
    rows, *others = tensors.shapes[name]
    count = max(1, _AT_A_TIME // max(1, math.prod(others)))
    for begin in range(0, rows, count):
        chosen = slice(begin, min(begin + count, rows))
        yield chosen, tensors.read(name, chosen)


def fill(tensors: Tensors, name: HFName, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """A parameter in the chosen dtype, from its tensors."""
    out = _aligned(shape, dtype)
    for index, tensor in name.tensors(shape).items():
        _copy(tensors, tensor, name.export(out, index))
    return out


def fill_slices(tensors: Tensors, name: HFName, shape: tuple[int, ...], dtype: Any) -> Iterator[np.ndarray]:
    """The slices of a parameter along its first axis, each from tensors of its own."""
    by_slice = itertools.groupby(name.tensors(shape).items(), key=lambda item: item[0][0])
    for _, own in by_slice:
        out = _aligned((1, *shape[1:]), dtype)
        for (_, *others), tensor in own:
            _copy(tensors, tensor, name.export(out, (0, *others)))
        yield out[0]


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins where JAX on a CPU can take it as it is, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(tensors: Tensors, name: str, out: np.ndarray) -> None:
    """`out` is a view of a parameter, as no tensor of the models here joins axes."""
    for rows, part in parts(tensors, name):
        out[rows] = part


def put(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array on its devices, which a CPU takes as it is, so that a base is not in memory twice.

    The transfer has ended on return, so that the host's copy can go.
    """
    if sharding is None:
        return jax.block_until_ready(jax.device_put(array))
    return jax.block_until_ready(jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]))


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads parameters one after the other: cast, rounded where that is asked for, and put on their devices.

    Args:
      tensors: the files.
      dtype: of the parameters.
      sharding: where the parameters go: one sharding for all, or a function of (path, shape).
      quantize: the kind of the layers' kernels, as in `quant.quantize`; `None`: they stay dense.
      block: how many values share a scale; `None`: 64.

    Raises:
      InputError: there is no such kind or block, or a block without a kind.
    """

    tensors: Tensors
    dtype: Any
    sharding: Sharding = None
    quantize: str | None = None
    block: int | None = None

    def __post_init__(self):
        words.check_base(self.quantize, self.block)

    def place(self, path: str, shape: tuple[int, ...]) -> Any:
        """Where a parameter goes; `None` for the default device."""
        return self.sharding(path, shape) if callable(self.sharding) else self.sharding

    def read(self, path: str, name: HFName, shape: tuple[int, ...]) -> Any:
        """A parameter: of one tensor, or stacked of several along its first axis."""
        sharding = self.place(path, shape)
        if self.quantize is None or not paths.matches(path, KERNELS):
            return put(fill(self.tensors, name, shape, self.dtype), sharding)
        on_mesh = isinstance(sharding, NamedSharding)
        if name.indexed:
            one = NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:])) if on_mesh else sharding
            slices = fill_slices(self.tensors, name, shape, self.dtype)
            found = _stack((self._rounded(path, array, one) for array in slices), shape[0])
        else:
            found = self._rounded(path, fill(self.tensors, name, shape, self.dtype), sharding)
        return jax.device_put(found, part_shardings(found, sharding)) if on_mesh else found

    def _rounded(self, path: str, array: np.ndarray, sharding: Any) -> Any:
        """The dense array is gone on return."""
        assert self.quantize is not None
        block = self.block or 64
        axis = quant.block_axis(path, array, block)
        return jax.block_until_ready(quant.rounded(put(array, sharding), self.quantize, axis, block))


def _stack(slices: Iterator[Any], count: int) -> Any:
    """The slices as one kernel, each put in its place before the next is made."""
    stack: Any = None
    dtype: Any = None
    for i, part in enumerate(slices):
        if stack is None:
            dtype = part.qvalue.dtype
            empty = functools.partial(_empty, count)
            stack = dataclasses.replace(part, qvalue=empty(part.qvalue, _is_narrow(part.qvalue)), scale=empty(part.scale))
        stack = jax.block_until_ready(_insert(stack, part, i))
    return stack if stack.qvalue.dtype == dtype else dataclasses.replace(stack, qvalue=_from_bytes(stack.qvalue, dtype))


def _is_narrow(array: jax.Array) -> bool:
    """Whether XLA on a CPU widens an array to copy it, where it copies bytes as they are and in place."""
    return array.dtype != jnp.int8 and array.shape[-1] % 2 == 0 and len(array.sharding.device_set) == 1


def _empty(count: int, part: jax.Array, as_bytes: bool = False) -> jax.Array:
    """A stack of zeros for parts like this one."""
    place: Any = part.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, jax.P(None, *place.spec))
    spec = jax.eval_shape(_as_bytes, part) if as_bytes else part
    return jnp.zeros((count, *spec.shape), spec.dtype, device=place)


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stack: Any, part: Any, place: Any) -> Any:
    def put(whole: jax.Array, one: jax.Array) -> jax.Array:
        one = one if one.dtype == whole.dtype else _as_bytes(one)
        return lax.dynamic_update_index_in_dim(whole, one, place, 0)

    return jax.tree.map(put, stack, part)


def _as_bytes(array: jax.Array) -> jax.Array:
    """Two integers of four bits in a byte, or one small float."""
    in_pairs = array.reshape(*array.shape[:-1], -1, 2) if jnp.issubdtype(array.dtype, jnp.integer) else array
    return lax.bitcast_convert_type(in_pairs, jnp.uint8)


@functools.partial(jax.jit, static_argnums=1)
def _from_bytes(array: jax.Array, dtype: Any) -> jax.Array:
    values = lax.bitcast_convert_type(array, dtype)
    return values.reshape(*array.shape[:-1], -1)

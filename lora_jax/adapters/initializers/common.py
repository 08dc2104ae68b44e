"""What the initialisers share: the pairs of a set with their kernels, as stacks of matrices."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import sharding
from lora_jax.adapters.algebra import kernel_stack, matrices, scales, within_ranks
from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, Layout, LowRank, attach, is_adapted, wide_dtype
from lora_jax.core.errors import InputError

Adapters = Mapping[str, Adapter]


def with_kernels(variables: Any, adapters: Adapters, *, quantized: bool = False) -> dict[str, tuple[Any, LowRank]]:
    """`{path: (kernel, pair)}` of the low-rank pairs; adapters of other kinds are left out.

    Args:
      variables: the base tree.
      adapters: what `init` made.
      quantized: whether a kernel may be quantised.

    Raises:
      InputError: there is no pair; a pair is more than `scale A B`, its scale is not positive, or it does not fit the tree; or
        its kernel is not at hand as floats.
    """
    pairs = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, LowRank)}
    if not pairs:
        raise InputError("the adapters have no low-rank pair, so there is nothing to initialise")
    for path, pair in pairs.items():
        _check(path, pair)
    nodes, _ = paths.flatten(attach(variables, pairs), is_leaf=is_adapted)
    found = {path: (nodes[path].base, pair) for path, pair in pairs.items()}
    for path, (kernel, _) in found.items():
        if isinstance(kernel, jax.ShapeDtypeStruct):
            raise InputError(f"{path}: an initialiser needs the kernel itself, not its shape alone")
        if paths.is_quantized(kernel) and not quantized:
            raise InputError(f"{path}: the kernel is quantised, and this needs the dense one: quantise after it")
        if not jnp.issubdtype(kernel.dtype, jnp.floating):
            raise InputError(f"{path}: a kernel of the dtype {kernel.dtype} can't be split; give the one before quantisation")
    return found


def _check(path: str, pair: LowRank) -> None:
    if pair.extras:
        raise InputError(
            f"{path}: the adapter's {pair.extras[0]} is set, so it is more than the change scale A B that an initialiser "
            "makes: its start is that of LoraConfig(init=...)"
        )
    if isinstance(pair.scale, float) and pair.scale <= 0:
        raise InputError(f"{path}: the adapter's scale is {pair.scale}; an initialiser needs a positive one")


def split_off(
    variables: Any, adapters: Adapters, make: Callable[[str, jax.Array, LowRank], LowRank]
) -> tuple[Any, dict[str, Adapter]]:
    """The pairs that `make(path, kernel, pair)` gives, and the base `W - s A B` that goes with them."""
    pairs = with_kernels(variables, adapters)
    fresh = {path: make(path, kernel, pair) for path, (kernel, pair) in pairs.items()}
    leaves, treedef = paths.flatten(variables)
    leaves |= {path: _rest(leaves[path], pair) for path, pair in fresh.items()}
    return jax.tree.unflatten(treedef, list(leaves.values())), {**adapters, **fresh}


def _rest(kernel: jax.Array, pair: LowRank) -> jax.Array:
    rest = _minus_pair(kernel, pair)
    return jax.device_put(rest, kernel.sharding) if sharding.on_mesh(kernel) else rest


@jax.jit
def _minus_pair(kernel: jax.Array, pair: LowRank) -> jax.Array:
    """`W - s A B`, one matrix of a stack after the other."""

    def one(matrices: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        w, a, b = matrices
        change = jnp.matmul(a, b, precision="highest")
        wide = wide_dtype(w, change)
        return (w.astype(wide) - change.astype(wide)).astype(kernel.dtype)

    a, b = matrices(pair)
    scaled = b * scales(pair, b.dtype)[..., None]
    return as_kernel(jax.lax.map(one, (kernel_stack(kernel, pair.layout), a, scaled)), kernel, pair.layout)


def sides(pair: LowRank) -> tuple[int, int]:
    """How many values lie along the kernel's in axes, and along its out axes."""
    batch = len(pair.layout.batch)
    return math.prod(pair.a.shape[batch:-1]), math.prod(pair.b.shape[batch + 1 :])


# --- inside jit -------------------------------------------------------------------------------------------------------

_MATRIX = Layout((), (0,), (1,))


def map_matrices(fn: Callable[..., Any], kernel: jax.Array, pair: LowRank, *stacks: jax.Array) -> Any:
    """What `fn(kernel, pair, *slices)` gives for the matrices of a stack, one after the other.

    So there is never more of a decomposition, or of the kernel in float32, than that of one matrix.

    Args:
      fn: from a kernel `(in, out)` in its own dtype, a pair of zeros with its rank and scale, and a slice of each stack.
      kernel: the whole kernel.
      pair: the whole pair.
      stacks: arrays `(count, ...)`.
    """
    fan_in, fan_out = sides(pair)
    a, b = jnp.zeros((fan_in, pair.rank), pair.a.dtype), jnp.zeros((pair.rank, fan_out), pair.b.dtype)
    flat = kernel_stack(kernel, pair.layout)
    scale = jnp.broadcast_to(scales(pair, wide_dtype(kernel))[:, 0], flat.shape[:1])

    def one(slices: tuple[jax.Array, ...]) -> Any:
        # The barrier keeps XLA from laying the whole stack out anew, as a decomposition wants its matrix.
        matrix, scale, *others = jax.lax.optimization_barrier(slices)
        return fn(matrix, LowRank(a, b, _MATRIX, scale), *others)

    return jax.lax.map(one, (flat, scale, *stacks))


def by_matrix(fn: Callable[..., LowRank], kernel: jax.Array, pair: LowRank, *stacks: jax.Array) -> LowRank:
    """The pair of a stack from the pairs of its matrices, as `map_matrices` makes them."""
    made = map_matrices(fn, kernel, pair, *stacks)
    return within_ranks(pair, made.a, made.b)


def as_kernel(flat: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """The inverse of `algebra.kernel_matrices`, in the kernel's shape and dtype."""
    order = (*layout.batch, *layout.inputs, *layout.outputs)
    shape = [like.shape[axis] for axis in order]
    return flat.reshape(shape).transpose(np.argsort(order)).astype(like.dtype)


def svd(flat: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U `(count, in, k)`, the singular values `(count, k)`, largest first, and V^T `(count, k, out)`."""
    u, s, vt = jnp.linalg.svd(flat, full_matrices=False)
    return u, s, vt


def smallest_first(u: jax.Array, s: jax.Array, vt: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A singular value decomposition in the other order."""
    return u[..., ::-1], s[..., ::-1], vt[..., ::-1, :]

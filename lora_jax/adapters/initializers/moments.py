"""The inputs of each adapted kernel, as their first and second moments: what data-driven initialisers start from."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, Layout, LowRank, attach, is_adapted
from lora_jax.core.errors import InputError
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.methods.moments import ObservedTerm
from lora_jax.core.rules import RULES
from lora_jax.core.tracing import walk
from lora_jax.core.weight import Weight, WeightContext


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over the inputs x that a kernel meets, its in axes as one; add those of several batches with `jax.tree.map`.

    Args:
      count: how many inputs, `(*batch)`.
      total: the sum of x, `(*batch, in)`.
      second: the sum of `x x^T`, `(*batch, in, in)`.
    """

    count: jax.Array
    total: jax.Array
    second: jax.Array


def moments(
    fn: Callable[..., Any], variables: Any, adapters: Mapping[str, Adapter], *args: Any, **kwargs: Any
) -> dict[str, Moments]:
    """The moments of the inputs of each kernel that has a pair, in one traced pass of `fn(variables, *args, **kwargs)`.

    They are taken up by the backward pass, as the gradient of something that changes no result, and so come out of scans,
    `jax.checkpoint` and `vmap` added up. Takes `in x in` numbers for each kernel. For many batches compile it:
    `jax.jit(functools.partial(moments, fn))`.

    Args:
      fn: any function whose first argument is the parameter tree. A use that no float result depends on (behind a
        `stop_gradient` or an `argmax`) is not seen.
      variables: the base tree.
      adapters: from `init`; only their layouts are used.
      args: what `fn` takes after the tree.
      kwargs: likewise.

    Returns:
      `{path: Moments}`, each the sums `count` `(*batch)`, `total` `(*batch, in)` and `second` `(*batch, in, in)`.

    Raises:
      InputError: no adapter is a pair, or (outside `jit`) no input reached a kernel, or a matrix of its stack.
      NotLowRankError: a kernel is used other than as a whole by plain products (by a convolution or a lookup, say).

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> model = lambda params, x: x @ params["w"]
    >>> variables, x = {"w": jnp.ones((2, 3))}, jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), model, variables, x)
    >>> found = moments(model, variables, adapters, x)["w"]
    >>> float(found.count), found.total.tolist(), found.second.tolist()
    (2.0, [4.0, 6.0], [[10.0, 14.0], [14.0, 20.0]])
    """
    nodes, treedef = paths.flatten(attach(variables, adapters), is_leaf=is_adapted)
    leaves = [node.base if is_adapted(node) else node for node in nodes.values()]
    layouts = {path: adapter.layout for path, adapter in adapters.items() if isinstance(adapter, LowRank)}
    if not layouts:
        raise InputError("no adapter is a low-rank pair, so there is no kernel whose inputs could be taken")
    shapes = {path: leaf.shape for path, leaf in zip(nodes, leaves) if path in layouts}

    def value(path: str, leaf: Any, sums: dict[str, jax.Array]) -> Any:
        return _observed(path, leaf, layouts[path], sums[path]) if path in layouts else quantized.frozen(leaf)

    def total(sums: dict[str, jax.Array]) -> jax.Array:
        values = [value(path, leaf, sums) for path, leaf in zip(nodes, leaves)]
        out, _ = walk(WeightContext(RULES), fn, treedef, leaves, values, args, kwargs)
        results = [leaf for leaf in jax.tree.leaves(out) if _is_float(leaf)]
        return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in results), jnp.zeros(()))

    grads = jax.grad(total)({path: jnp.zeros(_sums_shape(layouts[path], shapes[path])) for path in layouts})
    found = {path: _split(sums, layouts[path], shapes[path]) for path, sums in grads.items()}
    check_reached(found)
    return found


def check_reached(found: Mapping[str, Moments]) -> None:
    """Raise an InputError for a kernel, or a matrix of a stack, that no input reached; inside `jit` nothing can be said."""
    for path, sums in found.items():
        try:
            idle = np.argwhere(np.asarray(sums.count) == 0).tolist()
        except jax.errors.TracerArrayConversionError:
            return
        if idle:
            which = f" (matrices {idle} of its stack)" if idle[0] else ""
            raise InputError(f"no input reached {path}{which}: the function's float results must depend on all of it")


def _is_float(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _sizes(layout: Layout, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """The batch sizes, and how many inputs a kernel has."""
    return tuple(shape[axis] for axis in layout.batch), math.prod(shape[axis] for axis in layout.inputs)


def _sums_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    batch, inputs = _sizes(layout, shape)
    return (*batch, (inputs + 1) ** 2)


def _observed(path: str, leaf: Any, layout: Layout, sums: jax.Array) -> Weight:
    """A weight whose only term takes in what its products meet; an identity matrix brings the in axes into order."""
    _, inputs = _sizes(layout, leaf.shape)
    eye = jnp.eye(inputs).reshape(*(leaf.shape[axis] for axis in layout.inputs), inputs)
    factors = (Factor(eye, (*layout.inputs, RANK)),)
    return Weight(quantized.base(leaf), (ObservedTerm(factors, path, Factor(sums, (*layout.batch, RANK))),))


def _split(sums: jax.Array, layout: Layout, shape: tuple[int, ...]) -> Moments:
    batch, inputs = _sizes(layout, shape)
    grid = sums.reshape(*batch, inputs + 1, inputs + 1)
    return Moments(grid[..., -1, -1], grid[..., -1, :-1], grid[..., :-1, :-1])

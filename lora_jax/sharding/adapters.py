"""Where adapters live on a mesh: each array along the axes of its kernel that it shares, with nothing gathered.

A kernel W with the sharding `(data, model)` over its in and out axes has an A `(in, r)` along `data`, a B `(r, out)` along
`model`, and a magnitude, bias or `lambda_b` `(out)` along `model`; the rank is never cut. `init` makes adapters so, and
`train.init_state` the optimiser's state; the compiler (GSPMD) does the rest.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from lora_jax.core import paths
from lora_jax.core.adapter import PARTS, Adapter, Full, LowRank
from lora_jax.core.errors import InputError
from lora_jax.sharding.mesh import checked, entries, named


def adapter_shardings(variables: Any, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The sharding of each array of an adapter set, from the shardings of the parameters.

    A takes the mesh axes of W's in axes, B, magnitude, bias and `lambda_b` those of its out axes, and all of them, `lambda_d`
    and scale those of its batch axes; a `Full` copy takes the parameter's own, and `Rows` those of the out axes.

    Args:
      variables: the parameters: sharded arrays, `jax.ShapeDtypeStruct`s with shardings, or `NamedSharding`s alone. Those
        without an adapter may be anything.
      adapters: `{path: adapter}`, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The set with a `NamedSharding` in the place of each array, for `jax.device_put` or `jit`.

    Raises:
      InputError: a path is not in the tree, its parameter has no `NamedSharding`, or that does not fit the adapter's shape.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> mesh = make_mesh({"data": 1, "model": 1}, jax.devices()[:1])
    >>> from lora_jax.core.adapter import Layout
    >>> pair = LowRank(jnp.ones((4, 2)), jnp.ones((2, 6)), Layout((), (0,), (1,)))
    >>> pair = adapter_shardings({"w": NamedSharding(mesh, jax.P("data", "model"))}, {"w": pair})["w"]
    >>> pair.a.spec, pair.b.spec
    (P('data',), P(None, 'model'))
    """
    leaves, _ = paths.flatten(variables)
    for path in adapters:
        if path not in leaves:
            near = "".join(f"\n  {near}" for near in paths.near_misses(leaves, path))
            raise InputError(f"the adapter {path!r} has no parameter in this tree. The nearest paths are:{near}")
        if not on_mesh(leaves[path]):
            raise InputError(f"{path}: the parameter has no NamedSharding: put it on a mesh with jax.device_put first")
    return {path: _follow(path, _sharding(leaves[path]), adapter) for path, adapter in adapters.items()}


def _sharding(leaf: Any) -> Any:
    leaf = leaf.qvalue if paths.is_quantized(leaf) else leaf
    return leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None)


def on_mesh(leaf: Any) -> bool:
    """Whether a parameter, or its sharding, is laid over a mesh."""
    return isinstance(_sharding(leaf), NamedSharding)


def devices(leaf: Any) -> frozenset[Any] | None:
    """Where a parameter lies; None for one of the host."""
    sharding = _sharding(leaf)
    return None if sharding is None else frozenset(sharding.device_set)


def _follow(path: str, sharding: NamedSharding, adapter: Any) -> Any:
    """An adapter's shardings from its parameter's."""
    if isinstance(adapter, Full):
        axes, parts = {"all": tuple(range(jnp.ndim(adapter.value)))}, {"value": ("all",)}
    else:
        axes = {**dataclasses.asdict(adapter.layout), "rank": (None,), "rows": (None,)}
        parts = PARTS if isinstance(adapter, LowRank) else {"values": ("rows", "outputs")}
    spec = entries(sharding.spec, sum(axis is not None for role in axes.values() for axis in role))
    mesh = sharding.mesh

    def place(name: str) -> NamedSharding:
        cut = tuple(() if axis is None else spec[axis] for role in parts[name] for axis in axes[role])
        return named(mesh, checked(path, mesh, cut, jnp.shape(getattr(adapter, name))))

    return dataclasses.replace(adapter, **{name: place(name) for name in adapter.children()})


def is_abstract(tree: Any) -> bool:
    """Whether an array of a tree is only a shape."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def place_shapes(shapes: Any, shardings: Any) -> Any:
    """A tree of `jax.ShapeDtypeStruct`s with a tree of shardings on them."""
    return jax.tree.map(lambda shape, sharding: shape.update(sharding=sharding), shapes, shardings)


def make(fn: Callable[..., Any], shardings: Callable[[Any], Any], *args: Any) -> Any:
    """`fn(*args)` in one program that makes each result where it belongs, or only the shapes where an argument is one.

    Args:
      fn: makes a tree of arrays from arrays.
      shardings: from the shapes of the results to their shardings, a tree of the same structure.
      args: arrays, or `jax.ShapeDtypeStruct`s.
    """
    shapes = jax.eval_shape(fn, *args)
    placed = shardings(shapes)
    if is_abstract(args):
        return place_shapes(shapes, placed)
    return jax.jit(fn, out_shardings=placed)(*args)


def put(array: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array that every process has, copied to where it belongs: each process puts the parts of its own devices there.

    A copy, so that steps may be given the array's memory (`donate_argnums`), and the source may change.

    Args:
      array: of any shape that the sharding can cut; the same in every process.
      sharding: where it goes.

    Returns:
      An array of the same shape.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
    >>> put(np.ones((4, 6)), NamedSharding(mesh, jax.P("data"))).sharding.spec
    P('data',)
    """
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


def put_beside(variables: Any, adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The set, with each adapter whose parameter is on a mesh on it, too."""
    leaves, _ = paths.flatten(variables)
    some = {path: adapter for path, adapter in adapters.items() if on_mesh(leaves[path])}
    places = adapter_shardings(variables, some)
    return {**adapters, **jax.tree.map(lambda leaf, place: put(np.asarray(leaf), place), some, places)}


def gather(tree: Any) -> Any:
    """The tree with arrays that this process can read: those that are spread over several hosts are gathered, in one program.

    Every process has to call it.

    Args:
      tree: any pytree.

    >>> np.asarray(gather({"w": jnp.ones(2)})["w"]).tolist()
    [1.0, 1.0]
    """
    leaves, treedef = jax.tree.flatten(tree)
    spread = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _is_readable(leaf)}
    if spread:
        mesh = next(_sharding(leaf).mesh for leaf in spread.values())
        spread = jax.jit(_same, out_shardings=NamedSharding(mesh, jax.P()))(spread)
    return jax.tree.unflatten(treedef, [spread.get(i, leaf) for i, leaf in enumerate(leaves)])


def _is_readable(leaf: jax.Array) -> bool:
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def _same(tree: Any) -> Any:  # a function with a name, so that `gather` compiles once
    return tree


def state_shardings(state: Any, adapters: Mapping[str, Adapter]) -> Any:
    """The shardings of a state that holds arrays for adapters, as an optimiser's does: those of the adapters, by path.

    Args:
      state: a tree of arrays or `jax.ShapeDtypeStruct`s. A leaf whose path ends like an adapter's array, of the same shape,
        goes where that array is; all others are replicated.
      adapters: `{path: adapter}`, those that are on a mesh on one; arrays of the others are replicated, too.

    Returns:
      The same tree with `NamedSharding`s.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> place = NamedSharding(make_mesh({"data": 1}, jax.devices()[:1]), jax.P("data"))
    >>> adapters = {"head": Full(jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place))}
    >>> moments = {"head": Full(jax.ShapeDtypeStruct((4,), jnp.float32))}
    >>> found = state_shardings({"count": jax.ShapeDtypeStruct((), jnp.int32), "mu": moments}, adapters)
    >>> found["mu"]["head"].value.spec, found["count"].spec
    (P('data',), P())
    """
    arrays = {key_path: leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(dict(adapters)) if on_mesh(leaf)}
    whole = NamedSharding(next(iter(arrays.values())).sharding.mesh, jax.P())

    def place(key_path: Any, leaf: Any) -> NamedSharding:
        like = next((arrays[tail] for start in range(len(key_path)) if (tail := key_path[start:]) in arrays), None)
        return whole if like is None or like.shape != leaf.shape else like.sharding

    return jax.tree_util.tree_map_with_path(place, state)

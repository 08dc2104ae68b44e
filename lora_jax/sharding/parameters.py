"""Where adapters live on a mesh: each array along the axes of its kernel that it shares, with nothing gathered.

A kernel W with the sharding `(data, model)` over its in and out axes has an A `(in, r)` along `data`, a B `(r, out)` along
`model`, and a magnitude, bias or `lambda_b` `(out)` along `model`; the rank is never cut. `init` makes adapters so, and
`train.init_state` the optimiser's state; the compiler (GSPMD) does the rest.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding

from lora_jax.core import paths
from lora_jax.core.adapter import PARTS, Adapter, Full, LowRank

Spec = tuple[tuple[str, ...], ...]  # the mesh axes of each axis of an array
AXES = ("data", "fsdp", "model")  # what the mesh axes of the models here are called


def read_axes(text: str) -> dict[str, int]:
    """The axes of a mesh, the slowest first.

    >>> read_axes("data=2,model=4")
    {'data': 2, 'model': 4}
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in axes or not re.fullmatch("[1-9][0-9]*", size):
            form = f"each of {', '.join(AXES)} at most once and with a size, as in data=2,model=4"
            raise ValueError(f"--mesh must have {form}; {part!r} in {text!r} can't be used")
        axes[name] = int(size)
    return axes


def make_mesh(axes: Mapping[str, int], devices: Any = None) -> Mesh:
    """A mesh of all devices whose axes the compiler propagates (`AxisType.Auto`).

    Args:
      axes: `{name: size}`, the slowest first; the sizes multiply to the number of devices.
      devices: which devices; all of them by default.

    >>> dict(make_mesh({"data": 1, "model": 1}, jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(axes.values()) != len(devices):
        raise ValueError(f"axes: {dict(axes)} needs {math.prod(axes.values())} devices, and there are {len(devices)}")
    # A TPU's axes may be split: 4 x 4 chips as 8 x 2, too.
    grid = mesh_utils.create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


# --- parameters -------------------------------------------------------------------------------------------------------


def parameter_shardings(
    mesh: Mesh, variables: Any, rules: Mapping[Any, jax.P] | None = None, *, fsdp: str | None = None
) -> Any:
    """Shardings for a tree of parameters, from rules for their paths.

    Data parallel: no rules. FSDP: `fsdp="data"`. Tensor parallel: rules that name the model's axis, such as
    `{"up/kernel": jax.P(None, "model"), "down/kernel": jax.P("model", None)}`. A rule and `fsdp` go together: the fsdp axis
    then cuts an axis that the rule leaves whole.

    Args:
      mesh: a mesh.
      variables: the parameters, arrays or `jax.ShapeDtypeStruct`s, quantised or not.
      rules: `{pattern: jax.P}`, patterns as in `LoraConfig`; the first match wins. Without a match a parameter is replicated.
      fsdp: a mesh axis that cuts the largest axis of each parameter which it divides and no other mesh axis cuts.

    Returns:
      The same tree of `NamedSharding`s, for `jax.device_put` or `jit`.

    Raises:
      ValueError: a pattern matches nothing; a rule names a mesh axis that does not exist, or one axis twice, or does not fit
        a parameter's shape.

    >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
    >>> parameter_shardings(mesh, {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}, {"w": jax.P("data")}, fsdp="data")["b"].spec
    P('data',)
    """
    leaves, treedef = paths.flatten(variables)
    table = {paths.normalize(pattern): spec for pattern, spec in (rules or {}).items()}
    for pattern in table:
        paths.select(leaves, [pattern], "rules")
    if fsdp is not None and fsdp not in mesh.shape:
        raise ValueError(f"fsdp: the mesh has no axis {fsdp!r}; its axes are {dict(mesh.shape)}")
    rule = lambda path: next((spec for pattern, spec in table.items() if paths.matches(path, pattern)), jax.P())
    return jax.tree.unflatten(treedef, [_by_rule(mesh, path, leaf, rule(path), fsdp) for path, leaf in leaves.items()])


def model_shardings(mesh: Mesh, variables: Any, *, columns: Sequence[str], rows: Sequence[str]) -> Any:
    """Shardings for a transformer on a mesh with some of the axes `data`, `fsdp` and `model`.

    `data` cuts no parameter and `fsdp` the largest free axis of each. `model` cuts the dense layers as Megatron-LM does
    (https://arxiv.org/abs/1909.08053): those before the non-linearity by columns, those after it by rows.

    Args:
      mesh: its axes are among `AXES`; a batch is cut by `batch_sharding`.
      variables: the parameters, as for `parameter_shardings`.
      columns: the names of modules whose last axis `model` cuts, biases too.
      rows: the names of modules of which it cuts the last axis but one.

    Raises:
      ValueError: the mesh has another axis, or one that does not divide a parameter's.
    """
    if unknown := set(mesh.shape) - set(AXES):
        raise ValueError(f"mesh: the axes are {', '.join(AXES)}; there is no {', '.join(sorted(unknown))}")
    rules = {}
    for path, leaf in paths.flatten(variables)[0].items() if "model" in mesh.shape else ():
        (module, name), ndim = path.split("/")[-2:], len(leaf.shape)
        if module in columns:
            rules[path] = jax.P(*(None,) * (ndim - 1), "model")
        elif module in rows and name != "bias":
            rules[path] = jax.P(*(None,) * (ndim - 2), "model")
    return parameter_shardings(mesh, variables, rules, fsdp="fsdp" if "fsdp" in mesh.shape else None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch goes: its rows along `data` and `fsdp`.

    >>> batch_sharding(make_mesh({"fsdp": 1, "model": 1}, jax.devices()[:1])).spec
    P('fsdp',)
    """
    return _named(mesh, (_batch_axes(mesh),))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in AXES[:2] if name in mesh.shape)


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many equal parts a batch is cut; without a mesh it is one.

    >>> batch_parts(make_mesh({"fsdp": 1, "model": 1}, jax.devices()[:1]))
    1
    """
    return 1 if mesh is None else _size(mesh, _batch_axes(mesh))


def check_batch(mesh: Mesh | None, size: int) -> None:
    """Raise a ValueError unless a batch of this size can be cut so."""
    if mesh is not None and size % batch_parts(mesh):
        axes = " and ".join(_batch_axes(mesh))
        raise ValueError(
            f"batch_size {size} can't be cut into the {batch_parts(mesh)} equal parts that the mesh axes {axes} ask for: "
            f"take a multiple of {batch_parts(mesh)}"
        )


def round_up(mesh: Mesh | None, size: int) -> int:
    """The next size of a batch that can be cut so."""
    return -(-size // batch_parts(mesh)) * batch_parts(mesh)


def batch_rows(mesh: Mesh | None, size: int) -> np.ndarray:
    """Which rows of a batch of this size the devices of this process hold, in growing order; without a mesh, all."""
    if mesh is None:
        return np.arange(size)
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def place_batch(mesh: Mesh | None, batch: Mapping[str, np.ndarray], size: int) -> dict[str, Any]:
    """The batch on the mesh, from the rows that `batch_rows` says, of which each process has its own; without a mesh, as it is.

    Args:
      mesh: its axes are among `AXES`.
      batch: arrays `(rows, ...)`.
      size: the rows of all processes together.
    """
    if mesh is None:
        return dict(batch)
    rows, sharding = batch_rows(mesh, size), batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        part = lambda index: array[np.searchsorted(rows, np.arange(size)[index[0]])]
        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}


def by_path(shardings: Callable[[Any], Any]) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The sharding of one parameter by its path and shape, as loaders take it, from a function of a tree of parameters.

    >>> mesh = make_mesh({"model": 1}, jax.devices()[:1])
    >>> columns = lambda tree: model_shardings(mesh, tree, columns=("up",), rows=())
    >>> by_path(columns)("params/up/kernel", (4, 6)).spec
    P(None, 'model')
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        tree: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        for name in reversed(path.split("/")):
            tree = {name: tree}
        return jax.tree.leaves(shardings(tree))[0]

    return place


def _by_rule(mesh: Mesh, path: str, leaf: Any, rule: jax.P, fsdp: str | None) -> Any:
    shape = jnp.shape(leaf.qvalue if paths.is_quantized(leaf) else leaf)
    spec = _check(path, mesh, _entries(rule, len(shape)), shape)
    if fsdp is not None and fsdp not in sum(spec, ()):
        free = [axis for axis, size in enumerate(shape) if not spec[axis] and size % mesh.shape[fsdp] == 0]
        largest = max(free, key=lambda axis: shape[axis], default=None)
        spec = tuple((fsdp,) if axis == largest else names for axis, names in enumerate(spec))
    return part_shardings(leaf, _named(mesh, spec))


def part_shardings(leaf: Any, sharding: NamedSharding) -> Any:
    """The shardings of the arrays of a quantised kernel, in its structure, from the kernel's; of an array, its own.

    Several values share a scale, so a mesh axis may divide the values and not the scales.
    """
    mesh: Any = sharding.mesh
    place = lambda shape: _named(mesh, _where_it_divides(mesh, _entries(sharding.spec, len(shape)), shape))
    return jax.tree.map(lambda part: place(jnp.shape(part)), leaf)


def _entries(partition: Any, ndim: int) -> Spec:
    """A partition spec with an entry for each axis."""
    names = lambda entry: () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return tuple(map(names, partition)) + ((),) * (ndim - len(partition))


def _check(path: str, mesh: Any, spec: Spec, shape: tuple[int, ...]) -> Spec:
    """The same, or a ValueError where an array of this shape can't be cut so."""
    problem, used = "", collections.Counter(sum(spec, ()))
    if unknown := set(used) - set(mesh.shape):
        problem = f"the mesh has no axis {', '.join(sorted(unknown))}; its axes are {dict(mesh.shape)}"
    elif len(spec) > len(shape):
        problem = f"there are {len(spec)} entries for {len(shape)} axes"
    elif twice := [name for name, count in used.items() if count > 1]:
        problem = f"the mesh axis {twice[0]!r} is in it twice"
    elif uneven := [axis for axis, names in enumerate(spec) if shape[axis] % _size(mesh, names)]:
        problem = f"the axis {uneven[0]} can't be cut into {_size(mesh, spec[uneven[0]])} equal parts"
    if problem:
        raise ValueError(f"{path} of the shape {shape} can't have the sharding {_partition(spec)}: {problem}")
    return spec


def _size(mesh: Mesh, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _where_it_divides(mesh: Mesh, spec: Spec, shape: tuple[int, ...]) -> Spec:
    return tuple(names if size % _size(mesh, names) == 0 else () for names, size in zip(spec, shape))


def _partition(spec: Spec) -> jax.P:
    """The spec as the compiler writes it, without whole axes at the end: or the second step would be compiled again."""
    entries: list[Any] = [names if len(names) > 1 else names[0] if names else None for names in spec]
    while entries and entries[-1] is None:
        entries.pop()
    return jax.P(*entries)


def _named(mesh: Any, spec: Spec) -> NamedSharding:
    return NamedSharding(mesh, _partition(spec))


# --- adapters ---------------------------------------------------------------------------------------------------------


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
      ValueError: a path is not in the tree, its parameter has no `NamedSharding`, or that does not fit the adapter's shape.

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
            raise ValueError(f"the adapter {path!r} has no parameter in this tree. The nearest paths are:{near}")
        if not on_mesh(leaves[path]):
            raise ValueError(f"{path}: the parameter has no NamedSharding: put it on a mesh with jax.device_put first")
    return {path: _follow(path, _sharding(leaves[path]), adapter) for path, adapter in adapters.items()}


def _sharding(leaf: Any) -> Any:
    leaf = leaf.qvalue if paths.is_quantized(leaf) else leaf
    return leaf if isinstance(leaf, Sharding) else getattr(leaf, "sharding", None)


def on_mesh(leaf: Any) -> bool:
    """Whether a parameter, or its sharding, is laid over a mesh."""
    return isinstance(_sharding(leaf), NamedSharding)


def _follow(path: str, sharding: NamedSharding, adapter: Any) -> Any:
    """An adapter's shardings from its parameter's."""
    if isinstance(adapter, Full):
        axes, parts = {"all": tuple(range(jnp.ndim(adapter.value)))}, {"value": ("all",)}
    else:
        axes = {**dataclasses.asdict(adapter.layout), "rank": (None,), "rows": (None,)}
        parts = PARTS if isinstance(adapter, LowRank) else {"values": ("rows", "outputs")}
    spec = _entries(sharding.spec, sum(axis is not None for role in axes.values() for axis in role))
    cut = lambda name: tuple(() if axis is None else spec[axis] for role in parts[name] for axis in axes[role])
    named = lambda name: _named(sharding.mesh, _check(path, sharding.mesh, cut(name), jnp.shape(getattr(adapter, name))))
    return dataclasses.replace(adapter, **{name: named(name) for name in adapter.children()})


# --- making -----------------------------------------------------------------------------------------------------------


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
    """An array that every process has, copied to where it belongs: each process puts the parts of its own devices there."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


def gather(tree: Any) -> Any:
    """The tree with arrays that this process can read: those that are spread over several hosts are gathered, in one program.

    Every process has to call it.
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
    """
    arrays = {key_path: leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(dict(adapters)) if on_mesh(leaf)}
    whole = NamedSharding(next(iter(arrays.values())).sharding.mesh, jax.P())

    def place(key_path: Any, leaf: Any) -> NamedSharding:
        like = next((arrays[tail] for start in range(len(key_path)) if (tail := key_path[start:]) in arrays), None)
        return whole if like is None or like.shape != leaf.shape else like.sharding

    return jax.tree_util.tree_map_with_path(place, state)

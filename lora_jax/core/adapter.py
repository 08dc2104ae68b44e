"""Adapters, and how they sit beside the parameters that they adapt.

An adapter set is a flat dict from parameter path to `Adapter`. `attach` puts each adapter beside its parameter, as one
`Adapted` node in the parameter's place; `detach` takes the two apart again.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from lora_jax.core import paths
from lora_jax.core.errors import InputError

ADAPTER, FROZEN = "adapter", "frozen"
# The arrays of a pair, and along which axes of its parameter each lies; "rank" is the inner axis.
PARTS: dict[str, tuple[str, ...]] = {
    "a": ("batch", "inputs", "rank"),
    "b": ("batch", "rank", "outputs"),
    "magnitude": ("batch", "outputs"),
    "bias": ("batch", "outputs"),
    "lambda_d": ("batch", "rank"),
    "lambda_b": ("batch", "outputs"),
    "scale": ("batch",),
}
EXTRA = ("magnitude", "bias", "lambda_d", "lambda_b")  # what a pair may have besides A and B


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a parameter hold separate matrices (batch), which are contracted (in) and which reach the output (out).

    Args:
      batch: axes along which there is a matrix for each place: layers of a scan, experts.
      inputs: axes that a product sums over.
      outputs: axes of the result.

    >>> Layout(batch=(0,), inputs=(1,), outputs=(2, 3)).factor_shapes((12, 512, 8, 64), rank=4)
    ((12, 512, 4), (12, 4, 8, 64))
    """

    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A `(*batch, *in, r)` and B `(*batch, r, *out)` for a parameter.

        Args:
          shape: the parameter's.
          rank: r.
        """
        batch, inputs, outputs = (tuple(shape[i] for i in axes) for axes in (self.batch, self.inputs, self.outputs))
        return (*batch, *inputs, rank), (*batch, rank, *outputs)

    def sliced(self) -> "Layout":
        """The layout of one slice along the parameter's first axis, which is a batch axis.

        >>> Layout(batch=(0, 1), inputs=(2,), outputs=(3,)).sliced()
        Layout(batch=(0,), inputs=(1,), outputs=(2,))
        """
        return Layout(*(tuple(axis - 1 for axis in axes if axis) for axes in (self.batch, self.inputs, self.outputs)))


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """What is trained beside one frozen parameter: a `LowRank` pair, a `Full` copy, or some `Rows` of it.

    A pytree; the base of the three, which says what they have in common. `arrays` names its array fields.

    Args:
      frozen: names of arrays that are not trained.

    >>> adapter = Full(jnp.ones(2), frozen=("value",))
    >>> adapter.children(), adapter.roles().value
    (('value',), 'frozen')
    """

    arrays: ClassVar[tuple[str, ...]] = ()
    frozen: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def roles(self) -> Self:
        """The same adapter with each array replaced by its label, `"adapter"` (trained) or `"frozen"`."""
        labels = {name: FROZEN if name in self.frozen else ADAPTER for name in self.children()}
        return dataclasses.replace(self, **labels)

    def children(self) -> tuple[str, ...]:
        """The names of the fields that hold arrays."""
        return self.arrays


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(Adapter):
    """A low-rank pair: the parameter W acts as `W + scale A B`.

    With a magnitude it acts as `m (W + scale A B) / ||W + scale A B||`, per output (DoRA, https://arxiv.org/abs/2402.09353).
    With a bias each product with it gives `scale bias` more. With `lambda_d` and `lambda_b` it acts as
    `W + scale A diag(lambda_d) B diag(lambda_b)` (VeRA, https://arxiv.org/abs/2310.11454).

    Args:
      a: `(*batch, *in, r)`.
      b: `(*batch, r, *out)`.
      layout: which axes of W are batch, in and out.
      scale: a static number, or a frozen array of the shape `(*batch)` where it varies along the batch axes.
      dropout: the rate on the input of the branch.
      ranks: the true rank of each matrix of a stack, in row-major order of the batch axes, where they differ: A and B are
        zero beyond it. `None`: all have rank r.
      magnitude: DoRA's m, `(*batch, *out)`.
      bias: `(*batch, *out)`.
      bias_path: the parameter that `merge` adds the bias to.
      lambda_d: VeRA's scales of the inner axis, `(*batch, r)`.
      lambda_b: VeRA's scales of the outputs, `(*batch, *out)`.
      invocation: the tokens from which on the adapter acts (aLoRA, https://arxiv.org/abs/2504.12397); see `lora(fn, active=)`.
      branch_dtype: what the branch `s (x A) B` is computed in; `None`: the input's dtype.
      frozen: names of arrays that are not trained.

    >>> import jax.numpy as jnp
    >>> pair = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), Layout((), (0,), (1,)), scale=2.0)
    >>> pair.delta()
    Array([[2., 2.],
           [2., 2.],
           [2., 2.]], dtype=float32)
    >>> pair.axes()
    ((0, -1), (-1, 1))
    """

    a: Any
    b: Any
    layout: Layout
    scale: Any = 1.0
    dropout: float = 0.0
    ranks: tuple[int, ...] | None = None
    magnitude: Any = None
    bias: Any = None
    bias_path: str | None = None
    lambda_d: Any = None
    lambda_b: Any = None
    invocation: tuple[int, ...] | None = None
    branch_dtype: str | None = None

    arrays = ("a", "b")

    def children(self) -> tuple[str, ...]:
        extra = tuple(name for name in EXTRA if getattr(self, name) is not None)
        return (*self.arrays, *extra) if isinstance(self.scale, float) else (*self.arrays, *extra, "scale")

    def roles(self) -> Self:
        scaled = {} if isinstance(self.scale, float) else {"scale": FROZEN}
        return dataclasses.replace(super().roles(), **scaled)

    @property
    def extras(self) -> tuple[str, ...]:
        """The fields that make it more than `scale A B`."""
        return tuple(name for name in (*EXTRA, "invocation") if getattr(self, name) is not None)

    @property
    def rank(self) -> int:
        """r, the inner size of the pair."""
        return self.a.shape[-1]

    def widened(self) -> Self:
        """The same with arrays of float32 at least, for what is not a product with an activation.

        >>> LowRank(jnp.ones((3, 1), "bfloat16"), jnp.ones((1, 2)), Layout((), (0,), (1,))).widened().a.dtype.name
        'float32'
        """
        return dataclasses.replace(self, **{name: _wide(getattr(self, name)) for name in self.children()})

    def folded(self) -> Self:
        """The same change as an ordinary pair, with VeRA's scales multiplied into A and B.

        >>> scales = {"lambda_d": jnp.array([2.0]), "lambda_b": jnp.array([3.0, 4.0])}
        >>> LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), Layout((), (0,), (1,)), **scales).folded().b.tolist()
        [[3.0, 4.0]]
        """
        if self.lambda_d is None:
            return self
        batch = len(self.layout.batch)
        a = self.a * jnp.expand_dims(self.lambda_d, tuple(range(batch, self.a.ndim - 1)))
        b = self.b * jnp.expand_dims(self.lambda_b, batch)
        return dataclasses.replace(self, a=a, b=b, lambda_d=None, lambda_b=None, frozen=())

    def scaled(self, array: Any) -> jax.Array:
        """`scale` times an array.

        Args:
          array: `(*batch, ...)`, such as B or the bias.

        Returns:
          An array of the same shape.

        >>> layers = LowRank(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 3)), Layout((0,), (1,), (2,)), scale=jnp.array([1.0, 5.0]))
        >>> layers.scaled(layers.b)[:, 0, 0].tolist()
        [1.0, 5.0]
        """
        scale = self.scale
        if not isinstance(scale, float):
            scale = jnp.reshape(scale, scale.shape + (1,) * (array.ndim - scale.ndim)).astype(array.dtype)
        return array * scale

    def where_adapted(self, array: Any, other: float) -> jax.Array:
        """An array with another value for each matrix of a stack that has rank 0, and so no adapter.

        Args:
          array: `(*batch, ...)`.
          other: the value there.

        Returns:
          An array of the same shape.

        >>> layers = LowRank(jnp.ones((2, 3, 1)), jnp.ones((2, 1, 3)), Layout((0,), (1,), (2,)), ranks=(1, 0))
        >>> layers.where_adapted(jnp.array([7.0, 7.0]), 0.0).tolist()
        [7.0, 0.0]
        """
        if self.ranks is None:
            return jnp.asarray(array)
        batch = array.shape[: len(self.layout.batch)]
        adapted = np.reshape(np.array(self.ranks) > 0, batch + (1,) * (array.ndim - len(batch)))
        return jnp.where(adapted, array, jnp.asarray(other, array.dtype))

    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axis of W that each axis of A and of B lies along; -1 for the rank."""
        layout = self.layout
        return (*layout.batch, *layout.inputs, -1), (*layout.batch, -1, *layout.outputs)

    def delta(self) -> jax.Array:
        """`scale A B` with W's shape, in the adapter's dtype: for merging, never for training."""
        a_axes, b_axes = self.axes()
        rank_label = len(a_axes) + len(b_axes)
        label = lambda axes: [rank_label if axis < 0 else axis for axis in axes]
        order, pair = range(len(self.layout.batch + self.layout.inputs + self.layout.outputs)), self.folded()
        return jnp.einsum(pair.a, label(a_axes), pair.scaled(pair.b), label(b_axes), list(order), precision="highest")


def _wide(array: Any) -> jax.Array:
    if isinstance(array, jax.Array) and array.dtype.itemsize >= 4:  # as most are, and outside of `jit` each cast takes its time
        return array
    return jnp.asarray(array).astype(wide_dtype(array))


def wide_dtype(*arrays: Any) -> Any:
    """The widest dtype of some arrays, at least float32.

    >>> wide_dtype(jnp.ones(2, jnp.bfloat16)).name
    'float32'
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *(array.dtype for array in arrays))


@dataclasses.dataclass(frozen=True, eq=False)
class Full(Adapter):
    """A trained copy of a whole parameter (a head, a norm, a bias), used in its place.

    Args:
      value: an array of the parameter's shape.
      frozen: `("value",)` where it is not trained.

    >>> import lora_jax as lj
    >>> lj.merge({"bias": jnp.zeros(2)}, {"bias": Full(jnp.ones(2))})["bias"].tolist()
    [1.0, 1.0]
    """

    value: Any

    arrays = ("value",)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Adapter):
    """Trained rows of a table that is looked up, in the place of the base's (PEFT's `trainable_token_indices`).

    Args:
      values: `(k, *out)`.
      indices: which k rows.
      layout: the table's, with one in axis and no batch axis.
      frozen: `("values",)` where they are not trained.

    >>> rows = Rows(jnp.ones((2, 3)), indices=(4, 7), layout=Layout((), (0,), (1,)))
    >>> rows.put(jnp.zeros((9, 3)))[:, 0].astype(int).tolist()
    [0, 0, 0, 0, 1, 0, 0, 1, 0]
    >>> rows.pick(jnp.arange(9.0)[:, None]).tolist()
    [[4.0], [7.0]]
    """

    values: Any
    indices: tuple[int, ...]
    layout: Layout

    arrays = ("values",)

    def put(self, table: Any) -> jax.Array:
        """The table with the rows in it.

        Args:
          table: the base's, of the shape that `layout` is of.

        Returns:
          A table of the same shape and dtype.
        """
        (axis,) = self.layout.inputs
        first = jnp.moveaxis(table, axis, 0).at[np.array(self.indices)].set(self.values.astype(table.dtype))
        return jnp.moveaxis(first, 0, axis)

    def pick(self, table: Any) -> jax.Array:
        """The table's own rows, `(k, *out)`.

        Args:
          table: the base's, of the shape that `layout` is of.
        """
        return jnp.moveaxis(jnp.take(table, np.array(self.indices), self.layout.inputs[0]), self.layout.inputs[0], 0)


_ALONE = (
    "a parameter with an adapter was used as an array: call lora(fn) with these parameters, and not fn itself, or give fn "
    "those that merge(params, adapters) returns"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A frozen parameter and the adapter beside it: one node of an attached tree.

    It is no array: a function that takes it for one was not given through `lora`, and gets an error that says so.
    """

    base: Any
    adapter: Adapter

    def _alone(self, *_: Any) -> NoReturn:
        raise TypeError(_ALONE)

    __jax_array__ = __getitem__ = __matmul__ = __rmatmul__ = __add__ = __radd__ = __mul__ = __rmul__ = _alone

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{_ALONE} (it has no {name})")


def static_fields(adapter: Any) -> dict[str, Any]:
    """The fields of an adapter that are not arrays."""
    arrays = adapter.children()
    return {f.name: getattr(adapter, f.name) for f in dataclasses.fields(adapter) if f.name not in arrays}


def to_json(static: Mapping[str, Any]) -> dict[str, Any]:
    """Static fields as JSON's own types."""
    return {name: dataclasses.asdict(value) if isinstance(value, Layout) else value for name, value in static.items()}


def from_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_json`, after JSON has made lists of the tuples."""
    layout = lambda axes: Layout(**{role: tuple(numbers) for role, numbers in axes.items()})
    listed = lambda value: tuple(value) if isinstance(value, list) else value
    return {name: layout(value) if name == "layout" else listed(value) for name, value in fields.items()}


def _flatten_adapter(adapter: Any):
    # A field that may hold an array is a child even where it is None: JAX puts placeholders, None among them, into trees.
    optional = EXTRA if isinstance(adapter, LowRank) else ()
    names = tuple(dict.fromkeys((*adapter.arrays, *optional, *adapter.children())))
    children = [(jax.tree_util.GetAttrKey(name), getattr(adapter, name)) for name in names]
    return children, (names, tuple((name, value) for name, value in static_fields(adapter).items() if name not in names))


def _serialize_aux(aux: Any) -> bytes:
    names, static = aux
    return json.dumps([names, to_json(dict(static))]).encode()


def _deserialize_aux(data: bytes) -> Any:
    names, fields = json.loads(data)
    return tuple(names), tuple(from_json(fields).items())


for _kind in (LowRank, Full, Rows):

    def _unflatten_adapter(aux: Any, children: Any, kind: Any = _kind):
        names, static = aux
        return kind(**dict(zip(names, children)), **dict(static))

    jax.tree_util.register_pytree_with_keys(_kind, _flatten_adapter, _unflatten_adapter)
    export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"lora_jax.{_kind.__name__}",
        serialize_auxdata=_serialize_aux,
        deserialize_auxdata=_deserialize_aux,
    )
jax.tree_util.register_dataclass(Adapted, data_fields=["base", "adapter"], meta_fields=[])
export.register_pytree_node_serialization(
    Adapted, serialized_name="lora_jax.Adapted", serialize_auxdata=lambda aux: b"", deserialize_auxdata=lambda data: ()
)


def is_adapted(node: Any) -> bool:
    """Whether a node of a tree is a parameter with its adapter."""
    return isinstance(node, Adapted)


def check(path: str, adapter: Adapter, shape: tuple[int, ...]) -> None:
    """Raise an InputError that names the path if the adapter does not fit a parameter of this shape."""
    if isinstance(adapter, Full):
        wanted = {"value": shape}
    elif isinstance(adapter, LowRank):
        layout = adapter.layout
        if sorted(layout.batch + layout.inputs + layout.outputs) != list(range(len(shape))):
            raise InputError(f"{path}: the parameter has the shape {shape}, which the adapter's {layout} does not cover")
        axes = dataclasses.asdict(layout)
        sizes = {role: tuple(shape[i] for i in axes[role]) for role in axes} | {"rank": (adapter.rank,)}
        wanted = {name: sum((sizes[role] for role in PARTS[name]), ()) for name in adapter.children()}
        _check_static(path, adapter, math.prod(sizes["batch"]))
    elif isinstance(adapter, Rows):
        wanted = {"values": _rows_shape(path, adapter, shape)}
    else:
        raise TypeError(f"{path}: an adapter is a LowRank, a Full or Rows, not {type(adapter).__name__}")
    if not isinstance(adapter.frozen, tuple) or not set(adapter.frozen) <= set(adapter.children()):
        raise InputError(f"{path}: frozen is {adapter.frozen!r}; it must be a tuple of some of {', '.join(adapter.children())}")
    for name, want in wanted.items():
        got = jnp.shape(getattr(adapter, name))
        if got != want:
            raise InputError(f"{path}: the adapter's {name} has the shape {got}; a parameter of the shape {shape} needs {want}")


def _check_static(path: str, pair: LowRank, count: int) -> None:
    """Raise an InputError for a scale, dropout, ranks or scales of VeRA that a pair for `count` matrices can't have."""
    if isinstance(pair.scale, int):
        raise InputError(f"{path}: the adapter's scale is the whole number {pair.scale}: write {float(pair.scale)}")
    if not 0 <= pair.dropout < 1:
        raise InputError(f"{path}: the adapter's dropout must be at least 0 and below 1, not {pair.dropout!r}")
    if pair.ranks is not None and (len(pair.ranks) != count or not all(0 <= rank <= pair.rank for rank in pair.ranks)):
        raise InputError(f"{path}: the adapter's ranks are {pair.ranks}; it needs {count} of at most {pair.rank}")
    if (pair.lambda_d is None) != (pair.lambda_b is None):
        raise InputError(f"{path}: the adapter has only one of lambda_d and lambda_b; VeRA needs both")


def _rows_shape(path: str, rows: Rows, shape: tuple[int, ...]) -> tuple[int, ...]:
    layout = rows.layout
    if layout.batch or len(layout.inputs) != 1 or sorted(layout.inputs + layout.outputs) != list(range(len(shape))):
        raise InputError(f"{path}: rows of a parameter of the shape {shape} need one in axis and no batch axis, not {layout}")
    count = shape[layout.inputs[0]]
    if len(set(rows.indices)) != len(rows.indices) or not all(0 <= index < count for index in rows.indices):
        raise InputError(f"{path}: the rows must be different ones of {count}, from 0, not {list(rows.indices)}")
    return (len(rows.indices), *(shape[i] for i in layout.outputs))


def attach(variables: Any, adapters: Mapping[str, Adapter]) -> Any:
    """The same tree with each adapter beside its frozen parameter, for `lora(fn)`.

    Args:
      variables: any pytree of parameters.
      adapters: `{path: adapter}`.

    Raises:
      InputError: a path is not in the tree (the nearest are listed), an adapter does not fit its parameter's shape, or the
        tree has adapters already.
      TypeError: an adapter is none of `LowRank`, `Full` and `Rows`.

    >>> import jax.numpy as jnp
    >>> params = attach({"w": jnp.ones((3, 2))}, {"w": LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)), Layout((), (0,), (1,)))})
    >>> [path for path in paths.flatten(params)[0]]
    ['w/base', 'w/adapter/a', 'w/adapter/b']
    """
    leaves, treedef = paths.flatten(variables, is_leaf=is_adapted)
    for path, leaf in leaves.items():
        if is_adapted(leaf):
            raise InputError(f"{path}: the tree has adapters already; `detach` them first, or combine the two sets")
    for path, adapter in adapters.items():
        if path not in leaves:
            near = "".join(f"\n  {near}" for near in paths.near_misses(leaves, path))
            raise InputError(f"the adapter {path!r} has no parameter in this tree. The nearest paths are:{near}")
        check(path, adapter, getattr(leaves[path], "shape", ()))
    nodes = [Adapted(leaf, adapters[path]) if path in adapters else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(treedef, nodes)


def detach(params: Any) -> tuple[Any, dict[str, Adapter]]:
    """The inverse of `attach`: `(variables, adapters)`.

    Args:
      params: an attached tree; one without adapters gives an empty set.

    Raises:
      InputError: two leaves of the tree have one path.

    >>> variables, adapters = detach(attach({"w": jnp.zeros(2), "b": jnp.zeros(1)}, {"w": Full(jnp.ones(2))}))
    >>> sorted(variables), sorted(adapters)
    (['b', 'w'], ['w'])
    """
    leaves, treedef = paths.flatten(params, is_leaf=is_adapted)
    variables = jax.tree.unflatten(treedef, [leaf.base if is_adapted(leaf) else leaf for leaf in leaves.values()])
    return variables, {path: leaf.adapter for path, leaf in leaves.items() if is_adapted(leaf)}


def labels(tree: Any) -> Any:
    """A tree of the same structure whose leaves say `"adapter"` (trained) or `"frozen"`.

    Args:
      tree: an attached tree, or an adapter set.

    >>> labels({"w": jnp.ones(3), "head": Full(jnp.ones(2))})
    {'head': Full(frozen=(), value='adapter'), 'w': 'frozen'}
    """
    is_node = lambda node: isinstance(node, Adapter)
    return jax.tree.map(lambda node: node.roles() if is_node(node) else FROZEN, tree, is_leaf=is_node)

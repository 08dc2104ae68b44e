"""Many adapter sets of one base in one program: rows of a batch with a set each, and sets trained side by side.

`stack` puts sets of any ranks and scales under one leading axis. `lora` runs each row of a batch with the set that the row
asks for; `init_states` and `make_train_step` train all sets at once. The base has no such axis anywhere: its products are one
product each for all rows or sets, and only `A` and `B` are per row or per set.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.algebra import pad_rank, scale_folded
from lora_jax.core import paths, quantized, transform
from lora_jax.core.adapter import Adapter, Full, LowRank, Rows, attach, static_fields
from lora_jax.core.errors import InputError
from lora_jax.core.methods.dora import column_norm
from lora_jax.training import ragged, train
from lora_jax.training.steps import CompiledStep

__all__ = ["init_states", "lora", "make_eval_step", "make_train_step", "neutral", "stack", "unstack"]

Adapters = Mapping[str, Adapter]


def stack(sets: Sequence[Adapters]) -> dict[str, Adapter]:
    """One set whose arrays have a leading axis over the sets.

    Pairs of lower rank are padded with zeros, and a set without a pair for a parameter gets a zero one. A scale that is the
    same in all sets stays static; otherwise it is an array `(sets, *batch)`. For inference stack
    `fold_scale(pad_rank(one, rank))` of each: then no rank, scale, dropout or frozen array is part of the program, so that sets
    may differ in them, and be exchanged in one compiled program.

    Args:
      sets: adapter sets of one base.

    Raises:
      InputError: adapters of a parameter are of different kinds, layouts, dropouts or shapes, or a set lacks one that has no
        neutral value (a `Full`, say); the message names the parameter.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lambda rank, scale: lj.LowRank(jnp.ones((3, rank)), jnp.ones((rank, 2)), lj.Layout((), (0,), (1,)), scale=scale)
    >>> stacked = stack([{"w": pair(1, 2.0)}, {"w": pair(4, 0.5)}])
    >>> stacked["w"].a.shape, stacked["w"].b.shape, stacked["w"].scale
    ((2, 3, 4), (2, 4, 2), Array([2. , 0.5], dtype=float32))
    """
    if not sets:
        raise InputError("there are no adapter sets to stack")
    found = dict.fromkeys(path for one in sets for path in one)
    return {path: _stacked(path, [one.get(path) for one in sets]) for path in found}


def _stacked(path: str, adapters: Sequence[Adapter | None]) -> Adapter:
    first = next(adapter for adapter in adapters if adapter is not None)
    filled = [_zeros(path, first) if adapter is None else adapter for adapter in adapters]
    if isinstance(first, LowRank) and all(isinstance(adapter, LowRank) for adapter in filled):
        filled = _aligned(path, filled)
    structures = {jax.tree.structure(adapter) for adapter in filled}
    shapes = {tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(adapter)) for adapter in filled}
    if len(structures) > 1 or len(shapes) > 1:
        kinds = "\n  ".join(dict.fromkeys(map(_describe, filled)))
        raise InputError(
            f"{path}: these adapters can't be stacked, since they are more than different values (for inference, where dropout "
            f"and what is frozen do not matter, stack `lj.algebra.fold_scale` of each set):\n  {kinds}"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *filled)


def _zeros(path: str, adapter: Adapter) -> Adapter:
    """A pair that changes nothing."""
    if not isinstance(adapter, LowRank) or adapter.magnitude is not None:
        what = "a pair with a magnitude" if isinstance(adapter, LowRank) else f"a {type(adapter).__name__} adapter"
        raise InputError(f"{path}: one set has {what} and another has nothing, for which no value stands: give each set one")
    return jax.tree.map(jnp.zeros_like, adapter)


def _aligned(path: str, pairs: Sequence[Any]) -> list[Any]:
    """Pairs of one rank, whose scales are one number or arrays."""
    rank = max(pair.rank for pair in pairs)
    padded = [pad_rank({path: pair}, rank)[path] for pair in pairs]
    if all(isinstance(pair.scale, float) for pair in pairs) and len({pair.scale for pair in pairs}) == 1:
        return padded
    return [dataclasses.replace(pair, scale=_scale_array(pair)) for pair in padded]


def _scales_folded(adapters: Adapters) -> dict[str, Adapter]:
    return {path: scale_folded(a) if isinstance(a, LowRank) else a for path, a in adapters.items()}


def _scale_array(pair: Any) -> jax.Array:
    batch = pair.a.shape[: len(pair.layout.batch)]
    return jnp.broadcast_to(jnp.asarray(pair.scale, jnp.float32), batch)


def _describe(adapter: Adapter) -> str:
    arrays = ", ".join(f"{name} {jnp.shape(getattr(adapter, name))}" for name in adapter.children())
    static = ", ".join(f"{name}={value}" for name, value in static_fields(adapter).items() if value not in (None, ()))
    return f"{type(adapter).__name__}: {arrays}; {static}"


def unstack(stacked: Any, like: Sequence[Any] | None = None) -> list[Any]:
    """The inverse of `stack`, for adapter sets and for the training states that `init_states` makes.

    Args:
      stacked: a set or state with a leading axis.
      like: a set or state for each: its parameters, ranks and static scales are those of the result. Its arrays may be shapes
        alone. Without it all have the stacked ranks, and scales stay arrays where they are.

    Raises:
      InputError: `like` has another number of members, or an array that `stacked` lacks.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lambda rank: lj.LowRank(jnp.ones((3, rank)), jnp.ones((rank, 2)), lj.Layout((), (0,), (1,)), scale=rank / 2)
    >>> sets = [{"w": pair(1)}, {"w": pair(4)}]
    >>> [(one["w"].rank, one["w"].scale) for one in unstack(stack(sets), like=sets)]
    [(1, 0.5), (4, 2.0)]
    """
    count = set_count(stacked)
    if like is None:
        return [jax.tree.map(functools.partial(_member, number=i), stacked) for i in range(count)]
    if len(like) != count:
        raise InputError(f"{count} members are stacked, but `like` has {len(like)}")
    leaves, _ = paths.flatten(stacked)
    return [_cut(leaves, i, one) for i, one in enumerate(like)]


def _cut(leaves: Mapping[str, Any], number: int, like: Any) -> Any:
    """One member, cut to the shapes of `like`: what is beyond them is padding."""
    wanted, treedef = paths.flatten(like)
    missing = [path for path in wanted if path not in leaves]
    if missing:
        raise InputError(f"the stacked tree has no {', '.join(missing)}, which `like` has")

    def corner(path: str, leaf: Any) -> jax.Array:
        return _member(leaves[path], number)[tuple(slice(size) for size in jnp.shape(leaf))]

    return jax.tree.unflatten(treedef, [corner(path, leaf) for path, leaf in wanted.items()])


def _member(leaf: Any, number: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)  # which compiles once for all members


def set_count(stacked: Any) -> int:
    """How many members a stacked tree has.

    Args:
      stacked: a set or state with a leading axis.

    Raises:
      InputError: its arrays have no leading axis of one size.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> set_count(stack([{"w": lj.Full(jnp.ones(2))}] * 3))
    3
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked)}
    if len(counts) != 1 or counts == {()}:
        raise InputError(f"the arrays have the leading axes {sorted(counts)}, not one size: make the tree with `many.stack`")
    return counts.pop()[0]


# --- rows with a set each ---------------------------------------------------------------------------------------------


def lora(
    fn: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    active: jax.Array | None = None,
    grouped: bool = False,
    unused: Literal["error", "ignore"] = "error",
    on_unsupported: Literal["error", "materialize"] = "error",
) -> Callable[..., Any]:
    """`fn` on a batch in which each row has a set of its own, or none: row i of the result is `lora(fn)` with set `index[i]`.

    The row's A and B are gathered, and `fn` is vmapped over the rows with the base left out, so that `x W` is one product for
    all rows. `fn` sees a batch of one row; or, where the batch has k rows for each index, of k rows that share a set.

    The result is `apply(variables, stacked, index, *args, **kwargs)`:

    - `variables`: the base tree, without adapters.
    - `stacked`: the sets, from `stack`.
    - `index`: `(rows,)` integers, which set each row has; below 0 for none. One beyond the last set is an error, or, inside
      `jit`, makes its rows NaN.
    - `args`: as `fn` takes them, whole batches along the axes that `in_axes` says. Keyword arguments have no row axis.

    An adapter that is a whole parameter (`Full`) is gathered whole for each row, and its products are per row. A ragged product
    of `fn` (grouped experts) is one for all rows.

    Args:
      fn: any function whose first argument is the parameter tree.
      in_axes: the row axis of each of `args`, `None` where there is none: a number for all, or a tuple of numbers and trees of
        them, as in `jax.vmap`.
      out_axes: the same for the results, all of which have a row axis.
      active: as in `lora_jax.lora`, `(rows, tokens)`.
      grouped: sort the rows by their set, and multiply with A and B by `jax.lax.ragged_dot` instead of gathering them: for
        many rows of few sets, on accelerators. On a CPU, JAX multiplies each row with every set, so that one that is not
        finite is seen by all.
      unused: as in `lora_jax.lora`.
      on_unsupported: as in `lora_jax.lora`.

    Raises:
      InputError: `index` has another shape or dtype or is beyond the last set, or an argument's row axis is no multiple of its
        length.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> model = lambda params, x: x @ params["w"]
    >>> pair = lambda value: lj.LowRank(jnp.ones((2, 1)), jnp.full((1, 1), value), lj.Layout((), (0,), (1,)))
    >>> stacked = stack([{"w": pair(1.0)}, {"w": pair(10.0)}])
    >>> lora(model)({"w": jnp.zeros((2, 1))}, stacked, jnp.array([1, -1, 0]), jnp.ones((3, 2)))
    Array([[20.],
           [ 0.],
           [ 2.]], dtype=float32)
    """

    @functools.wraps(fn)
    def apply(variables: Any, stacked: Adapters, index: Any, *args: Any, **kwargs: Any) -> Any:
        count = set_count(stacked)
        index = check_index(index, count)
        order = jnp.argsort(jnp.where(index < 0, count, index)) if grouped else None
        adapters = jax.vmap(_scales_folded)(dict(stacked)) if grouped else stacked
        axes = _spread(in_axes, args)
        leaves, treedef = jax.tree.flatten(args)

        def split(leaf: jax.Array, axis: int) -> jax.Array:
            return _ordered(_split(leaf, axis, index.size), axis, order)

        mapped = [None if axis is None else split(leaf, axis) for leaf, axis in zip(leaves, axes)]
        masks = None if active is None else split(active, 0)

        def run(own_set: Adapters, mask: Any, own: Sequence[Any]) -> Any:
            adapted = transform.lora(fn, active=mask, unused=unused, on_unsupported=on_unsupported)
            whole = [leaf if axis is None else mine for leaf, axis, mine in zip(leaves, axes, own)]
            return adapted(attach(variables, own_set), *jax.tree.unflatten(treedef, whole), **kwargs)

        def row(number: Any, mask: Any, own: Sequence[Any]) -> Any:
            return ragged.call(run, _pick(variables, adapters, number, grouped), mask, own)

        results = jax.vmap(row, in_axes=(0, 0, axes), out_axes=out_axes)(_ordered(index, 0, order), masks, mapped)
        flat, out_tree = jax.tree.flatten(results)
        back = None if order is None else jnp.argsort(order)
        joined = [_joined(_ordered(leaf, axis, back), axis) for leaf, axis in zip(flat, _spread(out_axes, results))]
        return jax.tree.unflatten(out_tree, joined)

    return apply


def check_index(index: Any, count: int) -> jax.Array:
    """The sets that rows have, as an array `(rows,)`; inside `jit` their numbers are not looked at.

    Args:
      index: `(rows,)`: the set of each row; below 0 for none.
      count: how many sets there are.

    Raises:
      InputError: `index` has another shape or dtype, or is beyond the last set.

    >>> check_index([1, -1, 0], 2).shape
    (3,)
    """
    index = jnp.asarray(index)
    if index.ndim != 1 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise InputError(f"index must be integers of the shape (rows,), not {index.dtype} of the shape {index.shape}")
    try:
        last = int(index.max(initial=0))
    except jax.errors.ConcretizationTypeError:  # inside `jit`
        return index
    if last >= count:
        raise InputError(f"index asks for the set {last}, but there are {count}, numbered from 0")
    return index


def _spread(axes: Any, tree: Any) -> list[int | None]:
    """An axis for each leaf, from a prefix of the tree."""
    spread: list[int | None] = []

    def add(axis: int | None, part: Any) -> None:
        spread.extend([axis] * len(jax.tree.leaves(part)))

    jax.tree.map(add, axes, tree, is_leaf=lambda axis: axis is None)
    return spread


def _ordered(leaf: jax.Array, axis: Any, order: jax.Array | None) -> jax.Array:
    return leaf if order is None else jnp.take(leaf, order, axis)


def _split(leaf: jax.Array, axis: int, count: int) -> jax.Array:
    """The row axis as (count, rows for each), of which the first is mapped."""
    shape = jnp.shape(leaf)
    if not 0 <= axis < len(shape) or not count or shape[axis] % count:
        raise InputError(
            f"an argument of the shape {shape} has no axis {axis} (from 0 up) with a row, or an equal number of rows, for "
            f"each of the {count} in index: see in_axes"
        )
    return jnp.reshape(leaf, (*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :]))


def _joined(leaf: jax.Array, axis: Any) -> jax.Array:
    """The inverse of `_split`."""
    return leaf.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 2 :])


def _pick(variables: Any, stacked: Adapters, number: Any, grouped: bool) -> dict[str, Adapter]:
    """The set of a row; where it has none, one that changes nothing. Where `grouped`, A and B are not gathered yet."""
    late = {path: a for path, a in stacked.items() if grouped and isinstance(a, LowRank) and a.magnitude is None}
    gathered = _gather(variables, stacked, number)
    indexed = lambda a: {name: ragged.IndexedMatrix(getattr(a, name), number) for name in ("a", "b")}
    return gathered | {path: dataclasses.replace(gathered[path], **indexed(a)) for path, a in late.items()}


def _gather(variables: Any, stacked: Adapters, number: Any) -> dict[str, Adapter]:
    get = lambda leaf: leaf.at[number].get(mode="fill", fill_value=jnp.nan)
    own: dict[str, Adapter] = {path: jax.tree.map(get, adapter) for path, adapter in stacked.items()}
    return jax.tree.map(lambda other, leaf: jnp.where(number < 0, other, leaf), neutral(variables, own), own)


def neutral(variables: Any, adapters: Adapters) -> dict[str, Adapter]:
    """Adapters of the same kinds and shapes with which the base acts as it is, so that it needs no program of its own.

    Args:
      variables: the base tree, without adapters.
      adapters: a set of it.

    Raises:
      InputError: two leaves of the tree have one path.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)))
    >>> found = neutral({"w": jnp.ones((2, 3))}, {"w": pair})
    >>> found["w"].a.shape, float(abs(found["w"].delta()).max())
    ((2, 1), 0.0)
    """
    bases, _ = paths.flatten(variables)
    none = {path: _neutral(bases[path], adapter) if path in bases else adapter for path, adapter in adapters.items()}
    return jax.tree.map(lambda other, leaf: other.astype(leaf.dtype), none, dict(adapters))


def _neutral(base: Any, adapter: Adapter) -> Adapter:
    """An adapter of this kind with which a parameter acts as it is."""
    if isinstance(adapter, Full):
        return dataclasses.replace(adapter, value=base)
    if isinstance(adapter, Rows):
        return dataclasses.replace(adapter, values=adapter.pick(base))
    assert isinstance(adapter, LowRank)
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    return (
        zeros if adapter.magnitude is None else dataclasses.replace(zeros, magnitude=column_norm(quantized.base(base), zeros))
    )


# --- sets trained side by side ----------------------------------------------------------------------------------------

Optimizer = Callable[..., optax.GradientTransformation]


def init_states(
    sets: Sequence[Adapters], make_tx: Optimizer, hyperparameters: Mapping[str, Any], *, keys: jax.Array
) -> train.TrainState:
    """`train.init_state` of each set, under one leading axis.

    Args:
      sets: the adapters that each member begins with; their ranks and scales may differ, see `stack`.
      make_tx: a member's optimiser from its hyperparameters, which are traced numbers: `optax.adamw`, say.
      hyperparameters: the arguments of `make_tx`, `(members,)` each.
      keys: `(members,)` PRNG keys, one each.

    Raises:
      InputError: the sets can't be stacked, or the hyperparameters or keys are not one for each.

    >>> import lora_jax as lj
    >>> sets, rates = [{"head": lj.Full(jnp.ones(2))}] * 3, {"learning_rate": jnp.array([0.1, 0.2, 0.3])}
    >>> states = init_states(sets, optax.adam, rates, keys=jax.random.split(jax.random.key(0), 3))
    >>> states.adapters["head"].value.shape, states.step.shape
    ((3, 2), (3,))
    """
    hyperparameters = _per_member(len(sets), hyperparameters)
    if jnp.shape(keys) != (len(sets),):
        raise InputError(f"keys has the shape {jnp.shape(keys)}: {len(sets)} members need ({len(sets)},)")

    def start(adapters: Adapters, values: Any, key: jax.Array) -> train.TrainState:
        return train.init_state(adapters, make_tx(**values), key=key)

    return jax.vmap(start)(stack(sets), hyperparameters, keys)


def make_train_step(
    loss_fn: train.LossFn,
    make_tx: Optimizer,
    hyperparameters: Mapping[str, Any],
    *,
    batch_axis: int | None = None,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> Callable[[train.TrainState, Any, Any], tuple[train.TrainState, dict[str, Any]]]:
    """`train.make_train_step` for all members at once: `(states, variables, batch) -> (states, metrics)`, the states donated.

    Each member goes where a run of its own would go: its gradient is its own, and so are the clip and what is skipped. Zeros
    that pad a rank stay zero, since A's are multiplied with B's in each gradient (Adam and weight decay keep them).
    The activations of all members are in memory together; the base is there once.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `(loss, aux)` of one member, as in `train.make_train_step`.
      make_tx: as in `init_states`.
      hyperparameters: as in `init_states`.
      batch_axis: 0 where each leaf of the batch has a leading axis over the members; `None`: all learn from the same batch.
      accumulate: as in `train.make_train_step`.
      max_grad_norm: as in `train.make_train_step`, for each member.

    Returns:
      The step. Each of its metrics is `(members,)`.

    Raises:
      InputError: an option is out of range. When the step is taken: the hyperparameters are not one for each member, or as
        `train.make_train_step`.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lj
    >>> model = lambda params, x: x @ params["w"]
    >>> params, x, rates = {"w": jnp.eye(3)}, jnp.ones((4, 3)), {"learning_rate": jnp.array([0.0, 0.1])}
    >>> sets = [lj.init(jax.random.key(0), lj.LoraConfig(rank=rank), model, params, x) for rank in (1, 2)]
    >>> loss_fn = lambda params, batch, key: jnp.mean((lj.lora(model)(params, batch) - 2.0) ** 2)
    >>> states = init_states(sets, optax.adam, rates, keys=jax.random.split(jax.random.key(1), 2))
    >>> step = make_train_step(loss_fn, optax.adam, rates)
    >>> for _ in range(50):
    ...     states, metrics = step(states, params, x)
    >>> [bool(loss < 0.1) for loss in metrics["loss"]], unstack(states.adapters, sets)[1]["w"].a.shape
    ([False, True], (3, 2))
    """
    train.check_options(accumulate, max_grad_norm)
    if batch_axis not in (None, 0):
        raise InputError(f"batch_axis must be 0 or None, not {batch_axis!r}")

    loss = functools.partial(ragged.call, loss_fn)

    def step(states: train.TrainState, variables: Any, batch: Any) -> tuple[train.TrainState, dict[str, Any]]:
        def one(values: Any, state: train.TrainState, batch: Any) -> tuple[train.TrainState, dict[str, Any]]:
            return train.update(loss, make_tx(**values), accumulate, max_grad_norm, None, state, variables, batch)

        values = _per_member(states.step.size, hyperparameters)
        return jax.vmap(one, in_axes=(0, 0, batch_axis))(values, states, batch)

    return CompiledStep(step, functools.partial(jax.jit, donate_argnums=0))


def make_eval_step(metric_fn: Callable[[Any, Any], Any]) -> Callable[[Adapters, Any, Any], Any]:
    """`train.make_eval_step` for stacked adapters, one member after the other: `metric_fn`'s results under a leading axis.

    Args:
      metric_fn: `(params, batch) -> metrics` of one member; all get the same batch.

    Raises:
      InputError: when it is called: as `train.make_eval_step`.
      TypeError: when it is called: an adapter is none.

    >>> import lora_jax as lj
    >>> pair = lambda value: lj.LowRank(jnp.ones((3, 1)), jnp.full((1, 2), value), lj.Layout((), (0,), (1,)))
    >>> evaluate = make_eval_step(lambda params, x: lj.lora(lambda p, x: x @ p["w"])(params, x).sum())
    >>> evaluate(stack([{"w": pair(1.0)}, {"w": pair(2.0)}]), {"w": jnp.zeros((3, 2))}, jnp.ones((4, 3))).tolist()
    [24.0, 48.0]
    """

    def step(stacked: Adapters, variables: Any, batch: Any) -> Any:
        return jax.lax.map(lambda adapters: metric_fn(attach(variables, adapters), batch), stacked)

    return CompiledStep(step, jax.jit)


def _per_member(count: int, hyperparameters: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Hyperparameters as arrays, one number for each member."""
    arrays = {name: jnp.asarray(values) for name, values in hyperparameters.items()}
    for name, values in arrays.items():
        if values.shape != (count,):
            raise InputError(f"the hyperparameter {name} has the shape {values.shape}: {count} members need ({count},)")
    return arrays

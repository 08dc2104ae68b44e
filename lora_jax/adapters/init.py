"""`init`: a configuration and a function's use of its parameters make an adapter set."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import sharding
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.initializers import from_shapes
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, Full, Layout, LowRank, Rows, attach
from lora_jax.core.errors import InputError
from lora_jax.core.methods import vera
from lora_jax.core.methods.dora import column_norm
from lora_jax.core.transform import lora
from lora_jax.core.usage import Parameter, abstractly, explain

_LAYER = re.compile(r"(?:.*(?:layers?|blocks?)_?|h_?|)(\d+)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def init(
    key: jax.Array, config: LoraConfig, fn: Callable[..., Any], variables: Any, *args: Any, **kwargs: Any
) -> dict[str, Adapter]:
    """New adapters for the parameters of `fn(variables, *args, **kwargs)` that the configuration names.

    `fn` is traced on shapes alone to see how it uses each parameter; the use says which axes of a kernel are in, out and
    batch. Each adapter's key is `key` with a hash of its path folded in, so that one more target changes no other adapter.

    Args:
      key: a PRNG key.
      config: what to adapt.
      fn: any function whose first argument is the parameter tree.
      variables: the tree; its arrays, and those of `args`, may be `jax.ShapeDtypeStruct`s, and so are then the adapters.
        Where parameters have a `NamedSharding`, their adapters are made as `sharding.adapter_shardings` says.

    Returns:
      `{path: adapter}` with `a: (*batch, *in, r)` and `b: (*batch, r, *out)`. With `method="vera"` adapters share arrays:
      copy them before a step of your own donates them (`train.init_state` does).

    Raises:
      InputError: a pattern matches nothing, or only parameters that can't take a pair; a rank is above a kernel's smaller
        side; a layer does not exist; a method does not work for a parameter. The message names the pattern, the paths
        and what to do.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> def model(params, x):
    ...     return jnp.einsum("btd,dnh->btnh", x, params["query"])
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model, {"query": jnp.ones((8, 4, 3))}, jnp.ones((1, 5, 8)))
    >>> adapters["query"].a.shape, adapters["query"].b.shape
    ((8, 2), (2, 4, 3))
    """
    parameters = explain(fn, variables, *args, **kwargs).parameters
    leaves, _ = paths.flatten(variables)
    trained = _trained(leaves, parameters, config)
    rows = _rows(parameters, config, trained)
    chosen = _in_layers(_chosen(parameters, config, {*trained, *rows}), config)
    _check_tables(chosen, config)

    def create(key: jax.Array, leaves: Mapping[str, Any]) -> dict[str, Adapter]:
        drawn = _draw(key, chosen, [path for path in leaves if path in chosen], config)
        return {path: one(path, drawn.get(path), leaf) for path, leaf in leaves.items()}

    def one(path: str, drawn: Any, leaf: Any) -> Adapter:
        if path in trained:
            return Full(jnp.array(leaf, config.dtype, copy=True))
        if path in rows:
            return _rows_of(rows[path], config, leaf)
        return _pair(parameters[path], config, parameters, drawn, leaf)

    adapted = {path: leaf for path, leaf in leaves.items() if path in {*trained, *rows, *chosen}}
    adapters = _make(create, key, adapted, functools.partial(sharding.adapter_shardings, variables))
    apply = lora(fn, active=None if config.alora_invocation_tokens is None else jnp.array(True))
    abstractly(lambda p, a, k: apply(p, *a, **k), attach(variables, adapters), args, kwargs)
    return adapters


def _make(
    create: Callable[..., dict[str, Adapter]], key: jax.Array, leaves: Mapping[str, Any], shardings: Callable[[Any], Any]
) -> dict[str, Adapter]:
    """`create(key, leaves)`: for parameters on a mesh in one program, in their places; for shapes, shapes."""
    groups: dict[Any, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        groups.setdefault((sharding.on_mesh(leaf), sharding.is_abstract((key, leaf))), {})[path] = leaf
    made: dict[str, Adapter] = {}
    for (on_mesh, abstract), some in groups.items():
        if on_mesh:
            made |= sharding.make(create, shardings, key, some)
        else:
            made |= jax.eval_shape(create, key, some) if abstract else create(key, some)
    return {path: made[path] for path in leaves}


def _trained(leaves: Mapping[str, Any], parameters: dict[str, Parameter], config: LoraConfig) -> set[str]:
    trained = set(paths.select(parameters, config.train, "train"))
    for path in trained:
        if not jnp.issubdtype(parameters[path].dtype, jnp.floating):
            raise InputError(f"train: {path} has the dtype {parameters[path].dtype}; only floats can be trained")
        if paths.is_quantized(leaves[path]):
            raise InputError(f"train: {path} is quantised, so it can't be trained whole; give it a pair, or leave it dense")
        if parameters[path].kind == "unused":
            raise InputError(f"train: the function does not use {path}; take its pattern out of train")
    return trained


def _rows(parameters: dict[str, Parameter], config: LoraConfig, trained: set[str]) -> dict[str, Rows]:
    """The rows to train of each embedding that `trainable_token_indices` names."""
    option, rows = "trainable_token_indices", {}
    for pattern, indices in config.trainable_token_indices.items():
        for path in paths.select(parameters, [pattern], option):
            p = parameters[path]
            if path in trained or path in rows:
                raise InputError(f"{option}: {path} is in train, or named twice; it can have one adapter only")
            layout = _table(p)
            if layout is None:
                raise InputError(
                    f"{option}: {path} of the shape {p.shape} is neither an embedding nor a head: {p.obstacle or p.kind}"
                )
            count = p.shape[layout.inputs[0]]
            if max(indices) >= count:
                raise InputError(f"{option}: {path} of the shape {p.shape} has {count} rows, so there is no row {max(indices)}")
            rows[path] = Rows(None, tuple(indices), layout)
    return rows


def _table(parameter: Parameter) -> Layout | None:
    """The layout of a table of tokens: an embedding's own; of a head, whose outputs are the tokens, the other way round."""
    layout = parameter.layout
    if parameter.kind == "linear":
        layout = Layout(layout.batch, layout.outputs, layout.inputs)
    return None if parameter.obstacle or layout.batch or len(layout.inputs) != 1 else layout


def _rows_of(rows: Rows, config: LoraConfig, leaf: Any) -> Rows:
    return dataclasses.replace(rows, values=rows.pick(quantized.dense(leaf)).astype(config.dtype))


# --- which parameters -------------------------------------------------------------------------------------------------


def _chosen(parameters: dict[str, Parameter], config: LoraConfig, trained: set[str]) -> list[Parameter]:
    excluded = set(paths.select(parameters, config.exclude, "exclude"))
    free = {path: p for path, p in parameters.items() if path not in excluded and path not in trained}
    if isinstance(config.targets, str):
        return _by_word(config.targets, free)
    chosen: dict[str, Parameter] = {}
    for pattern in config.targets:
        matched = paths.select(parameters, [pattern], "targets")
        left = [free[path] for path in matched if path in free]
        if not left:
            raise InputError(
                f"targets: everything that the pattern {pattern!r} matches is in exclude, train or trainable_token_indices: "
                f"{', '.join(matched)}"
            )
        _refuse_mixed(left)
        able = {p.path: p for p in left if not p.obstacle}
        if not able:
            listing = "".join(f"\n  {p.path} {p.shape}: {p.obstacle}" for p in left)
            raise InputError(
                f"targets: the pattern {pattern!r} matches only parameters that can't take a low-rank pair:{listing}\n"
                "Name others, or train these whole with LoraConfig(train=[...])"
            )
        chosen |= able
    return [p for path, p in parameters.items() if path in chosen]


def _by_word(word: str, free: dict[str, Parameter]) -> list[Parameter]:
    """`all-linear`: every kernel that products alone use. `attention`: those of them inside an attention module."""
    candidates = [p for p in free.values() if word == "all-linear" or _is_in_attention(p.path)]
    _refuse_mixed(candidates)
    chosen = [p for p in candidates if p.kind == "linear" and not p.obstacle]
    if not chosen:
        near = "".join(f"\n  {p.path} {p.shape}: {p.obstacle or p.kind}" for p in list(free.values())[:8])
        raise InputError(f"targets={word!r} finds no kernel to adapt. The first parameters are:{near}")
    return chosen


def _is_in_attention(path: str) -> bool:
    return any(_ATTENTION.search(component) for component in paths.components(path)[:-1])


def _refuse_mixed(candidates: Iterable[Parameter]) -> None:
    mixed = [p for p in candidates if p.mixed]
    if mixed:
        listing = "".join(f"\n  {p.path} {p.shape}: {p.obstacle}" for p in mixed)
        raise InputError(
            f"targets: these kernels are also used in a way that is not low-rank, so they can't take a pair:{listing}\n"
            "Put them into LoraConfig(exclude=[...]), or train them whole with LoraConfig(train=[...])"
        )


def layer_index(path: str) -> int | None:
    """The layer that a path's parameter belongs to in an unrolled model; `None` if it is in no numbered layer.

    A layer is a component that is a number, or `layer`, `layers`, `block`, `blocks` (with anything before) or `h` and a
    number.

    >>> [layer_index(p) for p in ("layer_3/query/kernel", "layers/11/w", "EncoderBlock_0/Dense_1/kernel", "Dense_1/kernel")]
    [3, 11, 0, None]
    """
    found = [match for component in paths.components(path) if (match := _LAYER.fullmatch(component))]
    if len(found) > 1:
        raise InputError(f"layers: {path} has several numbered components, so its layer is not clear: use a pattern instead")
    return int(found[0][1]) if found else None


def _in_layers(chosen: list[Parameter], config: LoraConfig) -> dict[str, Parameter]:
    """The chosen parameters that `layers` keeps."""
    if config.layers is None:
        return {p.path: p for p in chosen}
    indices = {p.path: layer_index(p.path) for p in chosen}
    numbered = {index for index in indices.values() if index is not None}
    kept = {}
    for p in chosen:
        index = indices[p.path]
        if index is None and len(p.stack_axes) > 1:
            raise InputError(f"layers: {p.path} is stacked along the axes {p.stack_axes}, so its layers are not clear")
        if index is None and p.stack_axes:
            numbered |= set(range(p.shape[p.stack_axes[0]]))
        if index in config.layers or (index is None and p.stack_axes):
            kept[p.path] = p
    missing = sorted(set(config.layers) - numbered)
    if missing:
        raise InputError(
            f"layers: no target parameter is in layer {', '.join(map(str, missing))}; the layers found are "
            f"{', '.join(map(str, sorted(numbered))) or '(none)'}"
        )
    for pattern in () if isinstance(config.targets, str) else config.targets:
        if not any(paths.matches(path, pattern) for path in kept):
            raise InputError(f"layers: nothing that the target {pattern!r} matches is in the layers {list(config.layers)}")
    return kept


def _check_tables(chosen: Iterable[str], config: LoraConfig) -> None:
    """Every pattern of the tables matches an adapted parameter."""
    for option in ("rank_pattern", "alpha_pattern", "batch_axes"):
        paths.select(chosen, getattr(config, option), option)


# --- one adapter ------------------------------------------------------------------------------------------------------


def _first(table: Any, path: str, default: Any) -> Any:
    return next((value for pattern, value in table.items() if paths.matches(path, pattern)), default)


def _draw(
    key: jax.Array, chosen: dict[str, Parameter], wanted: Iterable[str], config: LoraConfig
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The values of A and B where they start.

    All pairs of one kind are drawn together: a mesh has them made by one program, which would take long to compile otherwise.
    """
    starting = {path: _start(chosen[path], config) for path in wanted}
    if config.method == "vera":
        widest = max((_fan_in(parameter, config) for parameter in chosen.values()), default=1)
        shared = vera.Shared(config.rank, widest, config.dtype)
        return {path: shared.pair(key, layout, shape) for path, (_, shape, layout, _) in starting.items()}
    groups: dict[tuple[Any, ...], list[str]] = {}
    for path, start in starting.items():
        groups.setdefault(start, []).append(path)
    drawn: dict[str, tuple[jax.Array, jax.Array]] = {}
    for (start, shape, layout, rank), group in groups.items():
        draw = functools.partial(start, shape=shape, layout=layout, rank=rank)
        drawn |= zip(group, zip(*jax.vmap(draw)(paths.fold_in_each(key, group))))
    return drawn


def _fan_in(parameter: Parameter, config: LoraConfig) -> int:
    return math.prod(parameter.shape[axis] for axis in _layout(parameter, config).inputs)


def _start(parameter: Parameter, config: LoraConfig) -> tuple[from_shapes.Start, tuple[int, ...], Layout, int]:
    """How a pair starts: the function, and its arguments after the key."""
    layout, rank = _layout(parameter, config), _first(config.rank_pattern, parameter.path, config.rank)
    _check_method(parameter, config)
    _check_rank(parameter, layout, rank)
    start = from_shapes.embedding if parameter.kind == "embedding" else from_shapes.BY_NAME[config.init]
    return start, tuple(parameter.shape), layout, rank


def _pair(
    parameter: Parameter, config: LoraConfig, parameters: Mapping[str, Parameter], drawn: tuple[jax.Array, jax.Array], leaf: Any
) -> LowRank:
    (a, b), (_, _, layout, rank) = drawn, _start(parameter, config)
    alpha, invocation = _first(config.alpha_pattern, parameter.path, config.alpha), config.alora_invocation_tokens
    pair = LowRank(
        a.astype(config.dtype), b.astype(config.dtype), layout,
        1.0 if config.method == "vera" else config.scale(rank, alpha), config.dropout,
        _ranks(parameter, layout, rank, config.layers),
        invocation=None if invocation is None else tuple(invocation),
        frozen={"lora": (), "lora_fa": ("a",), "vera": ("a", "b")}[config.method],
    )  # fmt: skip
    pair = dataclasses.replace(pair, a=pair.where_adapted(pair.a, 0.0), b=pair.where_adapted(pair.b, 0.0))
    return dataclasses.replace(pair, **_extra(pair, parameter, config, parameters, leaf))


def _extra(
    pair: LowRank, parameter: Parameter, config: LoraConfig, parameters: Mapping[str, Parameter], leaf: Any
) -> dict[str, Any]:
    """What the method adds to A and B, where it starts."""
    extra: dict[str, Any] = {}
    if config.method == "vera":
        extra |= vera.vera_scales(pair.layout, parameter.shape, pair.rank, config.d_initial, config.dtype)
    if config.dora:
        extra["magnitude"] = column_norm(quantized.dense(leaf), pair).astype(config.dtype)
    if config.lora_bias:
        out_shape = tuple(parameter.shape[axis] for axis in (*pair.layout.batch, *pair.layout.outputs))
        extra |= {"bias": jnp.zeros(out_shape, config.dtype), "bias_path": _bias_beside(parameter, out_shape, parameters)}
    return extra


def _bias_beside(kernel: Parameter, shape: tuple[int, ...], parameters: Mapping[str, Parameter]) -> str | None:
    """The parameter `bias` of the kernel's own module, which has no other kernel that the bias could belong to."""
    module = kernel.path.rpartition("/")[0]
    own = {path: p for path, p in parameters.items() if path.rpartition("/")[0] == module}
    beside = f"{module}/bias" if module else "bias"
    kernels = [path for path, p in own.items() if p.kind in ("linear", "embedding")]
    return beside if kernels == [kernel.path] and beside in own and own[beside].shape == shape else None


def _check_method(parameter: Parameter, config: LoraConfig) -> None:
    """Raise where a method does not work for an embedding."""
    options = {"method": config.method != "lora", "lora_bias": config.lora_bias}
    options["alora_invocation_tokens"] = config.alora_invocation_tokens is not None
    wrong = [name for name, on in options.items() if on]
    if parameter.kind == "embedding" and wrong:
        raise InputError(
            f"{wrong[0]}: {parameter.path} is an embedding, for which {wrong[0]}={getattr(config, wrong[0])!r} does not work "
            "(its A starts at zero, and a lookup has neither bias nor tokens before it): take it out of the targets"
        )


def _layout(parameter: Parameter, config: LoraConfig) -> Layout:
    layout, batch_axes = parameter.layout, _first(config.batch_axes, parameter.path, None)
    if batch_axes is None:
        return layout
    ndim = len(parameter.shape)
    if any(not -ndim <= axis < ndim for axis in batch_axes):
        raise InputError(f"batch_axes: {parameter.path} has the shape {parameter.shape}; {list(batch_axes)} is out of range")
    batch = {axis % ndim for axis in batch_axes} | set(layout.batch)
    inputs, outputs = (tuple(axis for axis in axes if axis not in batch) for axes in (layout.inputs, layout.outputs))
    if not inputs or not outputs:
        raise InputError(
            f"batch_axes: {list(batch_axes)} leaves {parameter.path} of the shape {parameter.shape} no in or no out axis; "
            f"by its use, in is {layout.inputs} and out is {layout.outputs}"
        )
    return Layout(tuple(sorted(batch)), inputs, outputs)


def _check_rank(parameter: Parameter, layout: Layout, rank: int) -> None:
    a_shape, b_shape = layout.factor_shapes(parameter.shape, 1)
    size = lambda shape: math.prod(shape[len(layout.batch) :])
    fan_in, fan_out = size(a_shape), size(b_shape)
    if rank > min(fan_in, fan_out):
        raise InputError(
            f"rank: {rank} is above the smaller side of {parameter.path} (shape {parameter.shape}: {fan_in} in, {fan_out} "
            "out). Lower it with rank_pattern, exclude the parameter, or train it whole with train"
        )


def _ranks(parameter: Parameter, layout: Layout, rank: int, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """The true rank of each matrix of a stack where `layers` leaves some out: 0 there."""
    if layers is None or not parameter.stack_axes:
        return None
    if layer_index(parameter.path) is not None:
        return None
    shape = tuple(parameter.shape[axis] for axis in layout.batch)
    position = layout.batch.index(parameter.stack_axes[0])
    index = np.indices(shape)[position].reshape(-1)
    return tuple(rank if int(i) in layers else 0 for i in index)

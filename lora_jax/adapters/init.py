"""`init`: a configuration and a function's use of its parameters make an adapter set."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax import sharding
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.initializers import from_shapes
from lora_jax.adapters.siblings import warn_of_siblings
from lora_jax.adapters.targets import Target, choose, first_match, layer_index
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, Full, Layout, LowRank, Rows, attach
from lora_jax.core.errors import InputError
from lora_jax.core.host import namespace, on_device
from lora_jax.core.methods import vera
from lora_jax.core.methods.dora import column_norm
from lora_jax.core.transform import lora
from lora_jax.core.usage import Parameter, abstractly, explain


def init(
    key: jax.Array,
    config: LoraConfig,
    fn: Callable[..., Any],
    variables: Any,
    *args: Any,
    on_unsupported: Literal["error", "materialize"] = "error",
    **kwargs: Any,
) -> dict[str, Adapter]:
    """New adapters for the parameters of `fn(variables, *args, **kwargs)` that the configuration names.

    `fn` is traced on shapes alone to see how it uses each parameter; the use says which axes of a kernel are in, out and
    batch. Each adapter's key is `key` with a hash of its path folded in, so that one more target changes no other adapter.
    What a word (`targets="all-linear"`) passes over is logged, and listed by `summary`.

    Args:
      key: a PRNG key.
      config: what to adapt.
      fn: any function whose first argument is the parameter tree.
      variables: the tree; its arrays, and those of `args`, may be `jax.ShapeDtypeStruct`s, and so are then the adapters.
        Where parameters have a `NamedSharding`, their adapters are made as `sharding.adapter_shardings` says.
      args: what `fn` takes after it.
      on_unsupported: `"materialize"`: kernels that are named, or that products use, too, are adapted although a use of theirs
        is not low-rank, for `lora(fn, on_unsupported="materialize")`. Where no use tells their axes, `config.layouts` does.
      kwargs: what `fn` takes by name.

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
    active = None if config.alora_invocation_tokens is None else jnp.array(True)
    apply = lora(fn, active=active, on_unsupported=on_unsupported)
    parameters = explain(fn, variables, *args, **kwargs).parameters
    leaves, _ = paths.flatten(variables)
    trained = _trained(leaves, parameters, config)
    rows = _rows(parameters, config, trained)
    targets = choose(parameters, config, {*trained, *rows}, on_unsupported == "materialize")
    warn_of_siblings(parameters, targets.values(), config)

    def draw(key: jax.Array, leaves: Mapping[str, Any]) -> dict[str, LowRank]:
        return _pairs(key, targets, leaves, config, parameters)

    def finish(drawn: Mapping[str, LowRank], leaves: Mapping[str, Any]) -> dict[str, Adapter]:
        return {path: one(path, drawn.get(path), leaf) for path, leaf in leaves.items()}

    def one(path: str, pair: LowRank | None, leaf: Any) -> Adapter:
        if path in rows:
            return _rows_of(rows[path], config, leaf)
        if pair is None:
            return Full(jnp.array(leaf, config.dtype, copy=True))
        return _with_magnitude(pair, leaf) if config.dora else pair

    adapted = {path: leaf for path, leaf in leaves.items() if path in {*trained, *rows, *targets}}
    of_leaf = {*trained, *rows, *(targets if config.dora else ())}
    adapters = _make(draw, finish, key, adapted, of_leaf, functools.partial(sharding.adapter_shardings, variables))
    abstractly(lambda p, a, k: apply(p, *a, **k), attach(variables, adapters), args, kwargs)
    return adapters


def _make(
    draw: Callable[..., dict[str, LowRank]],
    finish: Callable[..., dict[str, Adapter]],
    key: jax.Array,
    leaves: Mapping[str, Any],
    of_leaf: set[str],
    shardings: Callable[[Any], Any],
) -> dict[str, Adapter]:
    """`finish(draw(key, leaves), leaves)`: for parameters on a mesh in their places; for shapes, shapes.

    `of_leaf`: the paths for which `finish` has something to do.
    """
    create = lambda key, leaves: finish(draw(key, leaves), leaves)
    groups: dict[Any, dict[str, Any]] = {}
    for path, leaf in leaves.items():
        kind = _kind(key, leaf)
        devices = sharding.devices(leaf) if kind == "array" else None
        groups.setdefault((sharding.on_mesh(leaf), kind, devices), {})[path] = leaf
    made: dict[str, Adapter] = {}
    for (on_mesh, kind, _), some in groups.items():
        if kind == "traced":  # a call, so that the key is traced, too, and nothing is drawn before the program runs
            made |= jax.jit(create)(key, some)
        elif kind == "shape":
            made |= sharding.make(create, shardings, key, some) if on_mesh else jax.eval_shape(create, key, some)
        else:
            made |= _of_arrays(draw(key, some), finish, some, of_leaf, shardings if on_mesh else None)
    return {path: made[path] for path in leaves}


def _of_arrays(
    drawn: dict[str, LowRank],
    finish: Callable[..., dict[str, Adapter]],
    leaves: Mapping[str, Any],
    of_leaf: set[str],
    shardings: Callable[[Any], Any] | None,
) -> dict[str, Adapter]:
    """`finish(drawn, leaves)` where both are at hand, in one program, which sees no more than it needs."""
    put = jax.tree.map(sharding.put, drawn, shardings(drawn)) if shardings else on_device(drawn)
    rest = {path: leaf for path, leaf in leaves.items() if path in of_leaf}
    if not rest:
        return put
    given = {path: _of_norm(pair) for path, pair in drawn.items() if path in rest}
    finished = sharding.make(finish, shardings, given, rest) if shardings else jax.jit(finish)(given, rest)
    magnitudes = {path: dataclasses.replace(put[path], magnitude=finished[path].magnitude) for path in given}
    return put | finished | magnitudes


def _kind(key: jax.Array, leaf: Any) -> Literal["shape", "traced", "array"]:
    if sharding.is_abstract((key, leaf)):
        return "shape"
    return "traced" if any(isinstance(array, Tracer) for array in jax.tree.leaves((key, leaf))) else "array"


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


# --- pairs ------------------------------------------------------------------------------------------------------------


def _pairs(
    key: jax.Array,
    targets: Mapping[str, Target],
    wanted: Mapping[str, Any],
    config: LoraConfig,
    parameters: Mapping[str, Parameter],
) -> dict[str, LowRank]:
    """The pairs that are wanted, where they start, without DoRA's magnitudes."""
    some = [target for path, target in targets.items() if path in wanted]
    for target in some:
        _check_method(target.parameter, config)
    drawn = _start(key, targets.values(), some, config)
    return {target.path: _pair(target, config, parameters, *drawn[target.path]) for target in some}


def _start(key: jax.Array, targets: Iterable[Target], wanted: Sequence[Target], config: LoraConfig) -> from_shapes.Pairs:
    """A and B of the targets that are wanted."""
    if config.method == "vera":
        fan_in, fan_out = (max(sides) for sides in zip(*(target.sides for target in targets)))
        shared = vera.Shared(key, config.rank, fan_in, fan_out, config.dtype)
        return {target.path: shared.pair(target.layout, target.shape) for target in wanted}
    tables = [target for target in wanted if target.parameter.kind == "embedding"]
    kernels = [target for target in wanted if target.parameter.kind != "embedding"]
    return from_shapes.BY_NAME[config.init](key, kernels) | from_shapes.embedding(key, tables)


def _pair(target: Target, config: LoraConfig, parameters: Mapping[str, Parameter], a: Any, b: Any) -> LowRank:
    layout, rank = target.layout, target.rank
    alpha, invocation = first_match(config.alpha_pattern, target.path, config.alpha), config.alora_invocation_tokens
    ranks = _ranks(target, config.layers)
    dtype = jnp.dtype(config.dtype)
    a, b = (_zero_without_rank(factor.astype(dtype, copy=False), ranks) for factor in (a, b))
    pair = LowRank(
        a, b, layout, 1.0 if config.method == "vera" else config.scale(rank, alpha), config.dropout, ranks,
        invocation=None if invocation is None else tuple(invocation),
        branch_dtype=config.branch_dtype,
        frozen={"lora": (), "lora_fa": ("a",), "vera": ("a", "b")}[config.method],
    )  # fmt: skip
    extra: dict[str, Any] = {}
    if config.method == "vera":
        extra |= vera.vera_scales(layout, target.shape, rank, config.d_initial, pair.a)
    if config.lora_bias:
        out_shape = tuple(target.shape[axis] for axis in (*layout.batch, *layout.outputs))
        bias = namespace(pair.a).zeros(out_shape, dtype)
        extra |= {"bias": bias, "bias_path": _bias_beside(target.parameter, out_shape, parameters)}
    return dataclasses.replace(pair, **extra)


def _zero_without_rank(factor: Any, ranks: tuple[int, ...] | None) -> Any:
    """A factor of a stack with zeros for the matrices of rank 0."""
    if ranks is None:
        return factor
    on = (np.array(ranks) > 0).astype(factor.dtype)
    return (factor.reshape(len(ranks), -1) * on[:, None]).reshape(factor.shape)


def _of_norm(pair: LowRank) -> LowRank:
    """A pair with the same A B: of rank 0 where B is zero, so that its part of a norm is not compiled."""
    if np.any(pair.b):
        return pair
    return LowRank(pair.a[..., :0], pair.b.take(range(0), len(pair.layout.batch)), pair.layout)


def _with_magnitude(pair: LowRank, leaf: Any) -> LowRank:
    """The pair with DoRA's magnitude where it starts, at the norm of each output."""
    return dataclasses.replace(pair, magnitude=column_norm(quantized.base(leaf), pair).astype(pair.a.dtype))


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


def _ranks(target: Target, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """The true rank of each matrix of a stack where `layers` leaves some out: 0 there."""
    stack = target.parameter.stack_axes
    if layers is None or not stack or layer_index(target.path) is not None:
        return None
    shape = tuple(target.shape[axis] for axis in target.layout.batch)
    index = np.indices(shape)[target.layout.batch.index(stack[0])].reshape(-1)
    return tuple(target.rank if int(i) in layers else 0 for i in index)

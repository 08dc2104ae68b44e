"""Which parameters get a pair, of which layout and rank: the configuration's patterns and words on what `explain` found."""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lora_jax.adapters.config import LoraConfig
from lora_jax.core import paths
from lora_jax.core.adapter import Layout
from lora_jax.core.errors import InputError
from lora_jax.core.usage import Parameter

_LOG = logging.getLogger(__name__)
_LAYER = re.compile(r"(?:.*(?:layers?|blocks?)_?|h_?|)(\d+)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter that gets a pair, which of its axes are batch, in and out, and the pair's rank."""

    parameter: Parameter
    layout: Layout
    rank: int

    @property
    def path(self) -> str:
        return self.parameter.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parameter.shape

    @property
    def factor_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        return self.layout.factor_shapes(self.shape, self.rank)

    @property
    def sides(self) -> tuple[int, int]:
        """How many values lie along the in axes, and along the out axes."""
        return _sides(self.shape, self.layout)


def choose(parameters: Mapping[str, Parameter], config: LoraConfig, taken: set[str], materialize: bool) -> dict[str, Target]:
    """The parameters that get a pair, by path.

    Args:
      parameters: what `explain` found.
      config: what to adapt.
      taken: the parameters that have an adapter of another kind.
      materialize: whether a use that is not low-rank may form the whole kernel.
    """
    excluded = set(paths.select(parameters, config.exclude, "exclude"))
    free = {path: p for path, p in parameters.items() if path not in excluded and path not in taken}
    if isinstance(config.targets, str):
        found = _by_word(config, free, materialize)
    else:
        found = _by_patterns(parameters, config, free, materialize)
    chosen = _in_layers(found, config)
    for option in ("rank_pattern", "alpha_pattern", "batch_axes", "layouts"):
        paths.select(chosen, getattr(config, option), option)
    remarks = {p.path: p.passed_over for p in _candidates(config, free) if p.passed_over}
    targets: dict[str, Target] = {}
    for path, parameter in chosen.items():
        layout = _layout(parameter, config)
        rank, remark = _rank(parameter, layout, config)
        remarks |= {path: remark} if remark else {}
        targets |= {path: Target(parameter, layout, rank)} if rank else {}
    if chosen and not targets:
        raise InputError(
            f"targets={config.targets!r} finds no kernel that can have a pair:{_listing(chosen.values(), remarks)}"
        )
    _tell(config.targets, [parameters[path] for path in remarks], remarks)
    return targets


def first_match(table: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern of a table that matches a path."""
    return next((value for pattern, value in table.items() if paths.matches(path, pattern)), default)


def _tell(word: Any, some: Sequence[Parameter], remarks: Mapping[str, str]) -> None:
    """Log what a word gives no pair, or another than asked; as a warning where it may well be a kernel."""
    hidden = [p for p in some if p.behind_custom_rule]
    others = [p for p in some if not p.behind_custom_rule]
    for level, told in ((logging.WARNING, hidden), (logging.INFO, others)):
        if told:
            _LOG.log(level, "targets=%r: no pair, or not of the rank asked for:%s", word, _listing(told, remarks))


def _listing(some: Iterable[Parameter], reasons: Mapping[str, str] | None = None) -> str:
    """A line for each parameter with the reason why it has no pair."""
    return "".join(f"\n  {p.path} {p.shape}: {reasons[p.path] if reasons else p.obstacle or p.kind}" for p in some)


# --- by pattern or word -----------------------------------------------------------------------------------------------


def _by_patterns(
    parameters: Mapping[str, Parameter], config: LoraConfig, free: Mapping[str, Parameter], materialize: bool
) -> list[Parameter]:
    chosen: dict[str, Parameter] = {}
    for pattern in config.targets:
        matched = paths.select(parameters, [pattern], "targets")
        left = [free[path] for path in matched if path in free]
        if not left:
            raise InputError(
                f"targets: everything that the pattern {pattern!r} matches is in exclude, train or trainable_token_indices: "
                f"{', '.join(matched)}"
            )
        able = {p.path: p for p in left if not p.obstacle or (materialize and _can_be_formed(p))}
        _refuse_mixed(p for p in left if p.path not in able)
        if not able:
            raise InputError(
                f"targets: the pattern {pattern!r} matches only parameters that can't take a low-rank pair:{_listing(left)}\n"
                "Name others, train these whole with LoraConfig(train=[...]), or have W + AB formed where they are used: "
                "on_unsupported='materialize' in init and in lora"
            )
        chosen |= able
    return [p for path, p in parameters.items() if path in chosen]


def _can_be_formed(parameter: Parameter) -> bool:
    """Whether it can have a pair whose `W + AB` is formed where it is used."""
    return parameter.kind == "other" and len(parameter.shape) > 1 and jnp.issubdtype(parameter.dtype, jnp.floating)


def _candidates(config: LoraConfig, free: Mapping[str, Parameter]) -> list[Parameter]:
    """The parameters that a word is about; for patterns there are none."""
    if not isinstance(config.targets, str):
        return []
    return [p for p in free.values() if config.targets == "all-linear" or _is_in_attention(p.path)]


def _by_word(config: LoraConfig, free: Mapping[str, Parameter], materialize: bool) -> list[Parameter]:
    """`all-linear`: every kernel that products alone use. `attention`: those of them inside an attention module."""
    candidates = [p for p in _candidates(config, free) if not p.aside]
    if not materialize:
        _refuse_mixed(candidates)
    chosen = [p for p in candidates if p.mixed or (p.kind == "linear" and not p.obstacle)]
    if not chosen:
        first = _listing(list(free.values())[:8])
        raise InputError(f"targets={config.targets!r} finds no kernel to adapt. The first parameters are:{first}")
    return chosen


def _is_in_attention(path: str) -> bool:
    return any(_ATTENTION.search(component) for component in paths.components(path)[:-1])


def _refuse_mixed(candidates: Iterable[Parameter]) -> None:
    mixed = [p for p in candidates if p.mixed]
    if mixed:
        raise InputError(
            f"targets: these kernels are also used in a way that is not low-rank, so they can't take a pair:{_listing(mixed)}\n"
            "Put them into LoraConfig(exclude=[...]), train them whole with LoraConfig(train=[...]), or have W + AB formed "
            "for such uses: on_unsupported='materialize' in init and in lora"
        )


# --- by layer ---------------------------------------------------------------------------------------------------------


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


# --- its layout and rank ----------------------------------------------------------------------------------------------


def _layout(parameter: Parameter, config: LoraConfig) -> Layout:
    layout, batch_axes = _plain_layout(parameter, config), first_match(config.batch_axes, parameter.path, None)
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


def _plain_layout(parameter: Parameter, config: LoraConfig) -> Layout:
    """The layout by use, or the configuration's for a kernel whose use tells none."""
    read, said = parameter.layout, first_match(config.layouts, parameter.path, None)
    where = f"{parameter.path} of the shape {parameter.shape}"
    if read.inputs and read.outputs:
        if said not in (None, read):
            raise InputError(f"layouts: by its use {where} has the {read}: take it out of layouts (batch_axes can move axes)")
        return read
    if said is None:
        raise InputError(
            f"layouts: the use of {where} does not tell which axes are in and out: say it, as in "
            f"LoraConfig(layouts={{{parameter.path!r}: lora_jax.Layout(batch=(), inputs=(0,), outputs=(1,))}})"
        )
    if sorted((*said.batch, *said.inputs, *said.outputs)) != list(range(len(parameter.shape))):
        raise InputError(f"layouts: {where} has {len(parameter.shape)} axes; the {said} does not name each of them once")
    return said


def _sides(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in (layout.inputs, layout.outputs))
    return fan_in, fan_out


def _rank(parameter: Parameter, layout: Layout, config: LoraConfig) -> tuple[int, str]:
    """The rank of a kernel's pair, 0 for none, and what to say where it is not as asked.

    A word takes in kernels that nobody looked at, such as a head of two outputs: there the rank is the smaller side.
    """
    asked = first_match(config.rank_pattern, parameter.path, None)
    rank, (fan_in, fan_out) = asked or config.rank, _sides(parameter.shape, layout)
    side = min(fan_in, fan_out)
    if rank <= side:
        return rank, ""
    if asked or not isinstance(config.targets, str):
        raise InputError(
            f"rank: {rank} is above the smaller side of {parameter.path} (shape {parameter.shape}: {fan_in} in, {fan_out} "
            "out). Lower it with rank_pattern, exclude the parameter, or train it whole with train"
        )
    above = f"rank {rank} is above its smaller side ({fan_in} in, {fan_out} out)"
    if config.method == "vera":
        return 0, f"{above}, and VeRA has one rank for all, so that it gets no pair"
    lowered = side - side % 2 if config.init == "orthogonal" else side
    return lowered, f"{above}, so that it gets {f'rank {lowered}' if lowered else 'no pair (its rank would have to be even)'}"

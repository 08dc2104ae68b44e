"""Stacks of kernels whose siblings are read otherwise: experts of which some share a factor and others don't."""

import collections
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.targets import Target, first_match
from lora_jax.core.usage import Parameter


def warn_of_siblings(parameters: Mapping[str, Parameter], targets: Iterable[Target], config: LoraConfig) -> None:
    """Warn, once, of targets with an in or out axis that in a kernel beside them holds separate matrices.

    The experts of a dense mixture, `x (tokens, in)` times `gate (experts, in, out)`, are read off this product as out axes, so
    that they share one A; those of `down (experts, out, in)`, which multiplies each expert's own input, have a pair each.
    """
    batches = _batch_axes(parameters.values())
    found = {t.path: axes for t in targets if (axes := _odd_axes(t, batches)) and _is_open(t.path, config)}
    if found:
        table = ", ".join(f"{path!r}: {axes}" for path, axes in found.items())
        warnings.warn(
            f"{', '.join(found)}: the kernels beside have a pair for each matrix along the same axis, and these share one "
            f"factor, as their use alone would have it. If they are experts, say LoraConfig(batch_axes={{{table}}}); if "
            "not, an empty list there leaves them as they are",
            stacklevel=3,
        )


def _is_open(path: str, config: LoraConfig) -> bool:
    return first_match(config.batch_axes, path, None) is None


def _odd_axes(target: Target, batches: Mapping[Any, set[tuple[int, int]]]) -> list[int]:
    """The in or out axes of a target that are batch axes of a kernel beside it, and leave it others."""
    layout, beside = target.layout, set[tuple[int, int]]().union(*map(batches.__getitem__, _groups(target.parameter)))
    found = {axis for axis, size in beside if size == target.shape[axis]} - set(layout.batch)
    return sorted(found) if {*layout.inputs} - found and {*layout.outputs} - found else []


def _batch_axes(parameters: Iterable[Parameter]) -> Mapping[Any, set[tuple[int, int]]]:
    """The batch axes of each group's kernels, with their sizes."""
    found = collections.defaultdict[Any, set[tuple[int, int]]](set)
    for p in parameters:
        for group in () if p.obstacle else _groups(p):
            found[group] |= {(axis, p.shape[axis]) for axis in p.layout.batch}
    return found


def _groups(parameter: Parameter) -> list[tuple[str, ...]]:
    """The kernels of as many axes in its module, and those of its name in the modules beside it."""
    module, _, name = parameter.path.rpartition("/")
    axes = str(len(parameter.shape))
    return [(module, axes), (module.rpartition("/")[0], name, axes)]

"""Stacks of kernels whose siblings are read otherwise: experts of which some share a factor and others don't."""

import warnings
from collections.abc import Iterable, Mapping

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.targets import Target, first_match
from lora_jax.core.usage import Parameter


def warn_of_siblings(parameters: Mapping[str, Parameter], targets: Iterable[Target], config: LoraConfig) -> None:
    """Warn, once, of targets with an in or out axis that in a kernel beside them holds separate matrices.

    The experts of a dense mixture, `x (tokens, in)` times `gate (experts, in, out)`, are read off this product as out axes, so
    that they share one A; those of `down (experts, out, in)`, which multiplies each expert's own input, have a pair each.
    """
    found = {t.path: axes for t in targets if (axes := _odd_axes(t, parameters)) and _is_open(t.path, config)}
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


def _odd_axes(target: Target, parameters: Mapping[str, Parameter]) -> list[int]:
    """The in or out axes of a target that are batch axes of a kernel beside it, and leave it others."""
    layout, beside = target.layout, _beside(target.parameter, parameters.values())
    found = {axis for p in beside for axis in p.layout.batch if p.shape[axis] == target.shape[axis]} - set(layout.batch)
    return sorted(found) if {*layout.inputs} - found and {*layout.outputs} - found else []


def _beside(parameter: Parameter, others: Iterable[Parameter]) -> list[Parameter]:
    """The stacks of as many axes in the same module, or of the same name in a module beside it."""
    module, _, name = parameter.path.rpartition("/")
    around = module.rpartition("/")[0]

    def is_beside(other: Parameter) -> bool:
        its_module, _, its_name = other.path.rpartition("/")
        near = its_module == module or (its_name == name and its_module.rpartition("/")[0] == around)
        return near and other is not parameter and len(other.shape) == len(parameter.shape) and not other.obstacle

    return list(filter(is_beside, others))

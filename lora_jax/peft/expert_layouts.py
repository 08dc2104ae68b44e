"""Which side of a pair of fused experts is which: PEFT did not always store them as it does now.

Of a parameter `(experts, p, q)` PEFT stores A as `(experts r, p)` and B as `(q, r experts)`, or the other way round, A with q
and B with p. Today A goes with the axis that is contracted with the input. Before 0.19 it went with p whatever the parameter,
and 0.19.0 mixed the two ways up (https://github.com/huggingface/peft/pull/3165). Where p equals q, shapes do not tell.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import Kind, listing
from lora_jax.peft.slots import Slot, roles, stored_shape

Experts = Literal["old", "new"]
WRITTEN = "0.21.2"  # the version whose layout `peft.save` writes

_OTHER: Mapping[str, Kind] = {"parameter": "parameter_transposed", "parameter_transposed": "parameter"}
# The kinds that are stored with A along the axis that reaches the output.
_TURNED: Mapping[str, frozenset[str]] = {
    "old": frozenset({"parameter"}),
    "0.19.0": frozenset(_OTHER),
    "new": frozenset(),
}


def has_experts(slot: Slot) -> bool:
    """Whether the tensor holds several experts' kernels."""
    return bool(roles(slot.name, len(slot.shape)).experts)


def turned_over(slot: Slot) -> Slot:
    """The slot as a file has it where A and B are the other way round."""
    return slot.of_kind(_OTHER[slot.name.kind])


def turned_kinds(found: Mapping[Slot, tuple[int, Any]], version: Any, experts: Experts | None, source: Any) -> frozenset[str]:
    """The kinds of parameters whose pairs are the other way round in a file.

    Args:
      found: the rank and the shape of the file's A of each tensor of experts.
      version: the configuration's `peft_version`, which PEFT writes since 0.18.0.
      experts: the layout, where the user knows it.
      source: the file, for errors.

    Raises:
      InputError: another value of `experts`, or neither version nor shapes tell the layout.
    """
    if experts not in (None, "old", "new"):
        raise InputError(f'experts must be "old" or "new", not {experts!r:.80}')
    kinds = {slot.name.kind for slot in found}
    candidates = (experts,) if experts else _of_version(version)
    fitting = [layout for layout in candidates if _fits(found, layout)]
    if not fitting and not experts:
        fitting = [layout for layout in _TURNED if _fits(found, layout)]
    outcomes = {_TURNED[layout] & kinds for layout in fitting or candidates[-1:]}
    if len(outcomes) > 1:
        paths = listing(sorted({slot.path for slot in found}))
        raise InputError(
            f"{source}: before 0.19.1 PEFT stored A and B of fused experts the other way round, and neither peft_version "
            f"({version!r}) nor the shapes of these tell which way it is here: {paths}. Pass "
            'peft.load(..., experts="old") for a file of PEFT before 0.19.1, experts="new" for a later one'
        )
    return outcomes.pop()


def turned_back(slot: Slot, parts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A `(*experts, *in, r)` and B `(*experts, r, *out)`, from those of the slot turned over: `W^T = A B` is `W = B^T A^T`."""
    experts = len(roles(slot.name, len(slot.shape)).experts)
    return {"a": np.moveaxis(parts["b"], experts, -1), "b": np.moveaxis(parts["a"], -1, experts)}


def _of_version(version: Any) -> Sequence[str]:
    """The layouts that a version may have written."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found is None:
        return ("old", "new")
    release = tuple(map(int, found.groups()))
    if "dev" in version and (0, 18, 1) <= release <= (0, 19, 1):
        return tuple(_TURNED)  # between releases, before or after a change
    return ("old" if release < (0, 19, 0) else "0.19.0" if release == (0, 19, 0) else "new",)


def _fits(found: Mapping[Slot, tuple[int, Any]], layout: str) -> bool:
    """Whether each A has the shape that the layout gives it."""
    placed = {slot: turned_over(slot) if slot.name.kind in _TURNED[layout] else slot for slot in found}
    return all(stored_shape(placed[slot], "a", rank) == shape for slot, (rank, shape) in found.items())

"""How fast a run trains, and what it takes of its devices."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from lora_jax.planning import topology
from lora_jax.planning.flops import dot_flops


class Meter:
    """Measures training steps.

    Args:
      devices: those that a step is on.
      per_step: how many of `unit` a step takes.
      unit: `"examples"`, `"tokens"` or `"pairs"`.
      flops: of the last step's products on all devices, `None` where they can't be counted. It is called after each step, and
        only where the peak of the devices is known.
    """

    def __init__(self, devices: Collection[Any], per_step: int, unit: str, flops: Callable[[], int | None]):
        self.idle: dict[str, float | None] = {f"{unit}_per_second": None}
        self._per_step, self._flops = per_step, flops
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        speed = topology.speed_of(self._local[0].device_kind)
        self._peak = None if speed is None else speed.flops * len(devices)

    def measured(self, seconds: float) -> dict[str, float | None]:
        """Of a step that took so long: the speed, and where they are known the memory and the use of the chips.

        Returns:
          `{unit}_per_second`; `memory_bytes`, the most that was held on one device so far; and `mfu`, the step's FLOPs over the
          devices' peak of bfloat16 products, without what the backward pass computes again (appendix B of
          https://arxiv.org/abs/2204.02311).
        """
        found: dict[str, float | None] = dict.fromkeys(self.idle, self._per_step / seconds)
        memory = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in self._local]
        if most := max(memory):
            found["memory_bytes"] = most
        if self._peak is not None and (flops := self._flops()) is not None:
            found["mfu"] = flops / (seconds * self._peak)
        return found


class StepFlops:
    """The FLOPs of a compiled step, counted once for each shape of its batches.

    Args:
      step: the step, of a state, variables and a batch.
    """

    def __init__(self, step: Any):
        self._step, self._counted = step, dict[Any, int | None]()
        self._shapes: Any = None

    def taken(self, batch: Any) -> None:
        """Take note of the batch of a step, of which the shapes alone are kept."""
        self._shapes = jax.tree.map(_shape, batch)

    def last(self, state: Any, variables: Any) -> int | None:
        """Of the products of the last step, on all devices, without what the backward pass computes again.

        `None` where there are some that `dot_flops` does not count. The step has traced its program already.
        """
        key = tuple(jax.tree.leaves(self._shapes))
        if key not in self._counted:
            try:
                self._counted[key] = dot_flops(self._step.trace(state, variables, self._shapes).jaxpr, again=False)
            except NotImplementedError:
                self._counted[key] = None
        return self._counted[key]


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))

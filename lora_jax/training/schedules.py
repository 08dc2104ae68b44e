"""Learning rates by step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import optax

from lora_jax.core.errors import InputError

Kind = Literal["cosine", "linear", "constant", "wsd"]
_DECAY = 5  # after the warm-up of a warmup-stable-decay schedule, the last of so many parts is the decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a learning rate rises to its peak, and what it does then; once in each phase of a training.

    Args:
      kind: after the warm-up: `"cosine"` (half a wave, https://arxiv.org/abs/1608.03983), `"linear"`, `"constant"`, or `"wsd"`:
        constant, and linear in the last fifth of that (https://arxiv.org/abs/2404.06395).
      warmup: steps of a linear rise to the peak; `None`: a sixteenth of the phase, 1 at least.
      min_rate: where the rate ends; not for `"constant"`.
      warmup_from: step i of a warm-up of n has the rate `(i + warmup_from) / n`: 1, or 0 in the first phase of runs of before.

    Raises:
      InputError: options do not go together.

    >>> rates = Schedule(kind="linear", warmup=2, min_rate=0.1).over(1.0, [6])
    >>> [round(float(rates(step)), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]
    """

    kind: Kind = "cosine"
    warmup: int | None = None
    min_rate: float = 0.0
    warmup_from: int = 1

    def __post_init__(self) -> None:
        if self.kind == "constant" and self.min_rate:
            raise InputError("min_rate is where a schedule ends that falls, and schedule='constant' does not: leave one out")

    def over(self, rate: Any, phases: Sequence[int]) -> optax.Schedule:
        """The learning rate of each step.

        Args:
          rate: its peak; may be a traced number.
          phases: the number of steps of each phase.
        """
        first, *further = phases
        parts = [self._phase(rate, first, self.warmup_from), *(self._phase(rate, steps, 1) for steps in further)]
        ends = [sum(phases[:number]) for number in range(1, len(phases))]
        return optax.schedules.join_schedules(parts, ends)

    def _phase(self, rate: Any, steps: int, warmup_from: int) -> optax.Schedule:
        warmup = max(1, steps // 16) if self.warmup is None else min(self.warmup, steps)
        fall = self._fall(rate, max(steps - warmup, 1))
        if not warmup:
            return fall
        line = optax.schedules.linear_schedule(0.0, rate, warmup)
        return optax.schedules.join_schedules([lambda count: line(count + warmup_from), fall], [warmup])

    def _fall(self, rate: Any, steps: int) -> optax.Schedule:
        """From the peak on, over so many steps."""
        match self.kind:
            case "cosine":
                return optax.schedules.cosine_decay_schedule(rate, steps, self.min_rate / rate if self.min_rate else 0.0)
            case "linear":
                return optax.schedules.linear_schedule(rate, self.min_rate, steps)
            case "constant":
                return optax.schedules.constant_schedule(rate)
            case "wsd":
                decay = max(1, steps // _DECAY)
                return optax.schedules.linear_schedule(rate, self.min_rate, decay, transition_begin=steps - decay)
            case _:
                raise InputError(f"kind must be 'cosine', 'linear', 'constant' or 'wsd', not {self.kind!r}")

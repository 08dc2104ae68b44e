"""How the command trains, whatever the task: AdamW with a warm-up and a cosine decay, and gradients clipped to a norm of 1."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from lora_jax.training import optim, train

MAX_GRAD_NORM = 1.0


def train_step(
    loss: train.LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1, like: train.TrainState | None = None
) -> Callable[[train.TrainState, Any, Any], tuple[train.TrainState, dict[str, Any]]]:
    """The step of a run: `train.make_train_step` with the norm that gradients are clipped to."""
    return train.make_train_step(loss, tx, accumulate=accumulate, max_grad_norm=MAX_GRAD_NORM, like=like)


def optimizer(
    learning_rate: Any,
    phases: Sequence[int],
    *,
    warmup_from: int = 1,
    method: str = "lora",
    lora_plus: float | None = None,
) -> optax.GradientTransformation:
    """AdamW with a short warm-up to the learning rate and a cosine decay, in the way of a method.

    Step i of a warm-up of n has the rate `(i + warmup_from) / n`. The rate rises and falls once in each phase.

    Args:
      learning_rate: its peak; may be a traced number.
      phases: the number of steps of each.
      warmup_from: of the first phase, 1 or 0; of all others it is 1.
      method: `"lora"`, `"lora_fa"` or `"vera"`.
      lora_plus: B's learning rate over A's.

    >>> import jax.numpy as jnp
    >>> tx, weight = optimizer(0.5, [32]), jnp.zeros(())
    >>> update, _ = tx.update(jnp.ones(()), tx.init(weight), weight)
    >>> round(float(update), 4)  # half of the rate in the first of two steps of warm-up
    -0.25
    """

    def adamw(rate: Any) -> optax.GradientTransformation:
        first, *further = phases
        parts = [_rise_and_fall(rate, first, warmup_from), *(_rise_and_fall(rate, steps, 1) for steps in further)]
        ends = [sum(phases[:number]) for number in range(1, len(phases))]
        return optax.adamw(optax.schedules.join_schedules(parts, ends))

    if lora_plus is not None:
        return optim.lora_plus(adamw, learning_rate, lora_plus)
    return optim.lora_fa(adamw(learning_rate)) if method == "lora_fa" else adamw(learning_rate)


def _rise_and_fall(rate: Any, steps: int, warmup_from: int) -> optax.Schedule:
    warmup = max(1, steps // 16)
    line = optax.schedules.linear_schedule(0.0, rate, warmup)
    rise = lambda count: line(count + warmup_from)
    fall = optax.schedules.cosine_decay_schedule(rate, max(steps - warmup, 1))
    return optax.schedules.join_schedules([rise, fall], [warmup])

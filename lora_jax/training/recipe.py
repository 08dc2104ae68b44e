"""How the command trains, whatever the task: an optimiser of optax, a schedule, and gradients clipped to a norm."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import optax

from lora_jax.training import optim
from lora_jax.training.schedules import Schedule

Optimizer = Literal["adamw", "adafactor", "lamb", "lion", "muon", "sgd"]
COSINE = Schedule()


def optimizer(
    learning_rate: Any,
    phases: Sequence[int],
    *,
    schedule: Schedule = COSINE,
    name: Optimizer = "adamw",
    weight_decay: float = 1e-4,
    method: str = "lora",
    lora_plus: float | None = None,
) -> optax.GradientTransformation:
    """An optimiser of a name, in the way of a method.

    Args:
      learning_rate: its peak; may be a traced number.
      phases: the number of steps of each.
      schedule: what it does in a phase.
      name: of the optimiser. The others' numbers are optax's defaults; `"sgd"` has a momentum of 0.9, and `"muon"` is
        `optim.muon`.
      weight_decay: times the learning rate; of what `optim.decay_mask` says.
      method: `"lora"`, `"lora_fa"` or `"vera"`.
      lora_plus: B's learning rate over A's.

    >>> import jax.numpy as jnp
    >>> tx, weights = optimizer(0.5, [32]), {"w": jnp.zeros(())}
    >>> update, _ = tx.update({"w": jnp.ones(())}, tx.init(weights), weights)
    >>> round(float(update["w"]), 4)  # half of the rate in the first of two steps of warm-up
    -0.25
    """

    def make(rate: optax.Schedule) -> optax.GradientTransformation:
        return _named(name, rate, weight_decay)

    rates = schedule.over(learning_rate, phases)
    if lora_plus is not None:
        return optim.lora_plus(make, rates, lora_plus)
    return optim.lora_fa(make(rates)) if method == "lora_fa" else make(rates)


def _named(name: Optimizer, rate: optax.Schedule, decay: float) -> optax.GradientTransformation:
    mask = optim.decay_mask
    match name:
        case "adafactor" | "muon" | "sgd":  # whose own decay is none, of matrices alone, or not times the rate
            makers = {"adafactor": optax.adafactor, "muon": optim.muon, "sgd": functools.partial(optax.sgd, momentum=0.9)}
            return optax.chain(makers[name](rate), optax.add_decayed_weights(lambda count: -decay * rate(count), mask))
        case _:
            make: Callable[..., optax.GradientTransformation] = getattr(optax, name)
            return make(rate, weight_decay=decay, mask=mask)

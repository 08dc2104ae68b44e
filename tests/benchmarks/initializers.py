"""How the default task of `lora-jax finetune` goes from different starts: MiniLM on movie reviews.

    python tests/benchmarks/initializers.py                      # three starts, about ten minutes on 2 idle cores
    python tests/benchmarks/initializers.py --steps 60 --start olora --learning-rate 5e-4

Each start has the same batches, optimiser and seed. The loss is the mean over each sixth of the training; the accuracy, after
every second sixth, that on the held-out texts.
"""

import argparse
import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # so that it runs as a script, too

from lora_jax.adapters import initializers
from lora_jax.adapters.initializers.moments import moments
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import classify
from lora_jax.command.tasks.base import Session
from lora_jax.command.trainer import optimizer
from lora_jax.training import train

POINTS = 6
MOMENT_BATCHES = 4
STARTS = ("default", "pissa", "olora", "milora", "eva", "corda-ipm", "corda-kpm")


def input_moments(session: Session, adapters: Any) -> Any:
    """The moments of some training batches; padding counts as input, of which these batches have little."""
    config = session.config
    apply = classify.load_base(classify.base_directory(config), config).model.apply
    take, total = jax.jit(functools.partial(moments, apply)), None
    for batch in itertools.islice(session.task.train_batches(config.seed), MOMENT_BATCHES):
        found = take(session.task.variables, adapters, batch["input_ids"], batch["attention_mask"])
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return total


def started(name: str, session: Session) -> tuple[Any, Any]:
    """The base and the adapters of a start."""
    both = session.task.variables, session.init(session.config)
    if name == "default":
        return both
    if name in ("pissa", "olora", "milora"):
        return getattr(initializers, name)(*both)
    found = input_moments(session, both[1])
    return initializers.eva(*both, found) if name == "eva" else initializers.corda(*both, found, mode=name.split("-")[1])


def trained(session: Session, variables: Any, adapters: Any) -> Iterator[str]:
    """At each point the step, the mean loss since the last one, and at every second the accuracy."""
    config, task = session.config, session.task
    tx = optimizer(config)
    state = train.init_state(adapters, tx, key=jax.random.key(config.seed))
    step, measure = train.make_train_step(task.loss, tx, max_grad_norm=1.0), train.make_eval_step(task.measure)
    batches, losses = task.train_batches(config.seed), []
    for i in range(1, config.steps + 1):
        state, metrics = step(state, variables, next(batches))
        losses.append(float(metrics["loss"]))
        point = i * POINTS // config.steps
        if point > (i - 1) * POINTS // config.steps:
            text, losses = f"{i}: {np.mean(losses):.4f}", []
            if point % 2 == 0:
                scores = [np.asarray(measure(state.adapters, variables, batch), np.float64) for batch in task.test_batches()]
                text += f" ({task.score(sum(scores)):.2%})"
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=RunConfig().steps)
    parser.add_argument("--learning-rate", type=float, default=RunConfig().learning_rate)
    parser.add_argument(
        "--start", choices=STARTS, action="append", help="may be given several times (default: default, pissa, eva)"
    )
    options = parser.parse_args()
    session = classify.prepare(RunConfig(steps=options.steps, learning_rate=options.learning_rate))
    print(f"{options.steps} steps up to {options.learning_rate}; the training loss (and test accuracy) at some of them")
    for name in options.start or ("default", "pissa", "eva"):
        began = time.perf_counter()
        variables, adapters = started(name, session)
        ready = time.perf_counter() - began
        points = "  ".join(trained(session, variables, adapters))
        print(f"{name} (start {ready:.1f} s, all {time.perf_counter() - began:.0f} s)  {points}", flush=True)


if __name__ == "__main__":
    main()

"""Training, tests, checkpoints and reports of one run, or of several that are one program.

A checkpoint is written once its adapters are known to be good: the loss of the step after it is finite, or at the end the
score. So a run that diverges keeps those of before.
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from lora_jax.command import metrics, plots, processes
from lora_jax.command.meter import Meter
from lora_jax.command.options import RunConfig
from lora_jax.command.progress import Progress
from lora_jax.command.signals import Interrupted, Signals
from lora_jax.command.tasks.base import Task
from lora_jax.command.trackers import NONE, Trackers
from lora_jax.core import files
from lora_jax.training import recipe


def optimizer(config: RunConfig, learning_rate: Any = None) -> optax.GradientTransformation:
    """The optimiser of a run.

    The rate of a run that is trained further after its end follows its schedule once more, over the steps that were added.

    Args:
      config: the options.
      learning_rate: instead of the run's own; may be a traced number.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    way: Any = {"name": config.optimizer, "weight_decay": config.weight_decay}
    way |= {"method": config.method, "lora_plus": config.lora_plus}
    return recipe.optimizer(rate, config.phases, schedule=config.rates, **way)


def learning_rates(configs: Sequence[RunConfig]) -> np.ndarray:
    """The learning rate of each update of runs of as many steps, `(runs, steps)`; a step that is skipped is no update."""
    counts = jnp.arange(configs[0].steps)
    over = lambda rate: jnp.broadcast_to(configs[0].rates.over(rate, configs[0].phases)(counts), counts.shape)
    return np.asarray(jax.jit(jax.vmap(over))(np.array([config.learning_rate for config in configs], np.float32)))


class Diverged(Exception):
    """A run has no finite result; the message says why and what is left of it."""

    def report(self) -> int:
        """Say so in the first process; returns the exit code."""
        if processes.is_first():
            print(f"lora-jax: {self}", file=sys.stderr)
        return 3


@dataclasses.dataclass
class Run:
    """A run in training.

    Args:
      config: its options.
      directory: its files.
      log: its metrics.
      trackers: where else these go.
      last: what the last step gave, by its names in `metrics.jsonl`, with `None` for what is not finite; nothing if there was
        none.
      skipped: how many steps changed nothing, since their loss or gradient was not finite.
      score: the last one, `None` where it is not finite, or there was none.
      best: the best test so far.
    """

    config: RunConfig
    directory: pathlib.Path
    log: metrics.Log
    trackers: Trackers = NONE
    last: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    skipped: int = 0
    score: float | None = None
    best: metrics.Best | None = None

    @property
    def loss(self) -> float | None:
        """That of the last step, `None` where it is not finite, or there was none."""
        return self.last.get("loss")

    def tested(self, step: int, score: float | None) -> None:
        """Take note of a test."""
        self.score = score
        if score is not None:
            self.best = metrics.Best(step, score) if self.best is None else self.best.then(step, score, self.log.metric)

    @property
    def result(self) -> float | None:
        """The score of the adapters that the run ends with."""
        return self.best.score if self.config.keeps_best and self.best is not None else self.score

    @property
    def kept_step(self) -> int:
        """The step of the adapters that the run ends with."""
        return self.best.step if self.config.keeps_best and self.best is not None else self.log.lines[-1]["step"]

    @property
    def is_stale(self) -> bool:
        """Whether the run stops here, since its last tests were no better than the best."""
        return metrics.is_stale(self.best, self.config.patience)

    @property
    def skips_too_many(self) -> bool:
        """Whether more than a tenth of all steps were skipped."""
        return 10 * self.skipped > self.config.steps

    @property
    def fault(self) -> str | None:
        """Why the run has diverged, if it has; for a run that has ended."""
        if self.skips_too_many:
            return f"the loss or gradient of {self.skipped} steps was not finite"
        return "what was measured last is not finite" if self.score is None else None


def reported(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a step gives: loss, gradient norm, how many steps were skipped so far, and the balance loss if there are experts."""
    return {**{name: found[name] for name in ("loss", "grad_norm", "skipped")}, **found.get("aux", {})}


class Program(Protocol):
    """The compiled steps of the runs, and the state they work on, which is on `devices`."""

    devices: Collection[Any]

    def advance(self) -> Mapping[str, np.ndarray]:
        """One training step; what is `reported` of each run, `(runs,)` each."""
        ...

    def measure(self, batch: Any) -> np.ndarray:
        """What the task measures on a held-out batch, `(runs, ...)`."""
        ...

    def flops(self) -> int | None:
        """Of the products of the last step of all runs; `None` where they can't be counted."""
        ...

    def snapshot(self, step: int, last: Sequence[Mapping[str, float | None]]) -> Sequence[Callable[[], None]]:
        """A finished copy of the state of each run, with what its last step gave; called, it becomes a checkpoint."""
        ...

    def keep(self, step: int, better: Sequence[bool]) -> None:
        """Keep the adapters of these runs as their best, unless they are already; their checkpoints are written first."""
        ...


class Trainer:
    """Trains runs that share a task and the number of steps.

    Args:
      task: what is learnt.
      runs: those that `program` trains, in its order.
      program: what it calls.
      save_every: steps between two checkpoints.
      saved: the step of the checkpoint that the runs go on from.
    """

    def __init__(self, task: Task, runs: Sequence[Run], program: Program, *, save_every: int, saved: int | None = None):
        self.task, self.runs, self.program = task, runs, program
        self.steps, self.step = runs[0].config.steps, saved or 0
        self._save_every, self._saved = save_every, saved
        self._rates = learning_rates([run.config for run in runs])
        self._meter = Meter(program.devices, task.per_step, task.unit, program.flops)
        self._measured = self._meter.idle

    def train(self, console: rich.console.Console, signals: Signals) -> None:
        """All steps that are left, or until all runs have diverged, with tests and checkpoints in between.

        Raises:
          Interrupted: a signal came; there is a checkpoint of the last step.
        """
        task = self.task
        with Progress(console, self.steps, self.step, task.per_step * len(self.runs), task.unit, task.metric) as progress:
            try:
                self._begin(progress, signals)
                while not self._has_ended():
                    signals.check()
                    self._advance(progress)
                    self._record(progress, signals)
            except Interrupted:
                _write(self._snapshot(), [True] * len(self.runs))
                raise
        _write(self._snapshot(), [run.score is not None for run in self.runs])

    def summary(self, run: Run) -> dict[str, float | None]:
        """What a run ended with."""
        return {"steps": self.step, "loss": run.loss, "skipped": run.skipped, run.log.metric.field: run.result}

    def draw(self) -> None:
        """The picture of each run."""
        task = self.task
        for run in self.runs:
            picture = plots.draw(run.log.lines, task.title, task.metric, task.baseline)
            files.write(run.directory / "curve.png", picture)

    def _begin(self, progress: Progress, signals: Signals) -> None:
        """The line of step 0, or of a checkpoint whose line was not written any more; or what the line says."""
        known = processes.from_first([(run.log.lines[-1:], run.log.best(run.config.finished)) for run in self.runs])
        for run, (_, best) in zip(self.runs, known):
            run.best = best and metrics.Best(**best)
        if any(not lines or lines[0]["step"] != self.step for lines, _ in known):
            self._record(progress, signals)
        else:
            for run, ([line], _) in zip(self.runs, known):
                run.score = line[self.task.metric.field]
            self._keep_best()

    def _advance(self, progress: Progress) -> None:
        before = self._snapshot() if self._is_due(self._save_every) else []
        began = time.perf_counter()
        found = dict(self.program.advance())
        seconds = time.perf_counter() - began
        skipped = found.pop("skipped")
        for i, run in enumerate(self.runs):
            rate = float(self._rates[i, self.step - run.skipped])
            run.last = {"learning_rate": rate, **{name: _finite(values[i]) for name, values in found.items()}}
            run.skipped = int(skipped[i])
        _write(before, [run.loss is not None for run in self.runs])
        self.step += 1
        self._measured = self._meter.measured(seconds)
        shown = {name: mean([run.last[name] for run in self.runs]) for name in self.runs[0].last}
        shown |= {"skipped": sum(run.skipped for run in self.runs)}
        progress.step(self.step, seconds, shown | self._measured)

    def _record(self, progress: Progress, signals: Signals) -> None:
        """A line of metrics for each run, with a score where a test is due."""
        tested = self._is_due(self.runs[0].config.test_steps)
        scores = self._test(progress, signals) if tested else [(None, {})] * len(self.runs)
        for run, (score, details) in zip(self.runs, scores):
            last = {"learning_rate": None, "grad_norm": None, **run.last, "skipped": run.skipped}
            loss = last.pop("loss", None)
            run.trackers.write(run.log.append(self.step, loss, score, {**last, **self._measured, **details}))
            run.score = None
            if tested:
                run.tested(self.step, score)
        self._keep_best()

    def _keep_best(self) -> None:
        """Where this step's test was a run's best, its checkpoint and then, apart, its adapters.

        In this order, so that a run that goes on after a crash finds the best of the tests before.
        """
        better = [run.config.keeps_best and run.best is not None and run.best.step == self.step for run in self.runs]
        if any(better):
            _write(self._snapshot(), [run.score is not None for run in self.runs])
            self._saved = self.step
            self.program.keep(self.step, better)

    def _test(self, progress: Progress, signals: Signals) -> list[tuple[float | None, dict[str, float | None]]]:
        """The score of each run on the held-out texts, and what else was measured."""
        task, sums = self.task, np.zeros(())
        for i, batch in enumerate(task.test_batches()):
            signals.check()
            progress.testing(i, task.test_count)
            sums = sums + np.asarray(self.program.measure(batch), np.float64)
        progress.testing(task.test_count, task.test_count)
        scores = [_finite(task.score(own)) for own in sums]
        progress.tested(self.step, task.metric.best([score for score in scores if score is not None], default=None))
        return [(score, {name: _finite(x) for name, x in task.details(own).items()}) for score, own in zip(scores, sums)]

    def _snapshot(self) -> Sequence[Callable[[], None]]:
        """Each run's checkpoint of this step, not written yet; none of the step that the runs went on from."""
        return [] if self.step == self._saved else self.program.snapshot(self.step, [run.last for run in self.runs])

    def _has_ended(self) -> bool:
        return self.step == self.steps or all(run.skips_too_many or run.is_stale for run in self.runs)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self._has_ended()


def _write(checkpoints: Sequence[Callable[[], None]], good: Sequence[bool]) -> None:
    """Write those of the runs whose adapters are good."""
    for write, is_good in zip(checkpoints, good):
        if is_good:
            write()


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

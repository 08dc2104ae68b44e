"""Training, tests, checkpoints and reports of one run, or of several that are one program."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import optax
import rich.console

from lora_jax.command import metrics, plots, processes
from lora_jax.command.options import RunConfig
from lora_jax.command.progress import Progress
from lora_jax.command.signals import Interrupted, Signals
from lora_jax.command.tasks.base import Task
from lora_jax.core import files
from lora_jax.training import optim


def optimizer(config: RunConfig, learning_rate: Any = None) -> optax.GradientTransformation:
    """AdamW with a short warm-up to the learning rate and a cosine decay, in the way of the run's method.

    A run that is trained further after its end rises and falls once more, over the steps that were added.

    Args:
      config: the options.
      learning_rate: instead of the run's own; may be a traced number.
    """

    def adamw(rate: Any) -> optax.GradientTransformation:
        phases = [_rise_and_fall(rate, steps) for steps in config.phases]
        return optax.adamw(optax.schedules.join_schedules(phases, config.finished))

    rate = config.learning_rate if learning_rate is None else learning_rate
    if config.lora_plus is not None:
        return optim.lora_plus(adamw, rate, config.lora_plus)
    return optim.lora_fa(adamw(rate)) if config.method == "lora_fa" else adamw(rate)


def _rise_and_fall(rate: Any, steps: int) -> optax.Schedule:
    warmup = max(1, steps // 16)
    rise = optax.schedules.linear_schedule(0.0, rate, warmup)
    fall = optax.schedules.cosine_decay_schedule(rate, max(steps - warmup, 1))
    return optax.schedules.join_schedules([rise, fall], [warmup])


@dataclasses.dataclass
class Run:
    """A run in training: its options and files, and its last loss."""

    config: RunConfig
    directory: pathlib.Path
    log: metrics.Log
    loss: float | None = None


class Program(Protocol):
    """The compiled steps of the runs, and the state they work on."""

    def advance(self) -> np.ndarray:
        """One training step; the loss of each run, `(runs,)`."""
        ...

    def measure(self, batch: Any) -> np.ndarray:
        """What the task measures on a held-out batch, `(runs, ...)`."""
        ...

    def save(self, step: int, losses: Sequence[float | None]) -> None:
        """Write a checkpoint of each run."""
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

    def train(self, console: rich.console.Console, signals: Signals) -> None:
        """All steps that are left, with tests and checkpoints in between.

        Raises:
          Interrupted: a signal came; there is a checkpoint of the last step.
        """
        task, first = self.task, self.runs[0]
        with Progress(console, self.steps, self.step, task.per_step * len(self.runs), task.unit, task.metric) as progress:
            try:
                if processes.from_first(not first.log.lines or first.log.lines[-1]["step"] != self.step):
                    self._record(progress, signals)  # of step 0, or of a checkpoint whose line was not written any more
                while self.step < self.steps:
                    signals.check()
                    self._advance(progress)
                    self._record(progress, signals)
            except Interrupted:
                self._save()
                raise

    def draw(self) -> None:
        """The picture of each run."""
        task = self.task
        for run in self.runs:
            picture = plots.draw(run.log.lines, task.title, task.metric, task.baseline)
            files.write(run.directory / "curve.png", picture)

    def _advance(self, progress: Progress) -> None:
        for run, loss in zip(self.runs, self.program.advance()):
            run.loss = _finite(loss)
        self.step += 1
        progress.step(self.step, mean([run.loss for run in self.runs]))
        if self._is_due(self._save_every):
            self._save()

    def _record(self, progress: Progress, signals: Signals) -> None:
        """A line of metrics for each run, with a score where a test is due."""
        tested = self._is_due(self.runs[0].config.test_every)
        scores = self._test(progress, signals) if tested else [None] * len(self.runs)
        for run, score in zip(self.runs, scores):
            run.log.append(self.step, run.loss, score)

    def _test(self, progress: Progress, signals: Signals) -> list[float | None]:
        """The score of each run on the held-out texts."""
        task, sums = self.task, np.zeros(())
        for i, batch in enumerate(task.test_batches()):
            signals.check()
            progress.testing(i, task.test_count)
            sums = sums + np.asarray(self.program.measure(batch), np.float64)
        progress.testing(task.test_count, task.test_count)
        scores = [_finite(task.score(own)) for own in sums]
        progress.tested(self.step, task.metric.best([score for score in scores if score is not None], default=None))
        return scores

    def _save(self) -> None:
        if self._saved != self.step:
            self.program.save(self.step, [run.loss for run in self.runs])
            self._saved = self.step

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are known."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None

"""Training, tests, checkpoints and reports of one run, or of several that are one program.

A checkpoint is written once its adapters are known to be good: the loss of the step after it is finite, or at the end the
score. So a run that diverges keeps those of before.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
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
from lora_jax.training import recipe


def optimizer(config: RunConfig, learning_rate: Any = None) -> optax.GradientTransformation:
    """The optimiser of a run.

    The first step of its warm-up counts, but in runs of before. The rate of a run that is trained further after its end rises
    and falls once more, over the steps that were added.

    Args:
      config: the options.
      learning_rate: instead of the run's own; may be a traced number.
    """

    rate = config.learning_rate if learning_rate is None else learning_rate
    way: Any = {"method": config.method, "lora_plus": config.lora_plus}
    return recipe.optimizer(rate, config.phases, warmup_from=config.warmup_from, **way)


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
      loss: that of the last step, `None` where it is not finite, or there was none.
      skipped: how many steps changed nothing, since their loss or gradient was not finite.
      score: the last one, `None` where it is not finite, or there was none.
    """

    config: RunConfig
    directory: pathlib.Path
    log: metrics.Log
    loss: float | None = None
    skipped: int = 0
    score: float | None = None

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


class Program(Protocol):
    """The compiled steps of the runs, and the state they work on."""

    def advance(self) -> tuple[np.ndarray, np.ndarray]:
        """One training step; the loss of each run, and how many steps it has skipped so far: `(runs,)` each."""
        ...

    def measure(self, batch: Any) -> np.ndarray:
        """What the task measures on a held-out batch, `(runs, ...)`."""
        ...

    def snapshot(self, step: int, losses: Sequence[float | None]) -> Sequence[Callable[[], None]]:
        """A copy of the state of each run; called, it becomes a checkpoint."""
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

    def draw(self) -> None:
        """The picture of each run."""
        task = self.task
        for run in self.runs:
            picture = plots.draw(run.log.lines, task.title, task.metric, task.baseline)
            files.write(run.directory / "curve.png", picture)

    def _begin(self, progress: Progress, signals: Signals) -> None:
        """The line of step 0, or of a checkpoint whose line was not written any more; or what the line says."""
        last = processes.from_first([run.log.lines[-1:] for run in self.runs])
        if any(not lines or lines[0]["step"] != self.step for lines in last):
            self._record(progress, signals)
        else:
            for run, [line] in zip(self.runs, last):
                run.score = line[self.task.metric.field]

    def _advance(self, progress: Progress) -> None:
        before = self._snapshot() if self._is_due(self._save_every) else []
        for run, loss, skipped in zip(self.runs, *self.program.advance()):
            run.loss, run.skipped = _finite(loss), int(skipped)
        _write(before, [run.loss is not None for run in self.runs])
        self.step += 1
        progress.step(self.step, mean([run.loss for run in self.runs]))

    def _record(self, progress: Progress, signals: Signals) -> None:
        """A line of metrics for each run, with a score where a test is due."""
        tested = self._is_due(self.runs[0].config.test_every)
        scores = self._test(progress, signals) if tested else [None] * len(self.runs)
        for run, score in zip(self.runs, scores):
            run.log.append(self.step, run.loss, score)
            run.score = score

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

    def _snapshot(self) -> Sequence[Callable[[], None]]:
        """Each run's checkpoint of this step, not written yet; none of the step that the runs went on from."""
        return [] if self.step == self._saved else self.program.snapshot(self.step, [run.loss for run in self.runs])

    def _has_ended(self) -> bool:
        return self.step == self.steps or all(run.skips_too_many for run in self.runs)

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

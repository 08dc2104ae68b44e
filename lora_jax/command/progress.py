"""What `lora-jax finetune` shows while it runs: a live bar on a terminal, plain lines elsewhere."""

import collections
import statistics
import time

import rich.console
import rich.progress

from lora_jax.command.metrics import Metric

_RECENT = 30  # steps that the speed is measured over


class Progress:
    """The progress of a training run, as a context manager.

    Args:
      console: where to write.
      steps: the last step.
      step: the step at which the run starts or goes on.
      per_step: examples, or tokens, per step.
      unit: `"examples"` or `"tokens"`.
      metric: what is measured on held-out texts.
    """

    def __init__(self, console: rich.console.Console, steps: int, step: int, per_step: int, unit: str, metric: Metric):
        self._console, self._steps, self._per_step, self._unit, self._metric = console, steps, per_step, unit, metric
        self._score, self._since = "", time.monotonic()
        self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=10),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, figures="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, loss: float | None) -> None:
        """Show a training step that has just ended."""
        now = time.monotonic()
        self._seconds.append(now - self._since)
        self._since = now
        rate = 1 / statistics.median(self._seconds)  # a step that compiles takes seconds, and is not the speed
        left = round((self._steps - step) / rate)
        figures = f"loss {'not finite' if loss is None else f'{loss:.3f}'}{self._score}"
        figures += f"  {rate * self._per_step:.0f} {self._unit}/s  {left // 60}:{left % 60:02d} left"
        self._bar.update(self._task, completed=step, description="train", figures=figures)
        if step % max(1, self._steps // 20) == 0 or step == self._steps:
            self._line(step, figures)

    def testing(self, done: int, total: int) -> None:
        """Show that a test is under way."""
        self._bar.update(self._task, description=f"test {done}/{total}", figures=self._score.strip())

    def tested(self, step: int, score: float | None) -> None:
        """Show the result of a test that has just ended."""
        text = "not finite" if score is None else self._metric.text(score)
        self._since = time.monotonic()
        self._score = f"  {self._metric.name} {text}"
        self._bar.update(self._task, description="train", figures=self._score.strip())
        self._line(step, f"{self._metric.held_out} {text}")

    def _line(self, step: int, figures: str) -> None:
        if not self._console.is_terminal:
            self._console.out(f"step {step}/{self._steps}  {figures}", highlight=False)

"""What `lora-jax finetune` shows while it runs: a live bar on a terminal, plain lines elsewhere."""

import collections
import statistics
from collections.abc import Mapping

import rich.console
import rich.progress

from lora_jax.command.metrics import Metric

_RECENT = 30  # steps that the speed is measured over
_WIDTH, _BAR = 110, 10
# What is shown of a step, by its name in `metrics.jsonl`: the form, and what to multiply by.
_FORMS = {
    "loss": ("loss {:.3f}", 1),
    "balance_loss": ("balance {:.3f}", 1),
    "grad_norm": ("grad {:.3g}", 1),
    "learning_rate": ("rate {:.2g}", 1),
    "skipped": ("skipped {:.0f}", 1),
    "mfu": ("MFU {:.0%}", 1),
    "memory_bytes": ("{:.1f} GB", 1e-9),
}
_LEAST = ("memory_bytes", "mfu", "learning_rate", "balance_loss", "grad_norm")  # what is left out first where it's narrow


class Progress:
    """The progress of a training run, as a context manager.

    Args:
      console: where to write.
      steps: the last step.
      step: the step at which the run starts or goes on.
      per_step: how many of `unit` a step takes.
      unit: `"examples"`, `"tokens"` or `"pairs"`.
      metric: what is measured on held-out texts.
    """

    def __init__(self, console: rich.console.Console, steps: int, step: int, per_step: int, unit: str, metric: Metric):
        self._console, self._steps, self._per_step, self._unit, self._metric = console, steps, per_step, unit, metric
        self._score, self._is_live = "", console.is_terminal
        self._seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)
        beside = len(f"{steps}/{steps}") + (len("train  ") + _BAR + 1 if self._is_live else len("step   "))
        self._width = (min(_WIDTH, console.width) if self._is_live else _WIDTH) - beside
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=_BAR),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not self._is_live,
        )
        self._task = self._bar.add_task("train", total=steps, completed=step, figures="compiling")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, seconds: float, values: Mapping[str, float | None]) -> None:
        """Show a training step that has just ended.

        Args:
          step: its number.
          seconds: how long it took.
          values: what it gave and what was measured, by the names in `metrics.jsonl`.
        """
        self._seconds.append(seconds)
        usual = statistics.median_low(self._seconds)  # a step that compiles takes seconds, and is not the speed
        if self._is_live or step % max(1, self._steps // 20) == 0 or step == self._steps:
            figures = self._figures(values, usual, round((self._steps - step) * usual))
            self._bar.update(self._task, completed=step, description="train", figures=figures)
            self._line(step, figures)

    def _figures(self, values: Mapping[str, float | None], usual: float, left: int) -> str:
        """As much as fits, without what matters least."""
        texts = {name: _text(form, factor, values[name]) for name, (form, factor) in _FORMS.items() if name in values}
        if not values["skipped"]:
            del texts["skipped"]
        rate = self._per_step / usual
        speed = f"{rate:.{0 if rate >= 10 else 1}f} {self._unit}/s"
        texts |= {"score": self._score * self._is_live, "speed": speed, "left": f"{left // 60}:{left % 60:02d} left"}
        joined = lambda: "  ".join(filter(None, texts.values()))
        for name in _LEAST:
            if len(joined()) > self._width:
                texts.pop(name, None)
        return joined()

    def testing(self, done: int, total: int) -> None:
        """Show that a test is under way."""
        self._bar.update(self._task, description=f"test {done}/{total}", figures=self._score)

    def tested(self, step: int, score: float | None) -> None:
        """Show the result of a test that has just ended."""
        text = "not finite" if score is None else self._metric.text(score)
        self._score = f"{self._metric.name} {text}"
        self._bar.update(self._task, description="train", figures=self._score)
        self._line(step, f"{self._metric.held_out} {text}")

    def _line(self, step: int, figures: str) -> None:
        if not self._is_live:
            self._console.out(f"step {step}/{self._steps}  {figures}", highlight=False)


def _text(form: str, factor: float, value: float | None) -> str:
    return f"{form.partition('{')[0]}not finite" if value is None else form.format(factor * value)

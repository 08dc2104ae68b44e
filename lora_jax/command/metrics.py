"""The metrics of a run: what each task counts on held-out texts, and the log of every step."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core import files


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a task measures on held-out texts.

    Args:
      field: its name in `metrics.jsonl`.
      name: its name in a progress line.
      held_out: its name in a summary.
      form: the format of a value.
      axis: the label of its axis in the picture.
      factor: the picture shows the value times this.
      best: `max` or `min`, which of several values is the best.
    """

    field: str
    name: str
    held_out: str
    form: str
    axis: str
    factor: float = 1.0
    best: Callable[..., Any] = max

    def text(self, value: float) -> str:
        """A value as it is printed.

        >>> ACCURACY.text(0.8125), PERPLEXITY.text(31.416)
        ('81.2%', '31.42')
        """
        return format(value, self.form)


ACCURACY = Metric("test_accuracy", "accuracy", "test accuracy", ".1%", "test accuracy (%)", 100.0)
PERPLEXITY = Metric("perplexity", "perplexity", "held-out perplexity", ".2f", "held-out perplexity", best=min)
PREFERENCE = Metric(
    "reward_accuracy", "rewards right", "chosen answers with the larger reward", ".1%", "rewards right (%)", 100.0
)
METRICS = (ACCURACY, PERPLEXITY, PREFERENCE)
_OF_STEP = ("step", "loss", "learning_rate", "grad_norm", "skipped", "balance_loss")
_FIELDS = tuple(("step", "loss", metric.field) for metric in METRICS)


def is_of_time(name: str) -> bool:
    """Whether a field of `metrics.jsonl` is one of those that differ between two runs that are the same."""
    return name.endswith("_per_second") or name in ("memory_bytes", "mfu")


@dataclasses.dataclass(frozen=True)
class Best:
    """The best of some tests; of equal ones the first.

    Args:
      step: when it was.
      score: what was measured.
      later: how many tests came after it.
    """

    step: int
    score: float
    later: int = 0

    def then(self, step: int, score: float, metric: Metric) -> "Best":
        """With one more test.

        >>> Best(0, 0.5).then(10, 0.5, ACCURACY).then(20, 0.4, ACCURACY)
        Best(step=0, score=0.5, later=2)
        """
        is_better = score != self.score and metric.best(score, self.score) == score
        return Best(step, score) if is_better else dataclasses.replace(self, later=self.later + 1)


def is_stale(best: Best | None, patience: int | None) -> bool:
    """Whether as many tests came after the best as a run waits for; it waits for ever without patience."""
    return patience is not None and best is not None and best.later >= patience


def best(lines: Iterable[Mapping[str, Any]], finished: Sequence[int] = ()) -> Best | None:
    """The best test of a run, if there was one.

    Args:
      lines: its metrics.
      finished: the steps at which it was finished before it was trained further: only later tests are counted as such.
    """
    found = None
    for line in lines:
        metric = next(metric for metric in METRICS if metric.field in line)
        if (score := line[metric.field]) is not None:
            found = Best(line["step"], score) if found is None else found.then(line["step"], score, metric)
        if found is not None and line["step"] in finished:
            found = dataclasses.replace(found, later=0)
    return found


class Log:
    """The metrics of a run, on disk and in `lines`; before it was opened now, the run had `reached` a step, or -1.

    Opening drops a line that a crash cut off, and all lines after the step at which the run goes on.

    Args:
      directory: the run.
      step: the step at which the run goes on.
      metric: what is measured on held-out texts.
      write: whether it is this process that writes; if not, `lines` alone is kept, from `step` on.
    """

    def __init__(self, directory: pathlib.Path, step: int, metric: Metric, write: bool = True):
        file = directory / "metrics.jsonl" if write else pathlib.Path(os.devnull)
        self.metric = metric
        found = read(directory) if write else []
        self.reached = found[-1]["step"] if found else -1
        self.lines = [line for line in found if line["step"] <= step]
        if write:
            files.write(file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        with files.writing(file):
            self._stream = file.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(
        self, step: int, loss: float | None, score: float | None, more: Mapping[str, float | None]
    ) -> Mapping[str, float | None]:
        """Write one line, and return it; `more` is what else was measured."""
        self.lines.append({"step": step, "loss": loss, self.metric.field: score, **more})
        self._stream.write(json.dumps(self.lines[-1]) + "\n")
        self._stream.flush()
        return self.lines[-1]

    def score(self, step: int) -> str:
        """The score at a step; `unknown` if the line is gone."""
        found = [line[self.metric.field] for line in self.lines if line["step"] == step]
        return "unknown" if not found else "not finite" if found[0] is None else self.metric.text(found[0])

    def best(self, finished: Sequence[int] = ()) -> dict[str, Any] | None:
        """The fields of `best`, as one process can tell them to others."""
        found = best(self.lines, finished)
        return None if found is None else dataclasses.asdict(found)

    def details(self, first: int, last: int) -> list[str]:
        """What else the tests at two steps measured, in words."""
        before, after = (next((line for line in self.lines if line["step"] == step), {}) for step in (first, last))
        names = [name for name in after if name in before and name not in (*_OF_STEP, self.metric.field)]
        return [
            f"{name.replace('_', ' ')}: {_form(before[name])} before, {_form(after[name])} after"
            for name in names
            if not is_of_time(name)
        ]


def _form(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def read(directory: pathlib.Path) -> list[Mapping[str, Any]]:
    """The whole lines of a run's metrics, up to the first that is damaged."""
    file = directory / "metrics.jsonl"
    lines = []
    with files.reading(file):
        content = file.read_bytes() if file.exists() else b""
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith(b"\n") or not isinstance(line, dict) or tuple(line)[:3] not in _FIELDS:
            break
        lines.append(line)
    return lines

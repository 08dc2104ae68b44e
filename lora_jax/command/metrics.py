"""The metrics of a run: what each task counts on held-out texts, and the log of every step."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
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
_FIELDS = tuple(("step", "loss", metric.field) for metric in (ACCURACY, PERPLEXITY))


class Log:
    """The metrics of a run, on disk and in `lines`.

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
        self.lines = [line for line in read(directory) if line["step"] <= step] if write else []
        if write:
            files.write(file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        with files.writing(file):
            self._stream = file.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, step: int, loss: float | None, score: float | None) -> None:
        """Write one line."""
        self.lines.append({"step": step, "loss": loss, self.metric.field: score})
        self._stream.write(json.dumps(self.lines[-1]) + "\n")
        self._stream.flush()

    def score(self, step: int) -> str:
        """The score at a step; `unknown` if the line is gone."""
        found = [line[self.metric.field] for line in self.lines if line["step"] == step]
        return "unknown" if not found else "not finite" if found[0] is None else self.metric.text(found[0])


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
        if not text.endswith(b"\n") or not isinstance(line, dict) or tuple(line) not in _FIELDS:
            break
        lines.append(line)
    return lines

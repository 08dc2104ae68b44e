"""Pictures of runs: loss and test accuracy or perplexity of one by step, or of several side by side."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from lora_jax.command.metrics import Metric


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and its neighbours, fewer of them at the ends.

    >>> smooth(np.array([0.0, 3.0, 6.0]), width=3).tolist()
    [1.5, 3.0, 4.5]
    """
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def mean_width(steps: int) -> int:
    """How many losses to take the mean of."""
    return min(steps, max(1, steps // 20) * 2 + 1)


def draw(lines: Sequence[Mapping[str, Any]], title: str, metric: Metric, baseline: tuple[str, float] | None = None) -> bytes:
    """A PNG of the metrics.

    Args:
      lines: the metrics of a run.
      title: what was trained on what.
      metric: what was measured on held-out texts.
      baseline: the name and value of what the measurements compare with.
    """
    losses = np.array([(line["step"], line["loss"]) for line in lines if line["loss"] is not None]).reshape(-1, 2)
    scores = [(line["step"], line[metric.field]) for line in lines if line[metric.field] is not None]
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title(title.replace("$", r"\$"), fontsize=13)
    above.plot(*losses.T, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    width = mean_width(len(losses))
    if width > 1:
        mean = smooth(losses[:, 1], width)
        above.plot(losses[:, 0], mean, color="tab:blue", linewidth=2.2, label=f"mean of {width} steps")
    above.set_ylabel("training loss", fontsize=12)
    above.legend(fontsize=11, frameon=False)
    steps, values = [step for step, _ in scores], [metric.factor * value for _, value in scores]
    below.plot(steps, values, color="tab:orange", linewidth=2.2, marker="o", markersize=7)
    for i, (step, score) in enumerate(scores):
        beside = i == 0 or (score < scores[i - 1][1] and i < len(scores) - 1)  # where the line comes from above
        place = {"xytext": (11, 3 if i else -4), "ha": "left"} if beside else {"xytext": (0, 9), "ha": "center"}
        below.annotate(metric.text(score), (step, metric.factor * score), textcoords="offset points", fontsize=11, **place)
    if baseline is not None:
        name, value = baseline
        label = f"{name}, {metric.text(value)}"
        below.axhline(metric.factor * value, color="gray", linestyle="--", linewidth=1.2, label=label)
        below.legend(fontsize=11, frameon=False, loc="center right")
    below.set_ylabel(metric.axis, fontsize=12)
    below.set_xlabel("step", fontsize=12)
    for axes in (above, below):
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.25)
        axes.margins(y=0.18)
    return _png(figure)


def compare(runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], float | None]], title: str, metric: Metric) -> bytes:
    """A PNG of several runs: the loss of each by step, and their scores as bars of the same colours, the best one on top.

    Args:
      runs: by name, the metrics and the last score of each, the best run first.
      title: what was trained on what.
      metric: what was measured on held-out texts.
    """
    figure = Figure(figsize=(10.5, max(4.0, 1.6 + 0.3 * len(runs))), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title.replace("$", r"\$"), fontsize=13)
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(runs)))
    for (lines, _), colour in reversed(list(zip(runs.values(), colours))):  # the best is drawn last, above the others
        losses = np.array([(line["step"], line["loss"]) for line in lines if line["loss"] is not None]).reshape(-1, 2)
        if len(losses):
            left.plot(losses[:, 0], smooth(losses[:, 1], mean_width(len(losses))), color=colour, linewidth=1.6)
    left.set_ylabel("training loss, running mean", fontsize=12)
    left.set_xlabel("step", fontsize=12)
    scores = [score for _, score in runs.values()]
    lengths = [0.0 if score is None else metric.factor * score for score in scores]
    bars = right.barh(list(runs), lengths, color=colours)
    right.bar_label(bars, ["not finite" if score is None else metric.text(score) for score in scores], padding=3, fontsize=10)
    right.set_xlabel(metric.axis, fontsize=12)
    right.invert_yaxis()
    right.set_xlim(0, 1.3 * max(*lengths, 1e-9))
    for axes in (left, right):
        axes.tick_params(labelsize=10)
        axes.grid(alpha=0.25, axis="both" if axes is left else "x")
        axes.set_axisbelow(True)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()

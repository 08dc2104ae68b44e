"""The picture of a run: loss and test accuracy by step."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and its neighbours, fewer of them at the ends.

    >>> smooth(np.array([0.0, 3.0, 6.0]), width=3).tolist()
    [1.5, 3.0, 4.5]
    """
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw(lines: Sequence[Mapping[str, Any]], title: str, chance: float) -> bytes:
    """A PNG of the metrics.

    Args:
      lines: the metrics of a run.
      title: what was trained on what.
      chance: the accuracy of guessing the most frequent class.
    """
    losses = np.array([(line["step"], line["loss"]) for line in lines if line["loss"] is not None]).reshape(-1, 2)
    tests = np.array([(line["step"], line["test_accuracy"]) for line in lines if line["test_accuracy"] is not None])
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title(title.replace("$", r"\$"), fontsize=13)
    above.plot(*losses.T, color="tab:blue", alpha=0.3, linewidth=1, label="each step")
    width = min(len(losses), max(1, len(losses) // 20) * 2 + 1)
    if width > 1:
        mean = smooth(losses[:, 1], width)
        above.plot(losses[:, 0], mean, color="tab:blue", linewidth=2.2, label=f"mean of {width} steps")
    above.set_ylabel("training loss", fontsize=12)
    above.legend(fontsize=11, frameon=False)
    tests = tests.reshape(-1, 2)
    below.plot(tests[:, 0], 100 * tests[:, 1], color="tab:orange", linewidth=2.2, marker="o", markersize=7)
    for i, (step, accuracy) in enumerate(tests):
        place = {"xytext": (0, 9), "ha": "center"} if i else {"xytext": (11, -4), "ha": "left"}  # beside the steep start
        below.annotate(f"{accuracy:.1%}", (step, 100 * accuracy), textcoords="offset points", fontsize=11, **place)
    below.axhline(100 * chance, color="gray", linestyle="--", linewidth=1.2, label=f"most frequent class, {chance:.1%}")
    below.set_ylabel("test accuracy (%)", fontsize=12)
    below.set_xlabel("step", fontsize=12)
    below.legend(fontsize=11, frameon=False, loc="center right")
    for axes in (above, below):
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.25)
        axes.margins(y=0.18)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()

"""Curves as SVG: where ticks, lines and points are; how they look is in the template."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.command.metrics import Metric, is_of_time
from lora_jax.command.plots import mean_width, smooth

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 56, 424, 16, 198  # of the axes
_MOST = 400  # points of a line
_NAMES = {"loss": "training loss", "learning_rate": "learning rate", "grad_norm": "gradient norm"}

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A curve in the units of the picture, `WIDTH` x `HEIGHT`.

    Args:
      title: what it is.
      legend: what the lines are, if that needs saying.
      xticks: the place and text of each.
      yticks: likewise.
      faint: the path of what is measured at every step, where `line` is its running mean.
      line: the path of the curve.
      points: the places of single measurements.
      labels: the place and text of what is said at some of them.
      baseline: the height and text of what the curve compares with.
    """

    title: str
    legend: str
    xticks: list[tuple[float, str]]
    yticks: list[tuple[float, str]]
    faint: str
    line: str
    points: Points
    labels: list[tuple[float, float, str]]
    baseline: tuple[float, str] | None


def charts(lines: Sequence[Mapping[str, Any]], metric: Metric, baseline: tuple[str, float] | None = None) -> list[Chart]:
    """The curves of a run: of its loss, its score, and all else that its metrics hold, but for what depends on time or device.

    Args:
      lines: the metrics.
      metric: what was measured on held-out texts.
      baseline: the name and score of what the score compares with.
    """
    steps = lines[0]["step"], lines[-1]["step"]
    found = dict.fromkeys(name for line in lines for name in line if name not in ("step", "skipped") and not is_of_time(name))
    order = [name for name in ("loss", metric.field, "learning_rate", "grad_norm") if name in found]
    made = []
    for name in [*order, *(name for name in found if name not in order)]:
        factor = metric.factor if name == metric.field else 1.0
        known = [(line["step"], factor * line[name]) for line in lines if line.get(name) is not None]
        if not known:
            continue
        if name != metric.field:
            made.append(_chart(_NAMES.get(name, name.replace("_", " ")), known, steps, averaged=name == "loss"))
            continue
        form = lambda value: metric.text(value / metric.factor)
        compared = None if baseline is None else (metric.factor * baseline[1], f"{baseline[0]}, {metric.text(baseline[1])}")
        made.append(_chart(metric.axis, known, steps, baseline=compared, form=form))
    return made


def _chart(
    title: str,
    known: Points,
    steps: tuple[int, int],
    averaged: bool = False,
    baseline: tuple[float, str] | None = None,
    form: Callable[[float], str] | None = None,
) -> Chart:
    xs, ys = (np.array(axis, float) for axis in zip(*known))
    sparse = len(known) < max(4, (steps[1] - steps[0]) // 2)
    heights = [ys.min(), ys.max(), *([baseline[0]] if baseline else [])]
    yticks = ticks(min(heights), max(heights), 4)
    across, up = _scale(*steps, LEFT, RIGHT), _scale(yticks[0], yticks[-1], BOTTOM, TOP)
    level = None if baseline is None else (up(baseline[0]), baseline[1])
    width = mean_width(len(ys)) if averaged else 1
    mean = smooth(ys, width) if width > 1 else ys
    points = [(across(x), up(y)) for x, y in known] if sparse else []
    return Chart(
        title=title,
        legend=f"bold: mean of {width} steps" if width > 1 else "",
        xticks=[(across(x), f"{x:,.0f}") for x in ticks(*steps, 5) if steps[0] <= x <= steps[1] and x == int(x)],
        yticks=list(zip(map(up, yticks), aligned(yticks))),
        faint=_path(xs, ys, across, up) if width > 1 else "",
        line=_path(xs, mean, across, up),
        points=points,
        labels=[_label(*points[i], (form or number)(ys[i]), level) for i in sorted({0, len(points) - 1})] if points else [],
        baseline=level,
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About so many round numbers, the first at most `low` and the last at least `high`.

    >>> ticks(0.13, 0.68, 4), ticks(5, 5, 4)
    ([0.0, 0.2, 0.4, 0.6, 0.8], [4.0, 4.5, 5.0, 5.5, 6.0])
    """
    if high <= low:
        pad = abs(low) / 5 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.75)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number with four digits that count.

    >>> number(0.0005), number(83.25), number(12345.6), number(2e-7)
    ('0.0005', '83.25', '12,346', '2e-07')
    """
    return f"{value:,.0f}" if abs(value) >= 1e4 and abs(value) < 1e9 else f"{value:.4g}"


def aligned(values: Sequence[float]) -> list[str]:
    """Numbers with as many decimals as one of them needs.

    >>> aligned([0.0, 0.25, 0.5]), aligned([0.0, 2e-5]), aligned([1000.0, 2000.0])
    (['0.00', '0.25', '0.50'], ['0', '2e-05'], ['1,000', '2,000'])
    """
    texts = [number(value) for value in values]
    if any("e" in text for text in texts):
        return texts
    decimals = max(len(text.partition(".")[2]) for text in texts)
    return [f"{value:,.{decimals}f}" for value in values]


def _label(x: float, y: float, text: str, level: tuple[float, str] | None) -> tuple[float, float, str]:
    """Where a point's text goes: above it, or below it where there is no room."""
    crowded = y < TOP + 16 or (level is not None and 0 < y - level[0] < 24)
    return x, y + 20 if crowded else y - 10, text


def _scale(low: float, high: float, begin: float, end: float) -> Any:
    """What maps one range to another, to a tenth; a range of one number to its middle."""
    if high == low:
        return lambda value: (begin + end) / 2
    return lambda value: round(float(begin + (value - low) / (high - low) * (end - begin)), 1)


def _path(xs: np.ndarray, ys: np.ndarray, across: Any, up: Any) -> str:
    """The path through the points; of many the lowest and the highest of each stretch."""
    if len(xs) > _MOST:
        stretches = np.array_split(np.arange(len(xs)), _MOST // 2)
        kept = sorted({0, len(xs) - 1, *(int(i[fn(ys[i])]) for i in stretches for fn in (np.argmin, np.argmax))})
        xs, ys = xs[kept], ys[kept]
    return "M" + "L".join(f"{across(x)},{up(y)}" for x, y in zip(xs, ys))

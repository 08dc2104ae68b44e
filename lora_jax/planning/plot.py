"""A plan as a picture."""

import io
import os
import pathlib
from typing import Any

from matplotlib.figure import Figure

from lora_jax.core.errors import InputError
from lora_jax.planning.plan import Plan


def check(file: pathlib.Path) -> None:
    """Raise an InputError unless a picture can be written there, before it takes minutes to make."""
    if file.suffix != ".png" or file.is_dir():
        raise InputError(f"plot: {file} must be the name of a .png file")
    if not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"plot: {file} can't be written: is {file.parent} a directory that you may write to?")


def draw(plan: Plan) -> bytes:
    """A PNG of a plan: arguments and what comes to the peak on top of them, a bar for each step, against the chip's memory."""
    count = len(plan.steps)
    figure = Figure(figsize=(max(4.6, 1.9 + 1.35 * count), 4.4), layout="constrained")
    axes = figure.subplots()
    highest = _bars(axes, plan)
    if plan.hbm_bytes_per_chip is not None:
        hbm = plan.hbm_bytes_per_chip / 2**30
        highest = max(highest, hbm)
        axes.axhline(hbm, color="tab:red", linestyle="--", linewidth=1.6)
        text = {"xytext": (4, 4), "textcoords": "offset points", "fontsize": 12, "color": "tab:red"}
        axes.annotate(f"a chip has {hbm:.1f}", (-0.6, hbm), **text)
    axes.set_xlim(-0.6, count - 0.4)
    axes.set_ylim(0, 1.15 * highest)
    axes.set_ylabel("GiB on each chip", fontsize=12)
    axes.set_title(f"{plan.request.model} on {plan.request.topology}".replace("$", r"\$"), fontsize=13)
    axes.tick_params(axis="y", labelsize=12)
    axes.grid(alpha=0.25, axis="y")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", fontsize=11, frameon=False, ncols=2)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _bars(axes: Any, plan: Plan) -> float:
    """Draw a bar for each step; returns the height of the highest."""
    arguments = [step.argument_bytes / 2**30 for step in plan.steps]
    peaks = [max((step.peak_bytes_per_chip or 0) / 2**30, given) for step, given in zip(plan.steps, arguments)]
    places = range(len(peaks))
    axes.bar(places, arguments, width=0.6, color="tab:blue", label="arguments")
    axes.bar(places, [p - a for p, a in zip(peaks, arguments)], 0.6, arguments, color="tab:orange", label="temporaries")
    for place, step, peak in zip(places, plan.steps, peaks):
        text = "?" if step.peak_bytes_per_chip is None else f"{peak:.1f}"
        axes.annotate(text, (place, peak), (0, 3), textcoords="offset points", ha="center", fontsize=12)
    names = [f"{step.step}\n({step.source.replace('analytic ', '').replace(', ', chr(10))})" for step in plan.steps]
    axes.set_xticks(places, names, fontsize=12)
    return max(peaks)

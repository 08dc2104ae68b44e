"""`report.html`: what is collected of a run, and the page made of it."""

import datetime
import functools
import importlib.metadata
import pathlib
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jinja2
import numpy as np

import lora_jax
from lora_jax import sharding
from lora_jax.adapters.summary import size_text, summary
from lora_jax.command import config_files, processes, run
from lora_jax.command.metrics import Log, Metric
from lora_jax.command.options import RunConfig
from lora_jax.command.report import changes, curves, reproduce
from lora_jax.command.report.changes import Change
from lora_jax.command.tasks.base import Task
from lora_jax.command.tasks.registry import task_module
from lora_jax.command.trainer import Run
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import MissingError
from lora_jax.core.fields import table
from lora_jax.training import checkpoint, train

FILE = "report.html"
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_SPEED = "_per_second"
_FEW = 12  # rows of a table that are not folded
_LONG = 600  # characters of a text that are shown

Adapters = Mapping[str, Adapter]
Step = Callable[[Any, Any, Any], Any]


def attempt(one: Run, task: Task, before: Adapters | None, steps: dict[Any, Step], adapters: Adapters | None = None) -> bool:
    """`write`; returns whether that went well. If not, there is a warning, and the run is finished all the same."""
    try:
        write(one, task, before, steps, adapters)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        print(f"lora-jax: {one.directory} is finished, but its report could not be made ({text})", file=sys.stderr)
        return False
    return True


def write(one: Run, task: Task, before: Adapters | None, steps: dict[Any, Step], adapters: Adapters | None = None) -> None:
    """Write the report of a run that has ended, whose checkpoint is written. Every process has to call it.

    Args:
      one: the run.
      task: what was learnt; its base as it was trained on.
      before: the adapters that it began with, if they are at hand.
      steps: what is compiled already, such as `task.measure`, by its function; what else is compiled is added.
      adapters: those that it ended with, if they are at hand; else they are read.
    """
    adapters = adapters or _trained(one.directory, task.variables)
    rows = [] if adapters is None else _changes(task.variables, adapters, one.directory)
    sets = [] if adapters is None or one.fault is not None else [adapters, *([] if before is None else [before])]
    answers = _answers(task, sets, steps)
    diverged = "" if one.fault is None else left(one)
    if processes.is_first():
        page = _environment().get_template("report.html").render(
            **_head(one, task, adapters),
            left=diverged,
            curves=curves,
            charts=curves.charts(one.log.lines, task.metric, task.baseline),
            changes=sorted(rows, key=_largest, reverse=True),
            few=_FEW,
            examples=task.examples,
            answers=[dict(zip(("after", "before"), one)) for one in zip(*answers)],
            **_options(one, adapters or {}),
        )  # fmt: skip
        files.write(one.directory / FILE, page.encode(errors="replace"))


def left(one: Run) -> str:
    """The adapters of a run that has diverged, in words."""
    if one.config.keeps_best and one.best is not None:
        return f"Its adapters are those of step {one.best.step}, the best of all tests"
    with checkpoint.Manager(one.directory / "adapters") as manager:
        step = manager.latest_step()
    return (
        "It has no adapters: none were good" if step is None else f"Its adapters are those of step {step}, the last good ones"
    )


def _trained(directory: pathlib.Path, variables: Any) -> Adapters | None:
    """The adapters that the run ended with, if any were good."""
    try:
        return run.load_trained(directory, variables)
    except MissingError:
        return None


def _changes(variables: Any, adapters: Adapters, directory: pathlib.Path) -> list[Change]:
    """What the adapters change in the base as it was before `init` changed it, if it did."""
    folder = directory / "initial"
    initial = checkpoint.load(folder, variables=variables) if folder.exists() else None
    return changes.changes(variables, adapters, initial)


def _largest(change: Change) -> float:
    return float(np.nan_to_num(change.relative).max())


def _answers(task: Task, sets: Sequence[Adapters], steps: dict[Any, Step]) -> list[Sequence[Any]]:
    """What the model with each of these adapter sets says of the task's examples."""

    def evaluate(adapters: Adapters, fn: Callable[[Any, Any], Any], batch: Any) -> Any:
        if fn not in steps:
            steps[fn] = train.make_eval_step(fn)
        return jax.tree.map(np.asarray, sharding.gather(steps[fn](adapters, task.variables, batch)))

    return [task.examples.answer(functools.partial(evaluate, adapters)) for adapters in sets]


# --- what the page says -----------------------------------------------------------------------------------------------


def _head(one: Run, task: Task, adapters: Adapters | None) -> dict[str, Any]:
    """The name of the run, its results and sizes."""
    config, log = one.config, one.log
    last, step = log.lines[-1]["step"], one.kept_step
    size = None if adapters is None else summary(task.variables, adapters)
    facts = {
        "task": config.task,
        "base model": config.model or str(task_module(config).location(config).name),
        "data": ", ".join(config.sources) or config.data_name,
        "held out": f"{config.eval_data + ': ' if config.eval_data else ''}{task.held_out}",
        "steps": f"{last:,}" + (f" of {config.steps:,}" if last < config.steps else ""),
        "finished": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    return {
        "name": one.directory.name,
        "title": task.title,
        "fault": one.fault,
        "metric": task.metric,
        "before": log.score(0),
        "after": log.score(step),
        "kept": "" if step == last else f"of step {step:,}, the best of all tests",
        "better": _better(log, step, task.metric),
        "baseline": None if task.baseline is None else f"{task.baseline[0]}: {task.metric.text(task.baseline[1])}",
        "details": log.details(0, step),
        "size": size,
        "facts": facts | _measured(log.lines),
        "notes": task.description,
    }


def _better(log: Log, step: int, metric: Metric) -> bool | None:
    """Whether the score is better than at the start; `None` where it is the same or one is not known."""
    scores = [next((line[metric.field] for line in log.lines if line["step"] == at), None) for at in (0, step)]
    if None in scores or scores[0] == scores[1]:
        return None
    return metric.best(scores) == scores[1]


def _measured(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the metrics say of the device, as far as they do."""
    values = lambda name: [line[name] for line in lines if line.get(name) is not None]
    found = {}
    for name in dict.fromkeys(name for line in lines for name in line if name.endswith(_SPEED)):
        if speed := values(name):
            found["speed"] = f"{curves.number(statistics.median(speed))} {name.removesuffix(_SPEED)}/s"
    if use := values("mfu"):
        found["MFU"] = f"{statistics.median(use):.1%}"
    if memory := values("memory_bytes"):
        found["memory"] = size_text(int(max(memory)))
    if skipped := max(values("skipped"), default=0):
        found["skipped steps"] = f"{skipped:,}"
    return found


def _options(one: Run, adapters: Adapters) -> dict[str, Any]:
    """All options, those that are not the defaults first, what was recorded, and how to make the run again."""
    config, pairs = one.config, [path for path, adapter in adapters.items() if isinstance(adapter, LowRank)]
    rows = {name: row for name, row in table(RunConfig).items() if config.task in row.more.get("tasks", (config.task,))}
    said = config_files.said(config)
    groups: dict[str, dict[str, str]] = {"said": {}, "usual": {}, "recorded": {}}
    for name, row in rows.items():
        group = "recorded" if row.more.get("recorded") else "said" if name in said else "usual"
        groups[group][name] = _value(getattr(config, name))
    devices = jax.devices()
    versions = {"Python": platform.python_version(), "lora-jax": lora_jax.__version__}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    return groups | {
        "commands": reproduce.commands(config, one.directory, pairs),
        "planned": "" if one.fault is not None else reproduce.planned(config, one.log.lines[-1]["step"]),
        "versions": versions,
        "devices": f"{len(devices)} x {devices[0].device_kind}, {platform.system()} {platform.machine()}",
    }


def _value(value: Any) -> str:
    """An option's value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {reproduce.text(own)}" for name, own in value.items()) or "-"
    if isinstance(value, list | tuple):
        return " ".join(map(reproduce.text, value)) or "-"
    return "-" if value is None or value == "" else reproduce.text(value)


# --- how it is written ------------------------------------------------------------------------------------------------


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_jax.command.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= {"span": _span, "cut": _cut, "bytes": size_text, "best": _best}
    return made


def _span(values: np.ndarray | None, form: str) -> str:
    """A number, or the range of several."""
    known = [] if values is None else [value for value in values if np.isfinite(value)]
    if not known:
        return "–"
    low, high = format(min(known), form), format(max(known), form)
    return low if low == high else f"{low}–{high}"


def _cut(text: str) -> str:
    """The text, or its beginning."""
    return text if len(text) <= _LONG else f"{text[:_LONG]} …"


def _best(probabilities: Mapping[str, float]) -> str:
    """The most likely label."""
    return max(probabilities, key=lambda label: probabilities[label])

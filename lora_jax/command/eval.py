"""A run measured on a file: what `lora-jax eval` does."""

import argparse
import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.command import arguments, run
from lora_jax.command.options import RunConfig, check_task_has
from lora_jax.command.tasks import exact_match
from lora_jax.command.tasks.base import Evaluation
from lora_jax.command.tasks.registry import task_module
from lora_jax.core.adapter import attach
from lora_jax.core.errors import InputError, MissingError
from lora_jax.core.text_table import text_table
from lora_jax.training import many

Measured = Mapping[str, Any]


def eval_command(line: argparse.Namespace) -> int:
    """`lora-jax eval`; returns the exit code."""
    changes = arguments.given(line, RunConfig)
    data, found = evaluate(line.run, line.file, changes, base=line.base, exact=line.exact_match)
    print(json.dumps({"data": data, **found}, indent=1) if line.json else f"{data}\n{_report(found)}")
    return 0


def evaluate(
    directory: pathlib.Path, file: pathlib.Path, changes: Mapping[str, Any], *, base: bool = False, exact: bool = False
) -> tuple[str, dict[str, Measured]]:
    """What is measured on a file, with the run's options but for some.

    Args:
      directory: the run.
      file: of a form that `finetune` takes for the run's task.
      changes: options of the run in place of its own: columns and `max_length`.
      base: whether the base without the run's adapters is measured, too.
      exact: whether completions are written and compared, too.

    Returns:
      The data in words, and what is measured of the `"run"` and of its `"base"`.

    Raises:
      InputError: there is no such run, it has no checkpoint yet, its base is gone or changed, an option is of another task, the
        file can't be read, or what is measured is not finite.
    """
    config = run.read_config(directory)
    check_task_has(config.task, changes)
    if not file.exists():
        raise MissingError(f"there is no file or folder {file}")
    config = dataclasses.replace(config, **{"date": config.date or datetime.date.today().isoformat(), **changes})
    pairs = exact_match.read(config, file) if exact else []
    task = task_module(config)
    loaded = task.load_base(task.base_directory(config), config, own=run.own_base(directory))
    variables = loaded.model.variables
    adapters = run.load_adapters(directory, variables)
    evaluation: Evaluation = task.evaluation(config, loaded, file)
    measure = jax.jit(evaluation.measure)
    found = {}
    for name, own in {"run": adapters, **({"base": many.neutral(variables, adapters)} if base else {})}.items():
        params = attach(variables, own)
        sums = sum(np.asarray(measure(params, batch), np.float64) for batch in evaluation.batches())
        if not np.isfinite(sums).all():
            raise InputError(f"what the {name} says of {file} is not finite, so there is nothing to measure")
        found[name] = dict(evaluation.report(sums))
        if exact:
            found[name] |= exact_match.measure(config, loaded, params, pairs)
    return evaluation.data, found


def _report(found: Mapping[str, Measured]) -> str:
    """What was measured, as tables."""
    numbers = [name for name, value in found["run"].items() if isinstance(value, float)]
    cells = [(name.replace("_", " "), *(f"{own[name]:.4f}" for own in found.values())) for name in numbers]
    parts = [text_table([("", *found), *cells], "l" + "r" * len(found))]
    for name, own in found.items():
        if "classes" in own:
            parts.append(f"{name}, by label:\n{_classes(own['classes'])}")
            parts.append(f"{name}, what was said by label:\n{_confusion(own)}")
    return "\n\n".join(parts)


def _classes(classes: Mapping[str, Mapping[str, float]]) -> str:
    rows = [(label, *(f"{value:.4f}" for value in parts.values())) for label, parts in classes.items()]
    return text_table([("label", "precision", "recall", "F1"), *rows], "lrrr")


def _confusion(own: Measured) -> str:
    rows = [(label, *(f"{count:.0f}" for count in counts)) for label, counts in zip(own["classes"], own["confusion"])]
    return text_table([("label", *own["classes"]), *rows], "l" + "r" * len(rows))

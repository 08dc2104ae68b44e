"""Command lines made of the tables of options."""

import argparse
import dataclasses
import pathlib
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lora_jax.command.options import TASKS, flag
from lora_jax.core.fields import Option, table


def add_options(
    parser: argparse.ArgumentParser,
    cls: type,
    several: Sequence[str] = (),
    only: Collection[str] | None = None,
    of_run: bool = False,
) -> None:
    """The fields of a table as options of a command; those without a default are its arguments.

    Args:
      parser: of the command.
      cls: the table.
      several: fields that take several values, of which every combination is a run.
      only: the fields that the command has; `None`: all.
      of_run: whether what is left out is as in a run that is there.
    """
    for name, row in table(cls).items():
        if row.more.get("recorded") or (only is not None and name not in only):
            continue
        more = "; several values: a run with each" if name in several else ""
        called = name if row.default is dataclasses.MISSING else flag(name)
        text = row.help + more + (" (default: the run's)" if of_run else _default(row))
        parser.add_argument(called, help=text, default=argparse.SUPPRESS, **_form(row, name in several))


def _form(row: Option, several: bool) -> dict[str, Any]:
    """How a command line reads an option."""
    if row.kind is bool:
        return {"action": argparse.BooleanOptionalAction if row.more.get("both") else "store_true"}
    form: dict[str, Any] = {"type": row.kind if row.kind in (int, float) else str, "metavar": row.more.get("metavar")}
    if several or "parse" in row.more or Sequence in map(typing.get_origin, (row.kind, *typing.get_args(row.kind))):
        form["nargs"] = "+"
    if row.name == "task":  # on which it depends what else there is
        form["choices"] = typing.get_args(row.kind)
    return form


def _default(row: Option) -> str:
    """The default of an option, of each task where they differ."""
    if row.default in (None, (), {}, dataclasses.MISSING) or isinstance(row.default, bool):
        return ""
    usual = row.default if not isinstance(row.default, tuple) else " ".join(row.default)
    others = "".join(f", for {task} {row.more[task]}" for task in TASKS if task in row.more)
    only = f"; {' and '.join(row.more['tasks'])} only" if "tasks" in row.more else ""
    return f" (default: {usual}{others}{only})"


def given(line: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a table that are on the command line."""
    return {name: parsed(row, getattr(line, name)) for name, row in table(cls).items() if hasattr(line, name)}


def parsed(row: Option, value: Any) -> Any:
    """The value of an option, which may be written as a list of words."""
    return row.more["parse"](value) if "parse" in row.more and isinstance(value, list) else value


def absolute(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run; files by their absolute paths."""
    files = {name: _absolute(given[name]) for name in ("data", "eval_data", "adapter") if name in given}
    return {**given, **files, **({"model": model_source(given["model"])} if "model" in given else {})}


def _absolute(files: Any) -> Any:
    """A file's absolute path, or those of several; what is no text is refused as a value of the option."""
    if isinstance(files, list):
        found = list(map(_absolute, files))
        return found[0] if len(found) == 1 else found
    return str(pathlib.Path(files).absolute()) if isinstance(files, str | pathlib.Path) else files


def model_source(text: Any) -> Any:
    """A base model's absolute path, or if it is not there its name on the hub."""
    from lora_jax.huggingface import hub  # which needs JAX

    if not isinstance(text, str):
        return text
    path = pathlib.Path(text)
    return text if not path.exists() and hub.parse(text) else str(path.absolute())

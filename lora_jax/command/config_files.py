"""The options of a run from a file: what `--config` reads and `--print-config` writes."""

import argparse
import pathlib
import tomllib
from collections.abc import Collection, Mapping
from typing import Any

import yaml

from lora_jax.command import arguments
from lora_jax.command.option_names import meant_option
from lora_jax.command.options import DECIDED, DECODERS, RunConfig, defaults
from lora_jax.core import files
from lora_jax.core.errors import InputError
from lora_jax.core.fields import Option, table

# Of these one says what the other does.
_INSTEAD = {"steps": "epochs", "epochs": "steps", "eval_data": "held_out", "held_out": "eval_data"}
_SUFFIXES = (".toml", ".yaml", ".yml", ".json")


def given_run(line: argparse.Namespace) -> dict[str, Any]:
    """The options of a run that a command line and its `--config` say; the command line goes first.

    Raises:
      InputError: the file can't be read, or has an unknown option.
    """
    listed = {} if line.config is None else read(line.config)
    own = arguments.given(line, RunConfig)
    listed = {name: value for name, value in listed.items() if _INSTEAD.get(name) not in own}
    return arguments.absolute(listed | own)


def read(file: pathlib.Path) -> dict[str, Any]:
    """The options in a TOML, YAML or JSON file, or those with which a run was made, given its `config.json`.

    Raises:
      MissingError: there is no such file.
      InputError: it can't be read, or has an unknown option; the message names the nearest.
    """
    with files.reading(file):
        text = file.read_text(encoding="utf-8")
    found = _parse(file, text)
    if "format_version" in found:
        return again(RunConfig.from_json(text, file))
    rows = {name: row for name, row in table(RunConfig).items() if "recorded" not in row.more}
    options = {name.replace("-", "_"): value for name, value in found.items()}
    for name in options.keys() - rows.keys():
        raise InputError(f"{file}: there is no option {name}{meant_option(name, rows)}")
    given = {name: value for name, value in options.items() if value is not None or rows[name].default is not None}
    return {name: arguments.parsed(rows[name], _number(rows[name], value)) for name, value in given.items()}


def _number(row: Option, value: Any) -> Any:
    """The value; of what should be a number and is a text, the number: to YAML 1e-4 is a text."""
    if not isinstance(value, str) or row.kind not in (int, float):
        return value
    try:
        return row.kind(value)
    except ValueError:
        return value


def said(config: RunConfig) -> dict[str, Any]:
    """The options of a run that are not the defaults of its task."""
    usual = RunConfig(**{"task": config.task, **defaults(config.task)})
    values = {name: getattr(config, name) for name, row in table(RunConfig).items() if "recorded" not in row.more}
    return {name: value for name, value in values.items() if name == "task" or value != getattr(usual, name)}


def again(config: RunConfig) -> dict[str, Any]:
    """The options that make a run again on any device: those that a device may have decided are among them."""
    decided = {name: getattr(config, name) for name in DECIDED} if config.task in DECODERS else {}
    return said(config) | {name: value for name, value in decided.items() if value is not None}


def text(config: RunConfig, given: Collection[str]) -> str:
    """All options of a run as YAML, for `read`; without those that the device decides, unless they are given."""
    rows = table(RunConfig)
    own = [
        name for name, row in rows.items() if "recorded" not in row.more and config.task in row.more.get("tasks", config.task)
    ]
    without = {"steps"} if config.epochs is not None else set()
    without |= {"held_out"} if config.eval_data is not None else set()
    without |= set(DECIDED).difference(given) if config.task in DECODERS else set()
    values = {name: getattr(config, name) for name in own if name not in without}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items() if value is not None}
    return yaml.safe_dump(plain, sort_keys=False, width=120)


def _parse(file: pathlib.Path, text: str) -> Mapping[str, Any]:
    if file.suffix not in _SUFFIXES:
        raise InputError(f"{file}: options are read from {', '.join(_SUFFIXES)} files")
    if file.suffix == ".json":
        found = files.parse_json(text, file)
    else:
        found = _load(file, text)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise InputError(f"{file} must hold options by their names")
    return found


def _load(file: pathlib.Path, text: str) -> Any:
    try:
        return tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{file} can't be read: {error}") from None

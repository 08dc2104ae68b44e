"""The command that makes a run again."""

import pathlib
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.command import config_files
from lora_jax.command.options import RunConfig, flag
from lora_jax.core.fields import table


def commands(config: RunConfig, directory: pathlib.Path, pairs: Collection[str] = ()) -> list[str]:
    """The command lines, one for each time that the run was trained, quoted for a shell.

    What the device decides where the command line leaves it open is said, too, since another device may decide otherwise.
    Targets and rank are not, where they are those of `--adapter`.

    Args:
      config: the run's options.
      directory: the run.
      pairs: the parameters with a pair.

    >>> commands(RunConfig(rank=4, text_field="the text"), pathlib.Path("runs/1"))
    ["lora-jax finetune --task classify --text-field 'the text' --rank 4"]
    """
    first, *later = config.phases
    given = config_files.again(config) | ({"steps": first} if later else {})
    if config.adapter is not None and set(config.targets) == set(pairs):
        given = {name: value for name, value in given.items() if name not in ("targets", "rank")}
    words = [word for name in table(RunConfig) if name in given for word in _words(name, given[name])]
    again = f"{directory.absolute()}-again"
    lines = [words + (["--out", again] if later else []), *(["--resume", again, "--steps", str(steps)] for steps in later)]
    return [shlex.join(["lora-jax", "finetune", *line]) for line in lines]


def planned(config: RunConfig, last: int) -> str:
    """Where the steps that were planned are others than those that the run has, in words.

    Args:
      config: the run's options.
      last: the step at which it ended.

    >>> planned(RunConfig(steps=100, patience=2), 60)
    'The run was stopped by its patience at step 60; the command plans all of its 100 steps, and stops likewise.'
    """
    said = []
    if config.finished and config.patience is not None:
        ends = ", ".join(f"{step:,}" for step in config.finished)
        said.append(
            f"The run was trained further at step {ends}: where its patience had stopped it there, more steps were planned at "
            "first, over which the learning rate followed its schedule; the commands plan those that it has."
        )
    if last < config.steps:
        said.append(
            f"The run was stopped by its patience at step {last:,}; the command plans all of its {config.steps:,} steps, and "
            "stops likewise."
        )
    return " ".join(said)


def _words(name: str, value: Any) -> list[str]:
    """An option as a command line has it."""
    if isinstance(value, bool):
        return [flag(name) if value else f"--no-{flag(name)[2:]}"]
    if isinstance(value, Mapping):
        return [flag(name), *(f"{pattern}={text(own)}" for pattern, own in value.items())]
    if isinstance(value, list | tuple):
        return [flag(name), *map(text, value)]
    return [f"{flag(name)}={text(value)}"] if text(value).startswith("-") else [flag(name), text(value)]


def text(value: Any) -> str:
    """A value as it is written; whole numbers as such.

    >>> text(16.0), text(0.1), text("a b")
    ('16', '0.1', 'a b')
    """
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)

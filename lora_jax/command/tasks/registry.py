"""The tasks by name: what a run is prepared with, and the base model of a run."""

import importlib
from types import ModuleType

from jax.sharding import Mesh

from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import places
from lora_jax.command.tasks.base import Session
from lora_jax.core.errors import InputError

_COMMANDS = {"classify": "predict", "lm": "generate", "dpo": "generate", "images": "predict --image"}


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything that a run needs and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    places.check_there(config, "data")
    places.check_there(config, "eval_data")
    return task_module(config).prepare(config, mesh)


def task_module(config: RunConfig) -> ModuleType:
    """The module of the run's task: `base_directory`, `location`, `load_base` and `names` are there for each."""
    return importlib.import_module(f"lora_jax.command.tasks.{config.task}")


def check_task(config: RunConfig, *tasks: str, command: str | None = None) -> None:
    """Raise an InputError unless the run is of one of these tasks; `command` is the user's, if not the usual one for them."""
    if config.task not in tasks:
        known, used = _COMMANDS[config.task], command or _COMMANDS[tasks[0]]
        raise InputError(f"the run is of the task {config.task!r}: use `lora-jax {known}` with it, not `{used}`")

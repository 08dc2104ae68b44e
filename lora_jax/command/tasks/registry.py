"""The tasks by name: what a run is prepared with, and the base model of a run."""

import importlib
from types import ModuleType

from jax.sharding import Mesh

from lora_jax.command.options import RunConfig
from lora_jax.command.tasks.base import Session
from lora_jax.core.errors import InputError

_COMMANDS = {"classify": "predict", "lm": "generate", "images": "predict --image"}


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything that a run needs and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    return task_module(config).prepare(config, mesh)


def task_module(config: RunConfig) -> ModuleType:
    """The module of the run's task: `base_directory`, `location`, `load_base` and `with_own` are there for each."""
    return importlib.import_module(f"lora_jax.command.tasks.{config.task}")


def check_task(config: RunConfig, task: str) -> None:
    """Raise an InputError unless the run is of this task."""
    if config.task != task:
        known = _COMMANDS[config.task]
        raise InputError(f"the run is of the task {config.task!r}: use `lora-jax {known}` with it, not `{_COMMANDS[task]}`")

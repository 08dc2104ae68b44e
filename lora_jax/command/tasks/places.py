"""Where the base model and the data of a run are: on this machine, or the model on the hub."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

from lora_jax.command.options import RunConfig
from lora_jax.core.errors import MissingError
from lora_jax.huggingface import hub


def hub_name(config: RunConfig) -> hub.HubName | None:
    """The name of the run's base model on the hub, with the commit that the run was made with; `None` if it is not from there.

    In a new run a directory of that name goes first; later it is what the run began with.
    """
    name = None if config.model is None else hub.parse(config.model)
    local = config.model is not None and (config.model_sha256 != "" or pathlib.Path(config.model).exists())
    if name is None or (local and not config.model_commit):
        return None
    return dataclasses.replace(name, revision=config.model_commit or name.revision)


def commit(config: RunConfig, directory: pathlib.Path) -> str:
    """The commit of the run's base model, which is in this directory; empty if it is not from the hub."""
    return "" if hub_name(config) is None else directory.name


def with_base(config: RunConfig, directory: pathlib.Path, sha256: str) -> RunConfig:
    """The options tied to the base model in this directory, whose weights have this digest."""
    return dataclasses.replace(config, model_sha256=sha256, model_commit=commit(config, directory))


def location(config: RunConfig, pinned: pathlib.Path) -> pathlib.Path:
    """Where the run's base model is, or where one would look for it once it is fetched; `pinned` if the run names none."""
    name = hub_name(config)
    if name is not None:
        return hub.cached(name) or pathlib.Path(str(name))
    return pinned if config.model is None else pathlib.Path(config.model)


def find(config: RunConfig, pinned: Callable[[], pathlib.Path]) -> pathlib.Path:
    """Where the run's base model is, fetched if it is on the hub; what `pinned` fetches if the run names none.

    Raises:
      InputError: it could not be fetched, or is no longer where the run found it.
    """
    check_there(config, "model")
    name = hub_name(config)
    if name is not None:
        return hub.fetch(name)
    return pinned() if config.model is None else hub.find(config.model)


def check_there(config: RunConfig, what: Literal["model", "data", "eval_data"]) -> None:
    """Raise a MissingError if the model or the data that a run was made with is no longer where it was."""
    begun = config.model_sha256 if what == "model" else config.data_sha256
    places = config.sources if what == "data" else (getattr(config, what),)
    if what == "model" and hub_name(config) is not None:
        return
    for place in places:
        if place is not None and begun and not pathlib.Path(place).exists():
            raise MissingError(
                f"there is no directory or file {place}, the run's {what}: if it has moved, write its new place into {what!r} "
                "of the run's config.json (whether it is the same is checked)"
            )

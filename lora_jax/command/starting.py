"""Runs that begin with adapters that are there already: a PEFT directory's, or another run's."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import peft, sharding
from lora_jax.command import adapter_files, run
from lora_jax.command.options import DECODERS, RunConfig, flag
from lora_jax.command.tasks.base import Session
from lora_jax.command.tasks.registry import task_module
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import InputError, MissingError

_OF_NEW_PAIRS = ("rank", "alpha", "method", "scaling", "dora", "init", "dropout")
_OF_NEW_PAIRS += ("exclude", "layers", "rank_pattern", "alpha_pattern")


def check(given: Mapping[str, Any]) -> None:
    """Raise an InputError for options of new pairs where there will be none."""
    idle = [flag(name) for name in _OF_NEW_PAIRS if name in given]
    if "adapter" in given and "targets" not in given and idle:
        raise InputError(
            f"{', '.join(idle)} is for new pairs, and --adapter brings its own: leave it out, or name what else to adapt with "
            "--targets"
        )


def with_adapter(session: Session) -> Session:
    """The session of a run that begins with the adapters that its configuration names; any other as it is.

    What they adapt is trained further, as it is: with their ranks, scales and dropout. Other targets get new pairs, if the run
    has targets of its own, and so does a head that they lack.

    Raises:
      InputError: there are no such adapters, or they do not fit the run's base.
    """
    config = session.config
    if config.adapter is None:
        return session
    source = pathlib.Path(config.adapter)
    found = _read(source, session)
    if not config.targets:
        ranks = {path: adapter.rank for path, adapter in found.items() if isinstance(adapter, LowRank)}
        config = dataclasses.replace(config, targets=list(ranks), rank=min(ranks.values(), default=config.rank))
    new = [path for path in session.init(config) if path not in found]
    line = f"{len(found)} adapters of {config.adapter} are trained further, and {len(new)} begin anew"
    lines = (*session.task.description, line, *_unused(source, config))
    task = dataclasses.replace(session.task, description=lines)
    return dataclasses.replace(session, config=config, task=task, init=lambda own: session.init(own) | found)


def _read(source: pathlib.Path, session: Session) -> dict[str, Adapter]:
    """The adapters in float32, where the base is."""
    variables = session.task.variables
    if (source / "adapter_config.json").is_file():
        found = peft.load(source, variables, names=session.names)
        return sharding.put_beside(variables, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found))
    if not (source / "adapters").is_dir():
        raise MissingError(f"{source} is neither a PEFT directory (it has no adapter_config.json) nor a run with a checkpoint")
    theirs = run.read_config(source)
    check_run(theirs, source, session.config)
    if theirs.untie and not session.config.untie:
        raise InputError(f"the adapters of {source} are for a head with a kernel of its own: give --untie, too")
    if theirs.scan_layers == session.config.scan_layers:
        found = run.load_adapters(source, variables)
    else:
        found = sharding.put_beside(variables, _stacked_otherwise(run.load_adapters(source), theirs, session))
    shared = [path for path in found if session.names[path].kind == "embedding"]
    if shared and session.config.untie and not theirs.untie:
        raise InputError(f"the adapters of {source} change {shared[0]} as the embedding and the head: leave --untie out")
    return found


def _stacked_otherwise(adapters: Mapping[str, Adapter], theirs: RunConfig, session: Session) -> dict[str, Adapter]:
    """Adapters of layers one by one as those of stacked ones, or the other way round: as PEFT has them, in between."""
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory) / "peft"
        peft.save(place, adapters, names=task_module(theirs).names(theirs))
        found = peft.load(place, session.task.variables, names=session.names)
    frozen = {path: dataclasses.replace(a, frozen=("a",)) for path, a in found.items() if isinstance(a, LowRank)}
    return found | frozen if theirs.method == "lora_fa" else found  # which PEFT does not know


def _unused(source: pathlib.Path, config: RunConfig) -> tuple[str, ...]:
    """What to say of a tokenizer or chat template in a PEFT directory."""
    names = adapter_files.own_files(source, task_module(config).location(config))
    if not names:
        return ()
    return (
        f"the adapters have their own {', '.join(names)}, but the base's tokenizer and chat template are used: for theirs, "
        "import the directory, export that run with --format merged, and fine-tune the result",
    )


def check_run(theirs: RunConfig, source: pathlib.Path, config: RunConfig) -> None:
    """Raise an InputError unless the other run's adapters mean the same here."""
    if theirs.model_sha256 != config.model_sha256:
        raise InputError(f"the adapters of {source} were trained on another base: {theirs.model or 'the default model'}")
    same = theirs.task == config.task or {theirs.task, config.task} <= set(DECODERS)
    if not same or list(theirs.labels) != list(config.labels):
        known, wanted = (f"the task {one.task!r} and the labels {list(one.labels)}" for one in (theirs, config))
        raise InputError(f"the adapters of {source} are for {known}, not for {wanted}")
    if run.own_base(source) is not None:
        raise InputError(
            f"the adapters of {source} have a tokenizer of their own ({source / 'base'}): export the run with "
            "--format merged, and go on with that"
        )

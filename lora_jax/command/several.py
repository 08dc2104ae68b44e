"""Several runs on one base."""

import pathlib
from collections.abc import Sequence

from lora_jax.command import run
from lora_jax.command.options import DECODERS, RunConfig
from lora_jax.command.starting import check_run
from lora_jax.command.tasks import lm
from lora_jax.command.tasks.registry import check_task
from lora_jax.core.errors import InputError


def read(directories: Sequence[pathlib.Path]) -> list[RunConfig]:
    """The configurations of runs whose adapters mean the same on the base of the first.

    Raises:
      InputError: there is no such run, or one does not go with the first.
    """
    configs = [run.read_config(directory) for directory in directories]
    if len(configs) > 1:
        for config, directory in zip(configs, directories):
            check_run(config, directory, configs[0])
            if (config.untie, config.scan_layers) != (configs[0].untie, configs[0].scan_layers):
                raise InputError(
                    f"the base of {directory} is held in another way than that of {directories[0]} (untie or scan_layers), so "
                    "that its adapters belong to other arrays: export it with --format peft, and import that"
                )
    return configs


def with_decoder(directories: Sequence[pathlib.Path], command: str) -> tuple[lm.Base, tuple[int, ...]]:
    """The base of runs with a decoder, and the ids that end a text of any of them; `command` is the user's.

    Raises:
      InputError: there is no such run, one is of another task or does not go with the first, or the base is gone or changed.
    """
    configs = read(directories)
    for config in configs:
        check_task(config, *DECODERS, command=command)
    base = lm.load_base(lm.base_directory(configs[0]), configs[0], own=run.own_base(directories[0]))
    return base, tuple(sorted({end for config in configs for end in lm.end_ids(base, config)}))

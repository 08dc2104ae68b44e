"""Run directories of `lora-jax finetune`.

    RUN/config.json     the options, and digests of the data and of the base model
    RUN/adapters/       checkpoints of the adapters and of the training state
    RUN/best/           the adapters of the best test, where the run keeps them
    RUN/initial/        the adapters at step 0, where the base was changed to make up for them (PiSSA and the like)
    RUN/base/           of an imported run, what its adapters brought in place of the base's: the files of a tokenizer, and
                        the embeddings of another vocabulary
    RUN/metrics.jsonl   a line per step: `step`, `loss` (null at step 0 and where it is not finite), `test_accuracy`,
                        `perplexity` or `reward_accuracy` (null at steps without a test), `learning_rate`, `grad_norm` before
                        clipping, `balance_loss` of a mixture of experts, `skipped` (steps so far), `examples_per_second`,
                        `tokens_per_second` or `pairs_per_second`, and where they are known `memory_bytes` and `mfu`
    RUN/tensorboard/    event files, with `--track tensorboard`
    RUN/wandb/          files of Weights & Biases, with `--track wandb`
    RUN/curve.png       loss and test accuracy or perplexity by step
    RUN/report.html     options, results, curves, adapters and examples, written last of all once the run has ended

An imported run, and one made of others, has no metrics, picture and report.

A run is there once its `config.json` is. Each file is replaced in one go, and the metrics grow by whole lines.
"""

import itertools
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax.adapters import initializers
from lora_jax.command.options import FIELDS, RunConfig
from lora_jax.core import files
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError, MissingError, OccupiedError
from lora_jax.training import checkpoint

EMBEDDINGS = "embeddings.safetensors"

# The options that say what the base is, how it is used and what goes into it; all others are of training.
_OF_USE = ("task", "model", "dtype", "untie", "quantize", "block", "scan_layers", "attention_block", "labels", "max_length")
_OF_USE += (*FIELDS, "columns")
_OF_USE += ("loss", "beta", "label_smoothing", "seed", "model_sha256", "model_commit", "date", "ends")


def own_base(directory: pathlib.Path) -> pathlib.Path | None:
    """What a run has in place of the base's own tokenizer and embeddings, if it has any."""
    own = directory / "base"
    return own if own.is_dir() else None


def own_embeddings(own: pathlib.Path) -> dict[str, np.ndarray]:
    """The embedding and the head in there, by their Hugging Face names, if there are any.

    Raises:
      InputError: the file is damaged.
    """
    file = own / EMBEDDINGS
    try:
        return safetensors.numpy.load_file(file) if file.is_file() else {}
    except safetensors.SafetensorError as error:
        raise InputError(f"{file} can't be read: {error}") from None


def check_free(directory: pathlib.Path) -> None:
    """Raise an OccupiedError unless a new run can be made in this directory."""
    config = directory / "config.json"
    with files.writing(directory):
        holds_run = config.is_file() and "format_version" in config.read_text(encoding="utf-8", errors="replace")
        entries = list(directory.iterdir()) if directory.is_dir() else []
        # A crash before `config.json` was in place can leave its hidden forerunner.
        occupied = any(not entry.name.startswith(".") for entry in entries) or (directory.exists() and not directory.is_dir())
    if holds_run:
        raise OccupiedError(f"{directory} holds a run already: continue it with --resume, or choose another --out")
    if occupied:
        raise OccupiedError(f"{directory} is not an empty directory: choose another --out")


def free_directory(parent: pathlib.Path) -> pathlib.Path:
    """The first of `parent/1`, `parent/2`, ... that does not exist."""
    return next(parent / str(i) for i in itertools.count(1) if not (parent / str(i)).exists())


def create(directory: pathlib.Path, config: RunConfig) -> None:
    """Make a run directory.

    Raises:
      OccupiedError: it holds a run or other files already.
    """
    check_free(directory)
    with files.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    files.write(directory / "config.json", config.to_json().encode())


def read_config(directory: pathlib.Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      MissingError: there is no run.
      InputError: the run is of another format version, or its `config.json` is damaged.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise MissingError(f"there is no run in {directory}: it has no config.json")
    with files.reading(file):
        text = file.read_text(encoding="utf-8")
    return RunConfig.from_json(text, file)


def load_adapters(directory: pathlib.Path, variables: Any = None) -> dict[str, Adapter]:
    """The adapters that a run ended with, or its newest, for its base; those trained on a changed one are converted.

    Raises:
      InputError: the run has no complete checkpoint, or it does not fit the base.
    """
    adapters = load_trained(directory, variables)
    initial = directory / "initial"
    return initializers.convert(adapters, checkpoint.load(initial)) if initial.exists() else adapters


def load_trained(directory: pathlib.Path, variables: Any = None) -> dict[str, Adapter]:
    """The same as they were trained, on the base that was changed.

    Raises:
      InputError: as `load_adapters`.
    """
    return checkpoint.load(_trained(directory), variables=variables)


def trained_step(directory: pathlib.Path) -> int | None:
    """The step of these adapters."""
    return checkpoint.Manager(_trained(directory)).latest_step()


def _trained(directory: pathlib.Path) -> pathlib.Path:
    best = directory / "best"
    return directory / "adapters" if checkpoint.Manager(best).latest_step() is None else best


def derive(
    directory: pathlib.Path,
    config: RunConfig,
    adapters: Mapping[str, Adapter],
    made: Mapping[str, Any],
    own: pathlib.Path | None = None,
) -> None:
    """Make a run of adapters that come from other runs.

    Args:
      directory: of the run.
      config: of one of the others, for the base and how it is used.
      adapters: for the run's base.
      made: how they were made.
      own: what the run has in place of the base's own tokenizer and embeddings.

    Raises:
      OccupiedError: there are files in the directory.
    """
    kept = {name: getattr(config, name) for name in _OF_USE}
    with files.fresh_directory(directory) as fresh:
        create(fresh, RunConfig(**kept, made=made))
        if own is not None:
            shutil.copytree(own, fresh / own.name)
        checkpoint.save(fresh / "adapters", adapters, step=0)

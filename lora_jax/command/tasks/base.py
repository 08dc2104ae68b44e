"""What training asks of a task: a loss, a measure on held-out texts, and batches of both."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.command.metrics import Metric
from lora_jax.command.options import RunConfig
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.core.weighted import Weighted
from lora_jax.data import fetch
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.names import HFName


def digest(source: pathlib.Path) -> str:
    """The SHA-256 of a file or of a directory's `model.safetensors`; of several files, that of their names and digests."""
    single = source if source.is_file() else source / "model.safetensors"
    if single.is_file():
        return fetch.sha256(single)
    lines = [f"{fetch.sha256(source / name)} {name}\n" for name in sorted(checkpoint_files.weight_names(source))]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_data(config: RunConfig, found: str) -> None:
    """Raise an InputError unless the data has the digest that the run was made with; a new run has none yet."""
    if config.data_sha256 not in ("", found):
        raise InputError(f"{config.data} has changed since the run began, so the run can't go on: start a new one")


def check_tokens(config: RunConfig, arrays: Iterable[np.ndarray]) -> RunConfig:
    """The options with the digest of what is learnt from, token by token.

    Raises:
      InputError: the run was made with other tokens.
    """
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    if config.tokens_sha256 not in ("", digest.hexdigest()):
        raise InputError(
            "the same texts have other tokens than when the run began: the tokenizer or the chat template of its model has "
            "changed, so the run can't go on; put it back, or start a new one"
        )
    return dataclasses.replace(config, tokens_sha256=digest.hexdigest())


def check_weights(config: RunConfig, source: pathlib.Path, found: str) -> None:
    """Raise an InputError unless the base has the digest that the run was made with; a new run has none yet."""
    if config.model_sha256 not in ("", found):
        raise InputError(f"{source} is not the model that the run was trained on: its weights have changed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A base model, what is learnt and how it is measured.

    Args:
      variables: the base's parameters.
      loss: `(params, batch, key) -> loss`, with the attached parameters; a scalar or a `Weighted`.
      train_batches: makes the endless iterator over the training batches of a seed, whose `get_state()` is JSON-able.
      measure: `(params, batch) -> numbers`, which are summed over the held-out batches.
      test_batches: makes the held-out batches, all of one size.
      test_count: how many these are.
      score: the score, from the sums.
      metric: what the score is.
      per_step: how many `unit`s a training step takes.
      unit: `"examples"` or `"tokens"`.
      description: lines to print before training.
      held_out: the held-out data in words, for the summary.
      title: of the picture.
      accumulate: into how many parts a training step cuts its batch, one after the other.
      baseline: the name and score of what the score compares with.
    """

    variables: Any
    loss: Callable[[Any, Any, jax.Array], jax.Array | Weighted]
    train_batches: Callable[[int], Any]
    measure: Callable[[Any, Any], Any]
    test_batches: Callable[[], Iterable[Any]]
    test_count: int
    score: Callable[[Any], float]
    metric: Metric
    per_step: int
    unit: str
    description: tuple[str, ...]
    held_out: str
    title: str
    accumulate: int = 1
    baseline: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Session:
    """All that a run needs, checked and in memory.

    Args:
      config: its options.
      task: what is learnt.
      init: the adapters that a run begins with, by its options, of which base and data are those of `config`.
      names: what Hugging Face calls the base's parameters.
    """

    config: RunConfig
    task: Task
    init: Callable[[RunConfig], dict[str, Adapter]]
    names: Mapping[str, HFName]

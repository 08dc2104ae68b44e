"""What training asks of a task: a loss, a measure on held-out texts, and batches of both."""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

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


def check_data(config: RunConfig, *digests: str) -> RunConfig:
    """The options with the digest of the data, and of what is held out apart from it.

    Raises:
      InputError: the run was made with other data.
    """
    found = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
    if config.data_sha256 not in ("", found):
        files = " or ".join(file for file in (*config.sources, config.eval_data) if file is not None)
        raise InputError(f"{files} has changed since the run began, so the run can't go on: start a new one")
    return dataclasses.replace(config, data_sha256=found)


def with_steps(config: RunConfig, examples: int) -> RunConfig:
    """The options with as many steps as their epochs take, of so many examples each; as they are without epochs."""
    if config.epochs is None:
        return config
    return dataclasses.replace(config, steps=math.ceil(config.epochs * examples / config.batch_size), epochs=None)


def weights_in_words(config: RunConfig) -> tuple[str, ...]:
    """How often an epoch draws from each source of the data, in words."""
    each = (f"{pathlib.Path(source).name} {weight:g} times" for source, weight in zip(config.sources, config.weights))
    return (f"an epoch draws each example of {', of '.join(each)}",) if config.weights else ()


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


Evaluate = Callable[[Callable[[Any, Any], Any], Any], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """A few held-out examples, for the report of a run.

    Args:
      kind: what is said of each: `"labels"`, the probability of every label by its name; `"texts"`, how the prompt goes on;
        `"margins"`, the reward of the chosen answer over that of the rejected one.
      shown: what there is to see of each, by name.
      answer: what a model says of each, from `(fn, batch) -> fn(params, batch)` with its parameters, compiled once for each
        `fn`, and as NumPy arrays. Every process has to call it.
    """

    kind: Literal["labels", "texts", "margins"]
    shown: Sequence[Mapping[str, str]]
    answer: Callable[[Evaluate], Sequence[Any]]


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
      details: what else to say of the sums, by its name in `metrics.jsonl`.
      per_step: how many `unit`s a training step takes.
      unit: `"examples"`, `"tokens"` or `"pairs"`.
      description: lines to print before training.
      held_out: the held-out data in words, for the summary.
      title: of the picture.
      examples: what the report shows of the held-out data.
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
    examples: Examples
    details: Callable[[Any], Mapping[str, float]] = lambda sums: {}
    baseline: tuple[str, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How the adapters of a run are measured on a file.

    Args:
      measure: as of a `Task`.
      batches: makes all of the file, in batches of one size.
      report: what the sums say, by its names.
      data: the file in words.
    """

    measure: Callable[[Any, Any], Any]
    batches: Callable[[], Iterable[Any]]
    report: Callable[[Any], Mapping[str, Any]]
    data: str


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

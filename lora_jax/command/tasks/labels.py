"""What the tasks that choose a label share."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import places
from lora_jax.command.tasks.base import Evaluate, Examples, check_data
from lora_jax.core.errors import InputError


def order(labels: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The labels in the order of the checkpoint's head where it knows them, else as they are."""
    return tuple(known) if sorted(known) == sorted(labels) else tuple(labels)


def check_of_run(config: RunConfig, file: pathlib.Path, found: Sequence[str]) -> None:
    """Raise an InputError where a file has labels that the run has not learnt."""
    if odd := sorted(set(found) - set(config.labels)):
        raise InputError(f"{file} has the labels {', '.join(odd)}; those of the run are {', '.join(config.labels)}")


def of_data(config: RunConfig, data: Any, held_out: Any) -> RunConfig:
    """The options tied to the data and, if there is any, to what is held out apart from it, with the labels.

    Raises:
      InputError: the run was made with other data, it has one label only, or what is held out has labels that the data lacks.
    """
    config = check_data(config, *(part.digest() for part in (data, held_out) if part is not None))
    known = data.classes()
    if len(known) < 2:
        raise InputError(f"{config.data_name} has the label {known[0]!r} alone; a classifier needs two classes or more")
    if odd := sorted(set(() if held_out is None else held_out.classes()) - set(known)):
        raise InputError(f"{config.eval_data} has the labels {', '.join(odd)}, which {config.data_name} lacks")
    return dataclasses.replace(config, labels=config.labels or known)


def of_base(config: RunConfig, source: pathlib.Path, base: Any) -> RunConfig:
    """The options tied to the base, with the labels in the order of its head."""
    config = places.with_base(config, source, base.sha256)
    return dataclasses.replace(config, labels=order(config.labels, base.model.labels))


def loading(config: RunConfig, mesh: Mesh | None, shardings: Callable[[Mesh, Any], Any]) -> dict[str, Any]:
    """How a loader reads the run's base, with a head for its labels."""
    return {
        "num_labels": len(config.labels) or None,
        "seed": config.seed,
        "sharding": None if mesh is None else sharding.by_path(functools.partial(shardings, mesh)),
        "scan_layers": config.scan_layers,
        "remat": None if config.remat == "none" else config.remat,
        "quantize": config.quantize,
        "block": config.block,
    }


def baseline(labels: np.ndarray) -> tuple[str, float]:
    """The accuracy of always saying the most frequent class."""
    counts = np.unique(labels, return_counts=True)[1]
    return "most frequent class", float(counts.max() / counts.sum())


def cross_entropy(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The mean over a batch."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def confusion(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """How often each class, a row, was said to be each, a column; NaN where a logit is not finite, of which `argmax` would
    make a label."""
    true, said = (jax.nn.one_hot(labels, logits.shape[-1]) for labels in (batch["labels"], logits.argmax(-1)))
    return jnp.where(jnp.isfinite(logits).all(), true.T @ said, jnp.nan)  # a row of padding has no label, and so no one


def accuracy(counts: np.ndarray) -> float:
    """The share of right labels, from what `confusion` counts."""
    return float(np.trace(counts) / counts.sum())


def few(labels: Sequence[int] | np.ndarray, count: int = 6) -> np.ndarray:
    """The rows of a few examples: the first of each class, then the second of each, and so on.

    >>> few([0, 0, 0, 1, 2], 4).tolist()
    [0, 3, 4, 1]
    """
    labels = np.asarray(labels)
    nth = np.zeros(len(labels), int)
    for label in np.unique(labels):
        nth[labels == label] = np.arange((labels == label).sum())
    return np.lexsort((labels, nth))[:count]


def examples(
    labels: Sequence[str],
    shown: Sequence[Mapping[str, str]],
    logits: Callable[[Any, Any], jax.Array],
    batch: Callable[[], Mapping[str, Any]],
) -> Examples:
    """The examples of a report, with the probability of each label.

    Args:
      labels: the classes, in the order of the logits.
      shown: what there is to see of each.
      logits: `(params, batch) -> (rows, labels)`.
      batch: makes the batch whose first rows they are.
    """

    def probabilities(params: Any, batch: Any) -> jax.Array:
        return jax.nn.softmax(logits(params, batch))

    def answer(evaluate: Evaluate) -> list[dict[str, float]]:
        return [dict(zip(labels, map(float, row))) for row, _ in zip(evaluate(probabilities, batch()), shown)]

    return Examples(kind="labels", shown=shown, answer=answer)


def report(labels: Sequence[str], counts: np.ndarray) -> dict[str, Any]:
    """Accuracy, precision, recall and F1 of each class (0 where nothing is of it, or said to be), and the confusion matrix."""
    right, said, true = np.diag(counts), counts.sum(0), counts.sum(1)
    parts = {"precision": right / np.maximum(said, 1), "recall": right / np.maximum(true, 1)}
    parts["f1"] = 2 * right / np.maximum(said + true, 1)
    classes = {label: {name: float(part[i]) for name, part in parts.items()} for i, label in enumerate(labels)}
    return {"accuracy": accuracy(counts), "classes": classes, "confusion": counts.tolist()}

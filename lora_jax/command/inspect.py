"""Using and examining a finished run: what `lora-jax predict` and `lora-jax inspect` do."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import algebra, initializers, merging
from lora_jax.command import run
from lora_jax.command.tasks import classify
from lora_jax.command.tasks.registry import check_task, task_module
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Adapter, Layout, LowRank, attach
from lora_jax.core.errors import InputError
from lora_jax.core.text_table import text_table
from lora_jax.core.transform import lora
from lora_jax.data import labelled
from lora_jax.training import checkpoint


def predict_command(line: argparse.Namespace) -> int:
    """`lora-jax predict`; returns the exit code."""
    for text, found in zip(line.text, predict(line.run, line.text)):
        best = max(found, key=lambda label: found[label])
        print(f"{best}\t{found[best]:.3f}\t{text}")
    return 0


def inspect_command(line: argparse.Namespace) -> int:
    """`lora-jax inspect`; returns the exit code."""
    titles = ("parameter", "shape", "rank", "scale", "|dW|/|W|", "effective rank")
    print(text_table([titles, *map(_cells, inspect(line.run))], "lrrrrr"))
    return 0


def load_adapters(directory: pathlib.Path, variables: Any = None) -> dict[str, Adapter]:
    """The newest adapters of a run, for its base; those trained on a changed one are converted.

    Raises:
      InputError: the run has no complete checkpoint, or it does not fit the base.
    """
    adapters = checkpoint.load(directory / "adapters", variables=variables)
    initial = directory / "initial"
    return initializers.convert(adapters, checkpoint.load(initial)) if initial.exists() else adapters


def predict(directory: pathlib.Path, texts: Sequence[str]) -> list[dict[str, float]]:
    """The probability of each label for each text, by the base model with the run's adapters.

    Raises:
      InputError: there is no such run, it has no checkpoint yet, its base model is gone or changed, or a text is empty.
    """
    if not all(text.strip() for text in texts):
        raise InputError("a text is empty: there is nothing to classify")
    config = run.read_config(directory)
    check_task(config, "classify")
    base = classify.load_base(classify.base_directory(config), config, own=run.own_base(directory))
    model, adapters = base.model, load_adapters(directory, base.model.variables)
    unknown = labelled.Texts(tuple(texts), ("",) * len(texts))
    examples = labelled.encode(base.tokenizer, unknown, ("",), config.max_length)
    for note in classify.cut_texts(examples.cut, config.max_length):
        print(f"lora-jax: note: {note}", file=sys.stderr)
    batch = labelled.pad(examples, np.arange(len(texts)), labelled.pad_lengths(examples.lengths), len(texts))
    params = attach(model.variables, adapters)
    logits = jax.jit(lora(model.apply))(params, batch["input_ids"], batch["attention_mask"])
    return [dict(zip(config.labels, map(float, row))) for row in jax.nn.softmax(logits)]


@dataclasses.dataclass(frozen=True)
class Row:
    """One adapted parameter of a run.

    Args:
      path: the parameter; of a stacked one with the place of the matrix, `layers/up_proj/kernel[3]`.
      shape: its shape.
      rank: r of its pair; `None` if it is trained whole.
      scale: the factor of the pair; `None` if it is trained whole.
      change: ||dW|| / ||W||, Frobenius; `None` where the base is not at hand, or zero.
      effective_rank: exp of the entropy of dW's normalised singular values; `None` if dW is not known.
    """

    path: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float | None
    change: float | None
    effective_rank: float | None


def _cells(row: Row) -> tuple[str, ...]:
    rank = "whole" if row.rank is None else str(row.rank)
    shape = "x".join(map(str, row.shape))
    return row.path, shape, rank, _show(row.scale, ".4g"), _show(row.change, ".4f"), _show(row.effective_rank, ".2f")


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def inspect(directory: pathlib.Path) -> list[Row]:
    """What a run changed, per adapted parameter. Downloads nothing.

    Raises:
      InputError: there is no such run, it has no checkpoint yet, or its base model has changed.
    """
    config = run.read_config(directory)
    base = _base_at_hand(directory, config)
    adapters = load_adapters(directory, base.model.variables if base else None)
    weights = paths.flatten(base.model.variables)[0] if base else {}
    whole = ((path, adapter, quantized.dense(weights.get(path))) for path, adapter in adapters.items())
    return [_row(*one) for each in whole for one in _one_by_one(*each)]


def _base_at_hand(directory: pathlib.Path, config: run.RunConfig) -> Any:
    task = task_module(config)
    source = task.location(config)
    return task.load_base(source, config, own=run.own_base(directory)) if source.exists() else None


def _one_by_one(path: str, adapter: Adapter, weight: Any) -> Iterator[tuple[str, Adapter, Any]]:
    """Each adapted matrix of a stacked parameter, its place behind the path; any other parameter as it is."""
    if not isinstance(adapter, LowRank) or not adapter.layout.batch:
        yield path, adapter, weight
        return
    batch, left = adapter.layout.batch, sorted(adapter.layout.inputs + adapter.layout.outputs)
    inputs, outputs = (tuple(map(left.index, axes)) for axes in (adapter.layout.inputs, adapter.layout.outputs))
    stack = None if weight is None else np.moveaxis(np.asarray(weight), batch, range(len(batch)))
    ranks = algebra.true_ranks(adapter).reshape(adapter.a.shape[: len(batch)])
    arrays = jax.device_get(adapter)
    for place in zip(*ranks.nonzero()):
        own, rank = jax.tree.map(lambda leaf, place=place: jnp.asarray(leaf[place]), arrays), slice(int(ranks[place]))
        vector = None if own.lambda_d is None else own.lambda_d[rank]
        own = dataclasses.replace(own, a=own.a[..., rank], b=own.b[rank], lambda_d=vector, scale=float(own.scale), ranks=None)
        own = dataclasses.replace(own, layout=Layout((), inputs, outputs))
        yield f"{path}[{', '.join(map(str, place))}]", own, None if stack is None else stack[place]


def _row(path: str, adapter: Adapter, weight: Any) -> Row:
    weight = None if weight is None else np.asarray(weight, np.float64)
    if isinstance(adapter, LowRank):
        sizes = dict(zip(adapter.layout.inputs, adapter.a.shape)) | dict(zip(adapter.layout.outputs, adapter.b.shape[1:]))
        shape, rank, scale = tuple(sizes[axis] for axis in sorted(sizes)), adapter.rank, float(adapter.scale)
    else:
        [value] = jax.tree.leaves(adapter)
        shape, rank, scale = value.shape, None, None
    if isinstance(adapter, LowRank) and adapter.magnitude is None:
        values = np.asarray(algebra.singular_values({path: adapter})[path])
    else:
        values = None if weight is None else _values(_folded(weight, adapter) - weight)
    size = 0.0 if weight is None else float(np.linalg.norm(weight))
    change = None if values is None or not size else float(np.linalg.norm(values)) / size
    spread = None if values is None else float(algebra.effective_rank(jnp.asarray(values, jnp.float32)))
    return Row(path, shape, rank, scale, change, spread)


def _folded(weight: np.ndarray, adapter: Adapter) -> np.ndarray:
    """The parameter with its adapter folded in; a bias of the adapter goes to another parameter."""
    alone = dataclasses.replace(adapter, bias=None) if isinstance(adapter, LowRank) else adapter
    return np.asarray(merging.merge({"w": jnp.asarray(weight, jnp.float32)}, {"w": alone})["w"], np.float64)


def _values(change: np.ndarray) -> np.ndarray:
    """The singular values of a change; of a vector, its norm."""
    return np.linalg.svd(change.reshape(change.shape[0], -1), compute_uv=False)

"""`lora-jax predict`: texts, classified with a run."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from lora_jax.command import run
from lora_jax.command.tasks import classify
from lora_jax.command.tasks.registry import check_task
from lora_jax.core.adapter import attach
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import labelled


def predict_command(line: argparse.Namespace) -> int:
    """`lora-jax predict`; returns the exit code."""
    for text, found in zip(line.text, predict(line.run, line.text)):
        best = max(found, key=lambda label: found[label])
        print(f"{best}\t{found[best]:.3f}\t{text}")
    return 0


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
    model, adapters = base.model, run.load_adapters(directory, base.model.variables)
    unknown = labelled.Texts(tuple(texts), ("",) * len(texts))
    examples = labelled.encode(base.tokenizer, unknown, ("",), config.max_length)
    for note in classify.cut_texts(examples.cut, config.max_length):
        print(f"lora-jax: note: {note}", file=sys.stderr)
    batch = labelled.pad(examples, np.arange(len(texts)), labelled.pad_lengths(examples.lengths), len(texts))
    params = attach(model.variables, adapters)
    logits = jax.jit(lora(model.apply))(params, batch["input_ids"], batch["attention_mask"])
    return [dict(zip(config.labels, map(float, row))) for row in jax.nn.softmax(logits)]

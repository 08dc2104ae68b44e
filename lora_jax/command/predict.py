"""`lora-jax predict`: texts and images, classified with a run."""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.command import run
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import classify
from lora_jax.command.tasks.registry import check_task
from lora_jax.core.adapter import attach
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import labelled

_BATCH = 64
_BREAKS = re.compile(r"[\t\r\n]+")  # which would be lines and columns of what is printed


def predict_command(line: argparse.Namespace) -> int:
    """`lora-jax predict`; returns the exit code."""
    if line.data is None and hasattr(line, "text_field"):
        raise InputError("--text-field is for --data: leave it out")
    given = line.image or line.text or _texts(line)
    found = predict_images(line.run, line.image) if line.image else predict(line.run, given)
    for what, probabilities in zip(given, found):
        best = max(probabilities, key=lambda label: probabilities[label])
        print(f"{best}\t{probabilities[best]:.3f}\t{_BREAKS.sub(' ', str(what))}")
    return 0


def _texts(line: argparse.Namespace) -> list[str]:
    """The texts of `--data`: in the column of the run's, unless another is said."""
    config = run.read_config(line.run)
    check_task(config, "classify")
    return labelled.texts(line.data, getattr(line, "text_field", config.text_field))


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
    params, apply, size = attach(model.variables, adapters), jax.jit(lora(model.apply)), min(_BATCH, len(texts))
    batches = labelled.eval_batches(examples, labelled.pad_lengths(examples.lengths), size)
    logits = np.concatenate([apply(params, batch["input_ids"], batch["attention_mask"]) for batch in batches])
    place = np.argsort(np.argsort(examples.lengths, kind="stable"))  # batches are in the order of length
    return _probabilities(config, logits[place])


def predict_images(directory: pathlib.Path, files: Sequence[pathlib.Path]) -> list[dict[str, float]]:
    """The probability of each label for each image file, by the base model with the run's adapters.

    Raises:
      InputError: there is no such run, it has no checkpoint yet, its base model is gone or changed, or a file is no image.
    """
    from lora_jax.command.tasks import images  # which needs Pillow

    config = run.read_config(directory)
    check_task(config, "images")
    base = images.load_base(images.base_directory(config), config)
    params = attach(base.model.variables, run.load_adapters(directory, base.model.variables))
    apply = jax.jit(lora(base.model.apply))
    pixels = (base.preprocessing.pixels(base.preprocessing.open(file))[None] for file in files)
    return _probabilities(config, np.concatenate([apply(params, image) for image in pixels]))


def _probabilities(config: RunConfig, logits: Any) -> list[dict[str, float]]:
    return [dict(zip(config.labels, map(float, row))) for row in jax.nn.softmax(logits)]

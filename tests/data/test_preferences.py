"""Preferences: what is read, what of it counts, and how it is split."""

import datetime
import json

import numpy as np
import pytest

from lora_jax.core.errors import InputError
from lora_jax.data import labelled, packing, preferences
from lora_jax.data import tokenizer as text_tokenizer
from tests.support import tiny_lm

TODAY = datetime.date(2025, 1, 31)
ASK, YES, NO = (
    {"role": role, "content": text} for role, text in [("user", "Go?"), ("assistant", "Yes."), ("assistant", "No.")]
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tiny_lm.model(tmp_path_factory.mktemp("home") / "model")
    return text_tokenizer.load(directory, 300)


def file(tmp_path, *rows):
    made = tmp_path / "pairs.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def read(tmp_path, *rows):
    return preferences.read(file(tmp_path, *rows), "prompt", "chosen", "rejected")


def said(tokenizer, document):
    """What of a document counts."""
    return tokenizer.tokenizer.decode(document.tokens[document.targets].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("row", "chosen"),
    [
        ({"prompt": "Go?", "chosen": " Yes.", "rejected": " No."}, " Yes.<|im_end|>"),
        ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, "Yes.<|im_end|>\n"),
        ({"chosen": [ASK, NO, ASK, YES], "rejected": [ASK, NO, ASK, NO]}, "Yes.<|im_end|>\n"),
    ],
)
def test_answers_count_and_prompts_do_not(tmp_path, tokenizer, row, chosen):
    found = preferences.encode(read(tmp_path, row), tokenizer, 128, TODAY)
    [(one, two)] = found.pairs
    assert (said(tokenizer, one), said(tokenizer, two)) == (chosen, chosen.replace("Yes", "No"))
    assert found.ends == (2,)


def test_pairs_of_which_nothing_is_left(tmp_path, tokenizer):
    rows = [{"prompt": "a " * 40, "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b" * 50, "rejected": "c"}]
    found = preferences.encode(read(tmp_path, *rows), tokenizer, 16, TODAY)
    assert found.pairs[0] is None and len(found.pairs[1][0].tokens) == 16
    assert (found.counts.left_out, found.counts.cut) == (1, 1)
    with pytest.raises(InputError, match="nothing is left to learn"):
        preferences.encode(read(tmp_path, rows[0]), tokenizer, 16, TODAY)


def test_a_batch_is_filled_up_with_free_pairs(tmp_path, tokenizer):
    rows = [{"prompt": "a", "chosen": f"b{i}", "rejected": "c"} for i in range(3)]
    pairs = preferences.encode(read(tmp_path, *rows), tokenizer, 16, TODAY).pairs
    batches = list(packing.eval_batches(packing.pair_up(pairs, 16), 2))
    assert [batch["targets"].any((1, 2)).tolist() for batch in batches] == [[True, True], [True, False]]
    np.testing.assert_array_equal(batches[0]["input_ids"][1, 0, : len(pairs[1][0].tokens)], pairs[1][0].tokens)


def test_the_same_pair_is_on_one_side(tmp_path, tokenizer):
    rows = [{"prompt": f"p{i % 10}", "chosen": "yes", "rejected": f"n{i}"} for i in range(40)]
    found = read(tmp_path, *rows)
    training, held_out = preferences.split(found, preferences.encode(found, tokenizer, 32, TODAY).pairs, 12)
    sides = [{bytes(one.tokens) for one, _ in part} for part in (training, held_out)]
    assert len(training) + len(held_out) == 40 and not sides[0] & sides[1] and 0 < len(held_out) <= 12
    with pytest.raises(InputError, match="rows are too few"):
        preferences.split(read(tmp_path, rows[0]), [None], 1)


def test_reviews():
    found = preferences.of_reviews(labelled.Texts(("a", "b", "c"), ("positive", "negative", "positive")), "Say:")
    assert found.chosen.items == (("Say:", "a"),) and found.rejected.items == (("Say:", "b"),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "line 1: 'chosen' and 'rejected' are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "line 1: an answer is empty"),
        ({"prompt": "", "chosen": "b", "rejected": ""}, "line 1: an answer is empty"),
        ({"chosen": "", "rejected": "b"}, "line 1: an answer is empty"),
        ({"prompt": "a", "chosen": [YES], "rejected": [NO]}, "must be texts, or all lists of messages, not 'a'"),
        ({"prompt": [ASK], "chosen": [YES], "rejected": "No."}, "must be texts, or all lists of messages"),
        ({"prompt": [ASK], "chosen": [ASK], "rejected": [NO]}, "there is nothing to learn"),
    ],
)
def test_rows_that_are_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, row)

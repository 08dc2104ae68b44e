"""Columns of well-known data sets."""

import json

import pytest

from lora_jax.data import language

TALK = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
# As https://github.com/tatsu-lab/stanford_alpaca writes them.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:"
)
ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd\n\n### Response:"
)


def read(tmp_path, row, text="text", pair=("prompt", "completion"), messages="messages", columns="any"):
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    return language.read(tmp_path / "a.jsonl", text, pair, messages, columns)


KNOWN = {
    "sharegpt": (
        {"conversations": TALK, "id": 1},
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    ),
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, (WITH_INPUT, "3")),
    "alpaca, empty": ({"instruction": "Add", "input": "", "output": "3"}, (ALONE, "3")),
    "alpaca, alone": ({"instruction": "Add", "output": "3"}, (ALONE, "3")),
    "question": ({"question": "1+2?", "answer": " 3", "level": 1}, ("1+2?", " 3")),
    "instruction": ({"instruction": "Add", "response": "3"}, ("Add", "3")),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_columns(tmp_path, name):
    row, item = KNOWN[name]
    corpus = read(tmp_path, row)
    assert corpus.items == (item,) and corpus.kind == ("chat" if name == "sharegpt" else "pairs")
    named = {"sharegpt": "ShareGPT", "question": "question, answer", "instruction": "instruction, response"}
    assert named.get(name, "Alpaca's template") in corpus.columns
    assert read(tmp_path, {**row, "text": "x"}, columns=name.partition(",")[0]).items == corpus.items


def test_chosen_names_go_first(tmp_path):
    row = {"instruction": "Add", "output": "3", "text": "x", "body": "y"}
    assert read(tmp_path, row, text="body").items == ("y",)
    assert read(tmp_path, row, pair=("instruction", "output")).items == (("Add", "3"),)
    assert read(tmp_path, row, columns="text").items == read(tmp_path, row, columns="own").items == ("x",)
    with pytest.raises(ValueError, match=r"several kinds of data, text and alpaca: say which by --columns text"):
        read(tmp_path, row)
    with pytest.raises(ValueError, match=r"one kind of data: 'title'; its columns are 'text'"):
        read(tmp_path, {"text": "x"}, text="title")


def test_bad_turns(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: each turn must be from human, gpt, system .*--messages-field conversations"):
        read(tmp_path, {"conversations": [{"role": "user", "content": "Hi"}]})
    with pytest.raises(ValueError, match=r"line 1: 'conversations' must be a list of objects with a from and a value"):
        read(tmp_path, {"conversations": "Hi"})
    with pytest.raises(ValueError, match=r"line 1: no message is the assistant's"):
        read(tmp_path, {"conversations": TALK[:2]})

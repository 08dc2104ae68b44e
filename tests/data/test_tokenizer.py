"""Tokens of texts that a tokenizer puts something before: no mark and no space twice."""

import datetime
import random

import numpy as np
import pytest
import tokenizers

from lora_jax.data import language, packing, token_cache
from lora_jax.data.language import Corpus
from lora_jax.data.tokenizer import TextTokenizer
from tests.support import tiny_lm

DAY = datetime.date(2025, 1, 1)


def make(kind, source):
    """A tokenizer of SentencePiece's kind, as Llama 2 (`old`) and newer models (`new`) have it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    draw = random.Random(1)
    made.train_from_iterator([f"{tiny_lm.sentence(draw)} x = 42" for _ in range(50)], trainer)
    if kind == "old":
        made.pre_tokenizer = None
        parts = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        made.normalizer = tokenizers.normalizers.Sequence(parts)
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return TextTokenizer(made, {"eos_token": "</s>"}, None, source)


@pytest.mark.parametrize("kind", ["old", "new"])
def test_a_completion_goes_on_from_its_prompt(kind, tmp_path):
    """Without a space that nobody wrote, wherever the one between the two stands."""
    tokenizer = make(kind, tmp_path)
    items = (("x =", " 42"), ("x = ", "42"), ("x", "= 42"), ("", "x = 42"))
    documents, *_ = language.encode(Corpus("pairs", items, (1, 2, 3, 4)), tokenizer, 64, DAY)
    texts = [tokenizer.tokenizer.decode(document.tokens.tolist()) for [document] in documents]
    assert texts == ["x = 42", "x = 42", "x= 42", "x = 42"]
    [first], *_, [alone] = documents
    assert first.tokens.tolist() == [*tokenizer.ids(["x = 42"])[0], tokenizer.end]
    assert tokenizer.tokenizer.decode(first.tokens[first.targets].tolist()) == "42"
    assert alone.tokens[0] == tokenizer.tokenizer.token_to_id("▁x")


def test_marks_that_a_text_has_already_are_not_there_twice(tmp_path):
    """Texts that a chat template made carry their own first and last mark."""
    tokenizer = make("old", tmp_path)
    plain, made = "The cat meows.", "<s>The cat meows.</s>"
    [[one], [two]], *_ = language.encode(Corpus("text", (plain, made), (1, 2)), tokenizer, 64, DAY)
    assert one.tokens[0] == 1 and one.tokens[-1] == 2
    assert [list(document.tokens).count(mark) for document in (one, two) for mark in (1, 2)] == [1, 1, 1, 1]
    pairs = (("The cat", " meows."), ("<s>The cat", " meows.</s>"))
    [[one], [two]], *_ = language.encode(Corpus("pairs", pairs, (1, 2)), tokenizer, 64, DAY)
    assert one.tokens.tolist() == two.tokens.tolist() and one.targets.tolist() == two.targets.tolist()
    assert list(tokenizer.prompt("<s>The cat", chat=False)) == list(tokenizer.prompt("The cat", chat=False))


def test_the_end_is_learnt_where_padding_is_written_alike(tmp_path):
    """Which tokens are learnt goes by places, not by ids."""
    tokenizer = make("new", tmp_path)
    padded = TextTokenizer(tokenizer.tokenizer, tokenizer.special_tokens | {"pad_token": "</s>"}, None, tmp_path)
    documents, *_ = language.encode(Corpus("pairs", (("The cat", " meows."), ("The dog", " barks.")), (1, 2)), padded, 64, DAY)
    rows = packing.pack([document for [document] in documents], 64)
    assert rows.targets[rows.input_ids == padded.end].tolist() == [True, True]
    assert not rows.targets[rows.segment_ids == 0].any()


def test_tokens_of_large_data_are_kept(tmp_path, monkeypatch):
    """Once for each tokenizer and text; a damaged file is made anew, and of many files the oldest go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = TextTokenizer(tiny_lm.tokenizer(), {"eos_token": "<|im_end|>"}, None, tmp_path)
    texts = ["The cat meows.", "", "é"]
    plain = made.ids_and_ends(texts, special=True)
    monkeypatch.setattr(token_cache, "LEAST", 1)
    same = lambda found: all(np.array_equal(a, b) for one, two in zip(found, plain, strict=True) for a, b in zip(one, two))
    assert same(made.ids_and_ends(texts, special=True))
    [file] = (tmp_path / "lora_jax" / "tokens").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(TextTokenizer, "_encoded", None)
        assert same(made.ids_and_ends(texts, special=True))
    file.write_bytes(file.read_bytes()[:-40])
    assert same(made.ids_and_ends(texts, special=True)) and np.load(file)["ids"].dtype == np.int32
    for i in range(10):
        made.ids([f"cat {i}"])
    assert len(list(file.parent.iterdir())) == 8 and not file.exists()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert same(made.ids_and_ends(texts, special=True))

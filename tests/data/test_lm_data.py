"""Texts for language models: reading, tokens, what is learnt, packing, and the held-out part."""

import dataclasses
import datetime
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.command.tasks import lm
from lora_jax.data import language, packing
from lora_jax.data.language import Corpus, Counts, Document
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.models import llama
from tests.support import tiny_lm

DAY = datetime.date(2025, 1, 1)
PAIR = ("prompt", "completion")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(tiny_lm.tokenizer(), {"eos_token": "<|im_end|>"}, tiny_lm.CHATML, tmp_path_factory.mktemp("model"))


def read(file, content):
    file.write_text(content)
    return language.read(file, "text", PAIR, "messages")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
READ = {
    "a.txt": ("One.\nStill one.\n\nA paragraph of it.\n\n\nTwo.\n \n\n\nThree.\n", "stream", ("One.\nStill one.\n\nA paragraph of it.", "Two.", "Three.")),
    "b.csv": ('id,text\n1,"a\nb"\n2,c\n', "text", ("a\nb", "c")),
    "c.jsonl": (lines({"text": "a"}, {"text": "b", "id": 2}), "text", ("a", "b")),
    "d.jsonl": (lines({"prompt": "", "completion": "a"}), "pairs", (("", "a"),)),
    "e.csv": ("prompt,completion\nq,a\n", "pairs", (("q", "a"),)),
    "f.jsonl": (lines({"messages": CHAT}), "chat", (CHAT,)),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_read(tmp_path, name):
    content, kind, items = READ[name]
    corpus = read(tmp_path / name, content)
    assert (corpus.kind, corpus.items) == (kind, items)
    assert corpus.digest() != dataclasses.replace(corpus, items=("x", *items[1:])).digest()


BAD = {
    "a.jsonl": ("", "holds no rows"),
    "b.jsonl": (lines({"body": "a"}), "columns of one kind of data: 'text'; 'prompt' and 'completion'; 'messages'; 'conversations'; .* its columns are 'body'"),
    "c.jsonl": (lines({"text": "a", "messages": CHAT}), "columns of several kinds of data, text and messages: say which by --columns text"),
    "d.jsonl": (lines({"text": "a"}, {"body": "b"}), "line 2: there is no column 'text'"),
    "e.jsonl": (lines({"text": "a"}, {"text": 3}), "line 2: 'text' must be a text, not int"),
    "f.jsonl": (lines({"text": "a"}, {"text": " "}), "1 rows have an empty 'text', on the lines 2"),
    "g.jsonl": (lines({"messages": []}), "line 1: the messages must be a list"),
    "h.jsonl": (lines({"messages": [{"role": "user"}]}), "line 1: each message must be an object whose role and content are texts"),
    "i.jsonl": (lines({"messages": CHAT[:1]}), "line 1: no message is the assistant's"),
    "j.txt": (" \n", "holds no text"),
    "k.md": ("a", r"must be a \.txt, \.csv, \.jsonl, \.json, \.parquet or \.arrow file"),
    "l.jsonl": ('{"text": ' + "[" * 100_000, "line 1 is not JSON"),
    "m.jsonl": (lines({"prompt": "a", "completion": ""}), "1 rows have an empty 'completion'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_file(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, content)


def test_bytes_that_are_no_text(tmp_path):
    for name in ("a.txt", "a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes(b"text\n\xff\xfe\n")
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            language.read(tmp_path / name, "text", PAIR, "messages")


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_text_ends_with_the_end_mark(tokenizer):
    [[document]], counts, _ = language.encode(Corpus("text", ("The cat meows.",), (1,)), tokenizer, 100, DAY)
    assert tokenizer.tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False) == "The cat meows.<|im_end|>"
    assert document.targets.tolist() == [False] + [True] * (len(document.tokens) - 1) and counts == Counts()
    held_out = lm.without_end(document, tokenizer.end)
    assert held_out.targets.tolist() == [False] + [True] * (len(document.tokens) - 2) + [False]


def test_only_completions_are_learnt(tokenizer):
    corpus = Corpus("pairs", (("The cat", " meows."), ("", "x y")), (1, 2))
    [[pair], [alone]], _, ends = language.encode(corpus, tokenizer, 100, DAY)
    decode = lambda ids: tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert decode(pair.tokens[~pair.targets]) == "The cat" and decode(pair.tokens[pair.targets]) == " meows.<|im_end|>"
    assert pair.tokens.tolist() == [*tokenizer.ids(["The cat"])[0], *tokenizer.ids([" meows."])[0], tokenizer.end]
    assert ends == (tokenizer.end,)
    assert alone.targets.tolist() == [False] + [True] * (len(alone.tokens) - 1)


def test_long_texts_are_split_and_each_token_is_learnt_once(tokenizer):
    text = "".join(f"{i:02d}" for i in range(50))
    [pieces], counts, _ = language.encode(Corpus("text", (text,), (1,)), tokenizer, 12, DAY)
    assert counts == Counts(split=1) and {len(piece.tokens) for piece in pieces[:-1]} == {12}
    whole = [*tokenizer.ids([text])[0], tokenizer.end]
    assert [pieces[0].tokens[0], *np.concatenate([piece.tokens[piece.targets] for piece in pieces])] == whole
    for one, two in itertools.pairwise(pieces):
        assert one.tokens[-1] == two.tokens[0]


def test_long_pairs_are_cut_and_counted(tokenizer):
    corpus = Corpus("pairs", (("ab", "cd" * 20), ("ab" * 20, "cd"), ("a", "b")), (1, 2, 3))
    documents, counts, _ = language.encode(corpus, tokenizer, 10, DAY)
    assert [len(found) for found in documents] == [1, 0, 1] and counts == Counts(cut=1, left_out=1)
    with pytest.raises(ValueError, match=r"nothing is left to learn.*max_length 10; raise it"):
        language.encode(Corpus("pairs", (("ab" * 20, "cd"),), (1,)), tokenizer, 10, DAY)


def test_what_the_tokenizer_must_have(tokenizer):
    bare = TextTokenizer(tokenizer.tokenizer, {}, None, tokenizer.source)
    with pytest.raises(ValueError, match="names no eos_token"):
        language.encode(Corpus("text", ("a",), (1,)), bare, 10, DAY)
    with pytest.raises(ValueError, match=r"has no chat template: add a chat_template\.jinja"):
        language.encode(Corpus("chat", (CHAT,), (1,)), bare, 10, DAY)
    silent = TextTokenizer(tokenizer.tokenizer, {}, "{% generation %}{% endgeneration %}", tokenizer.source)
    document, *_ = language.encode(Corpus("chat", (CHAT,), (7,)), tokenizer, 100, DAY)
    assert document[0][0].targets.any()
    with pytest.raises(ValueError, match="nothing is left to learn"):
        language.encode(Corpus("chat", (CHAT,), (7,)), silent, 100, DAY)


# --- the held-out part and rows ---------------------------------------------------------------------------------------


def document(n, value=1):
    return Document(np.full(n, value, np.int32), np.arange(n) > 0)


def test_split_keeps_equal_items_together_and_holds_out_a_tenth():
    corpus = Corpus("text", tuple(f"text {i % 60}" for i in range(80)), tuple(range(80)))
    documents = [[document(11, i % 60)] for i in range(80)]
    train, test = language.split(corpus, documents, 10_000)
    assert len(train) + len(test) == 80 and not {d.tokens[0] for d in train} & {d.tokens[0] for d in test}
    assert 80 <= sum(d.targets.sum() for d in test) <= 100
    fewer = language.split(corpus, documents, 25)[1]
    assert 25 <= sum(d.targets.sum() for d in fewer) <= 40 and len(language.split(corpus, documents, 1)[1]) in (1, 2)


def test_split_holds_out_the_end_of_a_stream():
    pieces = [[document(5, 1), document(5, 2)], [document(5, 3)], [document(5, i) for i in range(4, 41)]]
    train, test = language.split(Corpus("stream", ("a", "b", "c")), pieces, 10_000)
    assert [d.tokens[0] for d in train] == list(range(1, 37)) and [d.tokens[0] for d in test] == [37, 38, 39, 40]


def test_too_little_to_split():
    with pytest.raises(ValueError, match="the data is too little: of 1 pieces of text 1 would be held out"):
        language.split(Corpus("text", ("a",), (1,)), [[document(9)]], 100)


def test_packing_keeps_every_token_and_fills_rows():
    lengths = np.random.default_rng(0).integers(2, 33, 200)
    packed = packing.pack([document(n, i) for i, n in enumerate(lengths)], 32)
    assert packed.targets.sum() == (lengths - 1).sum() and (packed.segment_ids > 0).sum() == lengths.sum()
    assert len(packed) < 1.1 * lengths.sum() / 32
    found = {}
    for ids, segments, positions in zip(packed.input_ids, packed.segment_ids, packed.positions):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum())) and len(set(ids[here])) == 1
            found[ids[here][0]] = here.sum()
    assert found == dict(enumerate(lengths))


def losses(model, packed):
    batch = {name: jnp.asarray(array) for name, array in packed.batch(np.arange(len(packed)), len(packed)).items()}
    return lm.token_losses(model.losses, model.variables, batch)[0].sum(1)


def test_packed_documents_never_see_each_other():
    model = llama.init(tiny_lm.sizes(), jax.random.key(1))
    draw = np.random.default_rng(2)
    documents = [Document(draw.integers(0, 300, n).astype(np.int32), np.arange(n) > 0) for n in (7, 12, 5, 8)]
    together = packing.pack(documents, 36)
    assert together.segment_ids.max() == 4 and len(together) == 1
    apart = (
        packing.pack([documents[0]], 36),
        packing.pack([documents[1]], 36),
        packing.pack([documents[2]], 36),
        packing.pack([documents[3]], 36),
    )
    alone = [float(losses(model, one)[0]) for one in apart]
    np.testing.assert_allclose(losses(model, together)[0], sum(alone), rtol=1e-5)
    plain = model.apply(model.variables, jnp.asarray(documents[1].tokens)[None])
    want = -jax.nn.log_softmax(plain)[0, jnp.arange(11), documents[1].tokens[1:]].sum()
    np.testing.assert_allclose(alone[1], want, rtol=1e-5)


def test_batches_of_one_row():
    packed = packing.pack([document(8, i) for i in range(5)], 8)
    batches = packing.train_batches(packed, 1, seed=3)
    assert sorted(int(next(batches)["input_ids"][0, 0]) for _ in range(5)) == list(range(5))


def test_batches_go_on_from_a_position():
    packed = packing.pack([document(8, i) for i in range(10)], 8)
    one, two = (packing.train_batches(packed, 4, seed=3) for _ in range(2))
    for _ in range(7):
        next(one)
    two.set_state(json.loads(json.dumps(one.get_state())))
    for _ in range(8):
        a, b = next(one), next(two)
        assert {name: array.tolist() for name, array in a.items()} == {name: array.tolist() for name, array in b.items()}
    first = packing.train_batches(packed, 5, seed=3)
    assert sorted(int(row[0]) for _ in range(2) for row in next(first)["input_ids"]) == list(range(10))
    last = list(packing.eval_batches(packed, 4))[-1]
    assert last["input_ids"].shape == (4, 8) and last["targets"][2:].sum() == 0 and last["targets"][:2].sum() == 14

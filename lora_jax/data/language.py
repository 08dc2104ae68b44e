"""Texts for `lora-jax finetune --task lm`: reading, tokens, which of them are learnt, and the held-out part.

Four kinds of data:

    .txt            documents, with two or more blank lines between them; the end of the file is held out
    text            a row of a table is a document
    pairs           a prompt and a completion; only the completion is learnt
    chat            messages (not in .csv); only what the assistant says is learnt
"""

import dataclasses
import datetime
import hashlib
import json
import operator
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import InputError, within
from lora_jax.core.files import parse_json
from lora_jax.data import layouts, tables
from lora_jax.data.chat import ChatTemplate, Messages, Span, Written
from lora_jax.data.layouts import Layout
from lora_jax.data.tokenizer import TextTokenizer

_BLANK = re.compile(r"\n(?:[ \t]*\n){2,}")
_SUFFIXES = (".txt", *tables.SUFFIXES)
_SAID = ("content", "reasoning_content", "thinking")  # the fields of a message in which chat templates look for what is said


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What was read.

    Args:
      kind: `"stream"` (documents in their order), `"text"`, `"pairs"` or `"chat"`.
      items: texts, (prompt, completion) pairs, or lists of messages.
      places: the file and line of each, for errors; empty for a stream.
      tools: the tools of each chat; empty if there are none at all.
      sources: the number of the source of each; empty if there is one.
      columns: what the columns were, in words.
    """

    kind: str
    items: tuple[Any, ...]
    places: tuple[str, ...] = ()
    tools: tuple[Any, ...] = ()
    sources: tuple[int, ...] = ()
    columns: str = ""

    def digest(self) -> str:
        """A SHA-256 of everything, in hexadecimal digits."""
        parts = [self.kind, self.items, *([self.tools] if self.tools else [])]
        parts += [{"sources": self.sources}] if self.sources else []
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Document:
    """Tokens that belong together.

    Args:
      tokens: int32 ids, `(length,)`.
      targets: which of them are learnt, `(length,)`; the first never is, since nothing is before it.
      source: the number of the source that they are from.
    """

    tokens: np.ndarray
    targets: np.ndarray
    source: int = 0


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of texts that are longer than a row, and of chats that their template changes.

    Args:
      split: texts that were split into several documents.
      cut: pairs and chats that were cut at their end.
      left_out: those of them of which nothing was left to learn.
      apart: chats in several documents, since the template writes a turn in another way once more follows.
      shortened: chats of which the template leaves something out that the assistant says or thinks.
      unprompted: turns that do not follow the template's prompt for the assistant, which opens a thinking that they lack.
    """

    split: int = 0
    cut: int = 0
    left_out: int = 0
    apart: int = 0
    shortened: int = 0
    unprompted: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))


class Encoded(NamedTuple):
    """What `encode` returns.

    Args:
      documents: those of each item.
      counts: what became of some.
      ends: the ids that end what is learnt: the tokenizer's `eos_token`, or the special tokens that end the turns of chats.
    """

    documents: list[list[Document]]
    counts: Counts
    ends: tuple[int, ...]


def read(sources: tables.Sources, text: str, pair: tuple[str, str], messages: str, columns: str = "any") -> Corpus:
    """Read files and folders of them; the columns that they have say what kind of data they hold.

    Args:
      sources: a `.txt` file, a table, or a folder of them; or several.
      text: the column of a text.
      pair: the columns of a prompt and of its completion.
      messages: the column of a chat.
      columns: which of the columns to take, one of `layouts.NAMES`.

    Raises:
      MissingError: there is no such file.
      InputError: the columns are of no kind or of several, a row is damaged, there are no rows, or the files are of several
        kinds.
    """
    own = layouts.own(text, pair, messages)
    files = tables.files(sources, _SUFFIXES)
    parts = [_stream(file) if tables.kind(file) == ".txt" else _rows(file, own, columns) for _, file in files]
    for (_, file), part in zip(files, parts):
        if part.kind != parts[0].kind:
            raise InputError(f"{file} holds {part.kind}, and {files[0][1]} {parts[0].kind}: the data must be of one kind")
    return joined(parts, [number for number, _ in files])


def joined(parts: Sequence[Corpus], sources: Sequence[int]) -> Corpus:
    """One corpus of several of one kind, which are parts of these sources."""
    tools = [tools for part in parts for tools in (part.tools or [None] * len(part.items))]
    return Corpus(
        parts[0].kind,
        tuple(item for part in parts for item in part.items),
        tuple(place for part in parts for place in part.places),
        tuple(tools) if any(tools) else (),
        tuple(number for number, part in zip(sources, parts) for _ in part.items) if sources[-1] else (),
        ", ".join(dict.fromkeys(part.columns for part in parts if part.columns)),
    )


def _rows(file: pathlib.Path, own: Mapping[str, Layout], columns: str) -> Corpus:
    layout = layouts.find(file, tables.columns(file), own, columns)
    rows = list(tables.rows(file, layout.fields))
    places = tuple(tables.place(file, number) for number, _ in rows)
    items: list[Any] = [layout.take(place, row) for place, (_, row) in zip(places, rows)]
    if layout.kind == "chat":
        items = [check_messages(place, messages) for place, messages in zip(places, items)]
        tools = tuple(_tools(place, row.get("tools")) for place, (_, row) in zip(places, rows))
        return Corpus("chat", tuple(items), places, tools if any(tools) else (), columns=layout.said)
    # A completion alone may begin a text, so an empty prompt is no mistake.
    learnt = [item if layout.kind == "text" else item[1] for item in items]
    tables.refuse_empty(file, [number for (number, _), text in zip(rows, learnt) if not text.strip()], layout.fields[-1:])
    return Corpus(layout.kind, tuple(items), places, columns=layout.said)


def _stream(file: pathlib.Path) -> Corpus:
    with tables.opened(file) as stream:
        content = stream.read()
    documents = tuple(part.strip("\n") for part in _BLANK.split(content) if part.strip())
    if not documents:
        raise InputError(f"{file} holds no text")
    return Corpus("stream", documents)


def check_messages(where: str, messages: Any) -> list[dict[str, Any]]:
    """The messages of a chat.

    Raises:
      InputError: they are none, or nothing in them is learnt; `where` begins the message.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: the messages must be a list of objects with a role and a content")
    for message in messages:
        if not isinstance(message, dict) or not _is_said(message):
            raise InputError(f"{where}: each message must be an object whose role and content are texts, not {message!r:.80}")
        if message.get("weight", 1) not in (0, 1):
            raise InputError(f"{where}: the weight of a message must be 0 (not learnt) or 1, not {message['weight']!r:.80}")
        if message["role"] == "assistant" and message.get("weight", 1) and not _says_something(message):
            raise InputError(
                f"{where}: the assistant says nothing in a message: fill it, give it the weight 0, or leave the row out"
            )
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise InputError(f"{where}: no message is the assistant's and of the weight 1, so there is nothing to learn")
    return messages


def _is_said(message: dict[str, Any]) -> bool:
    """Whether a message has a role and a content; one that calls tools may have no content."""
    content = message.get("content")
    return isinstance(message.get("role"), str) and (
        isinstance(content, str) or (content is None and bool(message.get("tool_calls")))
    )


def _says_something(message: Mapping[str, Any]) -> bool:
    return any(message.get(name) and str(message[name]).strip() for name in (*_SAID, "tool_calls"))


def _tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a chat, which some write as JSON within the JSON."""
    if isinstance(tools, str) and tools:
        tools = parse_json(tools, f"{where}, 'tools'")
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f"{where}: the tools must be a list of objects, not {tools!r:.80}")
    return tools or None


# --- tokens -----------------------------------------------------------------------------------------------------------


def encode(corpus: Corpus, tokenizer: TextTokenizer, max_length: int, today: datetime.date) -> Encoded:
    """The documents of each item, none longer than `max_length`.

    A text ends with the tokenizer's `eos_token`, once. One that is too long is split, so that each piece begins with the last
    token of the one before: thus every token but the first is learnt once. Prompt and completion are tokenised each by itself,
    as they are when the model is used; a pair or chat that is too long is cut at its end.

    Args:
      today: what the chat template is told.

    Raises:
      InputError: no text is left, the tokenizer lacks what is needed, or the chat template can't be used; the line is named.
    """
    return shortened(corpus, whole(corpus, tokenizer, today), max_length)


def whole(corpus: Corpus, tokenizer: TextTokenizer, today: datetime.date) -> Encoded:
    """What `encode` makes of each item, however long."""
    encode_all = {"stream": _encode_texts, "text": _encode_texts, "pairs": _encode_pairs, "chat": _encode_chats}[corpus.kind]
    return encode_all(corpus, tokenizer, today)


def shortened(corpus: Corpus, encoded: Encoded, max_length: int) -> Encoded:
    """What `encode` makes of what `whole` has made."""
    shorten = _split if corpus.kind in ("stream", "text") else _cut
    results = [shorten(own, max_length) for own in encoded.documents]
    if not any(found for found, _ in results):
        raise InputError(f"nothing is left to learn: no completion or answer begins within max_length {max_length}; raise it")
    documents = [found for found, _ in results]
    if corpus.sources:
        documents = [[_of_source(part, source) for part in own] for own, source in zip(documents, corpus.sources)]
    return Encoded(documents, sum((count for _, count in results), encoded.counts), encoded.ends)


def _of_source(document: Document, source: int) -> Document:
    return dataclasses.replace(document, source=source)


def _encode_texts(corpus: Corpus, tokenizer: TextTokenizer, _: datetime.date) -> Encoded:
    ids = [_ended(found, tokenizer.end) for found in tokenizer.ids(corpus.items)]
    return Encoded([[Document(tokens, np.arange(len(tokens)) > 0)] for tokens in ids], Counts(), (tokenizer.end,))


def _encode_pairs(corpus: Corpus, tokenizer: TextTokenizer, _: datetime.date) -> Encoded:
    prompts = tokenizer.ids([prompt for prompt, _ in corpus.items])
    alone = tokenizer.ids([completion for _, completion in corpus.items], special=False)
    following = tokenizer.following_ids([completion for _, completion in corpus.items])
    documents = []
    for (text, _), prompt, first, later in zip(corpus.items, prompts, alone, following):
        tokens = np.concatenate([prompt, _ended(later if text else first, tokenizer.end)])
        documents.append([Document(tokens, np.arange(len(tokens)) >= max(1, len(prompt)))])
    return Encoded(documents, Counts(), (tokenizer.end,))


def _ended(ids: np.ndarray, end: int) -> np.ndarray:
    """The ids with the end mark; a text that was written with it keeps its own."""
    return ids if len(ids) and ids[-1] == end else np.append(ids, np.int32(end))


def _encode_chats(corpus: Corpus, tokenizer: TextTokenizer, today: datetime.date) -> Encoded:
    template = tokenizer.chat(today)
    chats: list[list[Written]] = []
    for place, messages, tools in zip(corpus.places, corpus.items, corpus.tools or [None] * len(corpus.items)):
        with within(place):
            _check_tools(template, messages, tools)
            chats.append(_weighted(template.with_tools(tools).turns(messages), messages))
        if not any(written.spans for written in chats[-1]):
            raise InputError(f"{place}: the chat template marks nothing as the assistant's, so there is nothing to learn")
    encoded = iter(tokenizer.ids_and_ends([written.text for chat in chats for written in chat], special=False))
    documents: list[list[Document]] = []
    ends: set[int] = set()
    for chat in chats:
        documents.append([])
        for written, (ids, places) in zip(chat, encoded):
            documents[-1].append(Document(ids, _inside(places, written.spans)))
            ends |= _turn_ends(written, ids, places, tokenizer.added)
    counts = sum(map(_count, chats, corpus.items), Counts())
    return Encoded(documents, counts, tuple(sorted(ends)))


def _check_tools(template: ChatTemplate, messages: Messages, tools: Any) -> None:
    """Raise an InputError if there are tools that the template does not write."""
    if tools and template.with_tools(tools).render(messages) == template.render(messages):
        raise InputError("the chat template does not write the tools: leave their column out, or say them in a system message")


def _weighted(chat: list[Written], messages: Messages) -> list[Written]:
    """The texts of a chat without the turns of messages of the weight 0."""
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if all(weights):
        return chat
    marked = sum(len(written.spans) for written in chat)
    if len(weights) != marked:
        raise InputError(
            f"a message has the weight 0, but the chat template marks {marked} turns for the assistant's {len(weights)} "
            "messages, so which one to leave out is not certain"
        )
    left = iter(weights)
    return [written._replace(spans=tuple(span for span in written.spans if next(left))) for written in chat]


def _turn_ends(written: Written, ids: np.ndarray, places: np.ndarray, added: Collection[int]) -> set[int]:
    """The tokens that end the turns: the last of each but for spaces, if it is an added one and so no part of what is said."""
    found = set()
    for start, end in written.spans:
        last = start + len(written.text[start:end].rstrip())
        [at] = np.nonzero((places[:, 0] >= start) & (places[:, 1] == last) & (places[:, 1] > places[:, 0]))
        found |= {int(id) for id in ids[at] if id in added}
    return found


def _count(chat: Sequence[Written], messages: Messages) -> Counts:
    texts = ["".join(written.text.split()) for written in chat]
    parts = (message.get(name) for message in messages if message["role"] == "assistant" for name in _SAID)
    lost = any(isinstance(part, str) and not any("".join(part.split()) in text for text in texts) for part in parts)
    return Counts(apart=int(len(chat) > 1), shortened=int(lost), unprompted=sum(written.unprompted for written in chat))


def _inside(places: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Which tokens lie within one of the spans as a whole; never the first."""
    inside = np.zeros(len(places), bool)
    for start, end in spans:
        inside |= (places[:, 0] >= start) & (places[:, 1] <= end) & (places[:, 1] > start)
    inside[:1] = False
    return inside


def _split(documents: Sequence[Document], max_length: int) -> tuple[list[Document], Counts]:
    """Pieces of the one document, which share a token with the one before."""
    [document] = documents
    starts = range(0, max(1, len(document.tokens) - 1), max_length - 1)
    pieces = [document.tokens[start : start + max_length] for start in starts]
    return [Document(piece, np.arange(len(piece)) > 0) for piece in pieces], Counts(split=int(len(pieces) > 1))


def _cut(documents: Sequence[Document], max_length: int) -> tuple[list[Document], Counts]:
    """The first `max_length` tokens of each; nothing of those of which none is learnt."""
    cut = [Document(document.tokens[:max_length], document.targets[:max_length]) for document in documents]
    kept = [document for document in cut if document.targets.any()]
    longer = any(len(document.tokens) > max_length for document in documents)
    return kept, Counts(cut=int(longer and bool(kept)), left_out=int(not kept))


# --- the held-out part ------------------------------------------------------------------------------------------------


def split(corpus: Corpus, documents: Sequence[Sequence[Document]], held_out: int) -> tuple[list[Document], list[Document]]:
    """Documents to train on and held-out ones: of a stream its end, else whole items by a fixed seed, equal ones together.

    Args:
      documents: those of each item.
      held_out: the learnt tokens to hold out, at most a tenth of all.

    Raises:
      InputError: there are too few documents.
    """
    if corpus.kind == "stream":
        groups = [[piece] for pieces in reversed(documents) for piece in reversed(pieces)]
    else:
        together: dict[str, list[Document]] = {}
        for item, pieces in zip(corpus.items, documents):
            together.setdefault(json.dumps(item), []).extend(pieces)
        filled = [pieces for pieces in together.values() if pieces]
        groups = [filled[i] for i in np.random.default_rng(0).permutation(len(filled))]
    sizes = np.array([sum(int(piece.targets.sum()) for piece in group) for group in groups])
    wanted = min(held_out, int(sizes.sum()) // 10)
    border = int(np.searchsorted(np.cumsum(sizes), max(1, wanted))) + 1
    if border >= len(groups):
        raise InputError(
            f"the data is too little: of {len(groups)} pieces of text {min(border, len(groups))} would be held out, which "
            "leaves nothing to train on; add text, or lower max_length"
        )
    train, test = ([piece for group in part for piece in group] for part in (groups[border:], groups[:border]))
    return (train[::-1], test[::-1]) if corpus.kind == "stream" else (train, test)

"""Preferences for `lora-jax finetune --task dpo`: two answers to a prompt, of which one was chosen.

Two kinds of rows in a table:

    texts           a prompt, the chosen answer and the rejected one
    chats           (not in .csv) lists of messages: the prompt, and both answers; or no prompt, and two whole chats, of which
                    the messages that they begin with together are the prompt

Only the answers count, never the prompt.
"""

import dataclasses
import datetime
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.data import labelled, language, tables
from lora_jax.data.language import Corpus, Counts, Document
from lora_jax.data.tokenizer import TextTokenizer

Pair = tuple[Document, Document]


@dataclasses.dataclass(frozen=True)
class Preferences:
    """What was read: the chosen and the rejected texts, whose items have the same prompts.

    Args:
      prompts: of each pair, in words.
      chosen: prompts with the chosen answers.
      rejected: prompts with the rejected ones.
    """

    prompts: tuple[str, ...]
    chosen: Corpus
    rejected: Corpus

    def __len__(self) -> int:
        return len(self.prompts)

    def digest(self) -> str:
        """A SHA-256 of everything, in hexadecimal digits."""
        return hashlib.sha256(f"{self.chosen.digest()} {self.rejected.digest()}".encode()).hexdigest()


class Encoded(NamedTuple):
    """What `encode` returns.

    Args:
      pairs: of each item the chosen and the rejected document; `None` where one has nothing left to learn.
      counts: what became of some texts.
      ends: the ids that end the answers.
    """

    pairs: list[Pair | None]
    counts: Counts
    ends: tuple[int, ...]


def read(sources: tables.Sources, prompt: str, chosen: str, rejected: str) -> Preferences:
    """Read tables and folders of them, one or several; the last three arguments are the columns.

    Raises:
      MissingError: there is no such file.
      InputError: it lacks a column, a row is damaged, both answers are the same, there are no rows, or some files hold texts
        and others chats.
    """
    files = tables.files(sources)
    parts = [_read(file, prompt, chosen, rejected) for _, file in files]
    for (_, file), part in zip(files, parts):
        if part.chosen.kind != parts[0].chosen.kind:
            kinds = f"{part.chosen.kind}, and {files[0][1]} {parts[0].chosen.kind}"
            raise InputError(f"{file} holds {kinds}: the data must be of one kind")
    numbers = [number for number, _ in files]
    one, two = (language.joined(own, numbers) for own in zip(*((part.chosen, part.rejected) for part in parts)))
    return Preferences(tuple(text for part in parts for text in part.prompts), one, two)


def _read(file: pathlib.Path, prompt: str, chosen: str, rejected: str) -> Preferences:
    fields = [field for field in (prompt, chosen, rejected) if field != prompt or field in tables.columns(file)]
    rows = list(tables.rows(file, fields))
    of_chats = isinstance(rows[0][1][chosen], list)
    read_one = _chats if of_chats else _texts
    places = tuple(tables.place(file, number) for number, _ in rows)
    found = [read_one(where, row.get(prompt), row[chosen], row[rejected]) for where, (_, row) in zip(places, rows)]
    for where, (_, one, two) in zip(places, found):
        if one == two:
            raise InputError(f"{where}: {chosen!r} and {rejected!r} are the same, so there is nothing to prefer")
    prompts, *answers = zip(*found)
    one, two = (Corpus("chat" if of_chats else "pairs", items, places) for items in answers)
    return Preferences(prompts, one, two)


def _texts(where: str, prompt: Any, *answers: Any) -> tuple[str, tuple[str, str], tuple[str, str]]:
    """A prompt, and it with each answer."""
    prompt = "" if prompt is None else prompt
    for text in (prompt, *answers):
        if not isinstance(text, str):
            raise InputError(f"{where}: prompt and answers must be texts, or all lists of messages, not {text!r:.80}")
    if not all(map(str.strip, answers)):
        raise InputError(f"{where}: an answer is empty: remove the row")
    one, two = answers
    return prompt, (prompt, one), (prompt, two)


def _chats(where: str, prompt: Any, *answers: Any) -> tuple[str, list[Any], list[Any]]:
    """A prompt in words, and it as messages that are not learnt with each answer."""
    if not all(isinstance(messages, list) for messages in answers) or not isinstance(prompt, list | None):
        raise InputError(f"{where}: prompt and answers must be texts, or all lists of messages, not {prompt!r:.80}")
    if prompt is None:
        shared = next((i for i, (one, two) in enumerate(zip(*answers)) if one != two), min(map(len, answers)))
        prompt, answers = answers[0][:shared], tuple(messages[shared:] for messages in answers)
    whole = [language.check_messages(where, [*map(_not_learnt, prompt), *messages]) for messages in answers]
    return repr(prompt), whole[0], whole[1]


def _not_learnt(message: Any) -> Any:
    return {**message, "weight": 0} if isinstance(message, dict) and message.get("role") == "assistant" else message


def encode(preferences: Preferences, tokenizer: TextTokenizer, max_length: int, today: datetime.date) -> Encoded:
    """The documents of each pair, as `language.encode` makes those of a completion or a chat.

    Raises:
      InputError: no pair is left, or what `language.encode` refuses.
    """
    return shortened(preferences, whole(preferences, tokenizer, today), max_length)


def whole(
    preferences: Preferences, tokenizer: TextTokenizer, today: datetime.date
) -> tuple[language.Encoded, language.Encoded]:
    """What `encode` makes of the chosen and of the rejected texts, however long."""
    return language.whole(preferences.chosen, tokenizer, today), language.whole(preferences.rejected, tokenizer, today)


def shortened(preferences: Preferences, encoded: tuple[language.Encoded, language.Encoded], max_length: int) -> Encoded:
    """What `encode` makes of what `whole` has made."""
    corpora = preferences.chosen, preferences.rejected
    one, two = (language.shortened(corpus, found, max_length) for corpus, found in zip(corpora, encoded))
    pairs = [_pair(chosen, rejected) for chosen, rejected in zip(one.documents, two.documents)]
    if not any(pairs):
        raise InputError(f"no pair is left: of each an answer does not begin within max_length {max_length}; raise it")
    left_out = sum(pair is None for pair in pairs)
    counts = dataclasses.replace(one.counts + two.counts, left_out=left_out)
    return Encoded(pairs, counts, one.ends)


def _pair(chosen: Sequence[Document], rejected: Sequence[Document]) -> Pair | None:
    """One document of each; the last of a chat that is several has the last answer."""
    return (chosen[-1], rejected[-1]) if chosen and rejected else None


def split(preferences: Preferences, pairs: Sequence[Pair | None], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on and held-out ones, by a fixed seed; those of one prompt and answer are on one side.

    Args:
      held_out: how many pairs to hold out, at most.

    Raises:
      InputError: there are too few pairs.
    """
    keys = [f"{prompt}\n{chosen}" for prompt, chosen in zip(preferences.prompts, preferences.chosen.items)]
    test = labelled.held_out_rows(keys, [""] * len(keys), held_out)
    parts = ([pair for pair, is_held in zip(pairs, test) if pair is not None and is_held == side] for side in (False, True))
    training, held = parts
    if not training or not held:
        raise InputError(f"the data is too little: {len(training)} pairs to train on, {len(held)} held out; add some")
    return training, held


def of_reviews(reviews: labelled.Texts, prompt: str) -> Preferences:
    """Positive reviews over negative ones, as they come."""
    positive, negative = (
        [text for text, label in zip(reviews.texts, reviews.labels) if label == wanted] for wanted in ("positive", "negative")
    )
    count = min(len(positive), len(negative))
    one, two = (Corpus("pairs", tuple((prompt, text) for text in texts[:count])) for texts in (positive, negative))
    return Preferences((prompt,) * count, one, two)


def token_count(pairs: Sequence[Pair]) -> int:
    """How many tokens of both answers count."""
    return int(np.sum([document.targets.sum() for pair in pairs for document in pair]))

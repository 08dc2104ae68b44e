"""The tokenizer of a language model: ids of texts, which end a text, and its chat template."""

import dataclasses
import datetime
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tokenizers

from lora_jax.core import files
from lora_jax.core.errors import InputError
from lora_jax.data import token_cache
from lora_jax.data.chat import ChatTemplate, Messages
from lora_jax.models import gguf_files

_BATCH = 1000  # texts
TOKENS, TEMPLATE, _CONFIG = "tokenizer.json", "chat_template.jinja", "tokenizer_config.json"


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and what its files say beside it.

    Args:
      tokenizer: of the `tokenizers` package.
      special_tokens: the texts of `bos_token`, `eos_token` and so on.
      template: the source of the chat template, if there is one.
      source: where it was read, for the errors.
    """

    tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    template: str | None
    source: pathlib.Path

    def ids(self, texts: Sequence[str], *, special: bool = True) -> list[np.ndarray]:
        """The token ids of each text, an int32 array; with `special`, what the tokenizer puts before a text (and not after).

        A text that begins with that already does not get it twice.
        """
        return [ids for ids, _ in self.ids_and_ends(texts, special=special)]

    def following_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of texts that go on from others: without the space that a tokenizer may put before a first word."""
        encoded = self._following.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    @functools.cached_property
    def _following(self) -> tokenizers.Tokenizer:
        parts = json.loads(self.tokenizer.to_str())
        whole = {name: _without_prefix(parts[name]) for name in ("normalizer", "pre_tokenizer")}
        return tokenizers.Tokenizer.from_str(json.dumps(parts | whole))

    def ids_and_ends(self, texts: Sequence[str], *, special: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """The token ids of each text, and where in the text each token begins and ends, `(tokens, 2)`.

        Those of large data are kept in the user's cache.
        """
        if sum(map(len, texts)) < token_cache.LEAST:
            return list(self._encoded(texts, special))
        what = [tokenizers.__version__, self.tokenizer.to_str(), special, *texts]
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        flat = token_cache.kept(name, lambda: _flat(list(self._encoded(texts, special))))
        borders = np.cumsum(flat["lengths"])[:-1]
        return list(zip(np.split(flat["ids"], borders), np.split(flat["spans"], borders)))

    def _encoded(self, texts: Sequence[str], special: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As above, with a bar on a terminal if there are many; each batch is tokenised in threads."""
        console = rich.console.Console(stderr=True)
        hidden = len(texts) <= _BATCH or not console.is_terminal
        starts = range(0, len(texts), _BATCH)
        for start in rich.progress.track(starts, "tokenising", console=console, transient=True, disable=hidden):
            for encoding in self.tokenizer.encode_batch(list(texts[start : start + _BATCH]), add_special_tokens=special):
                ids = np.array(encoding.ids, np.int32)
                spans = np.array(encoding.offsets, np.int32).reshape(-1, 2)
                own = _own(encoding)
                yield ids[own], _covering(spans[own])

    @property
    def end(self) -> int:
        """The id that ends a text.

        Raises:
          InputError: the files name none.
        """
        text = self.special_tokens.get("eos_token")
        found = None if text is None else self.tokenizer.token_to_id(text)
        if found is None:
            raise InputError(f"{self.source} names no eos_token, so the end of a text can't be learnt: add it to {_CONFIG}")
        return found

    @property
    def added(self) -> frozenset[int]:
        """The ids of tokens that no merge makes: ends, marks of roles and the like."""
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    def chat(self, today: datetime.date) -> ChatTemplate:
        """The chat template.

        Raises:
          InputError: there is none, or it is not Jinja.
        """
        if self.template is None:
            raise InputError(f"{self.source} has no chat template: add a {TEMPLATE}, or use text or prompts and completions")
        return ChatTemplate(self.template, self.special_tokens, today)

    def prompt(self, text: str, *, chat: bool, system: str | None = None) -> np.ndarray:
        """The token ids of a prompt; with `chat`, as what a user says, after the system's message if there is one.

        Raises:
          InputError: the prompt is empty, or there is no chat template.
        """
        if not chat:
            [ids] = self.ids([text])
            if not len(ids):
                raise InputError("the prompt is empty: there is nothing to go on from")
            return ids
        messages: Messages = [*opening(system), {"role": "user", "content": text}]
        return self.ids([self.chat(datetime.date.today()).render(messages, add_generation_prompt=True)], special=False)[0]


def opening(system: str | None) -> list[dict[str, str]]:
    """The messages that a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def _flat(encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The ids and spans of all texts as one array each, and how many are of each text."""
    ids, spans = map(np.concatenate, zip(*encoded))
    return {"ids": ids, "spans": spans, "lengths": np.array([len(own) for own, _ in encoded])}


def _own(encoding: tokenizers.Encoding) -> slice:
    """What is kept of an encoded text: no second start, and no end that was added (whoever wants one says so)."""
    added = [place is None for place in encoding.sequence_ids]
    first, last = 0, len(added)
    while last and added[last - 1]:
        last -= 1
    while first < last and added[first]:
        first += 1
    twice = encoding.ids[:first] == encoding.ids[first : 2 * first]
    return slice(first if twice else 0, last)


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, as `tokenizer.json` has it, that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    lists = [name for name in ("normalizers", "pretokenizers") if name in part]
    inner = {name: list(filter(None, map(_without_prefix, part[name]))) for name in lists}
    never = {"prepend_scheme": "never", "add_prefix_space": False}
    return part | inner | {name: value for name, value in never.items() if name in part}


def _covering(spans: np.ndarray) -> np.ndarray:
    """The spans without gaps: byte-level tokenizers leave the spaces before a word out of its token's span."""
    ends = np.maximum.accumulate(spans[:, 1]) if len(spans) else spans[:, 1]
    starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])[: len(spans)]
    return np.stack([np.minimum(spans[:, 0], starts), ends], axis=1)


def load(source: pathlib.Path, vocab_size: int) -> TextTokenizer:
    """The tokenizer of a Hugging Face directory or of a `.gguf` file.

    Raises:
      InputError: there is none, it is damaged, or its ids do not fit the model's vocabulary.
    """
    found = _of_gguf(source) if source.suffix == ".gguf" else _of_directory(source)
    found.tokenizer.no_padding()
    found.tokenizer.no_truncation()
    check_ids(found.tokenizer, source, vocab_size)
    return found


def check_ids(tokenizer: tokenizers.Tokenizer, source: pathlib.Path, vocab_size: int) -> None:
    """Raise an InputError if the tokenizer has an id that the model has no embedding for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise InputError(f"the tokenizer of {source} has the id {largest}, but the model's vocabulary has {vocab_size} only")


def _of_gguf(file: pathlib.Path) -> TextTokenizer:
    return TextTokenizer(gguf_files.tokenizer(file), gguf_files.special_tokens(file), gguf_files.chat_template(file), file)


def _of_directory(directory: pathlib.Path) -> TextTokenizer:
    special = {name: _content(value) for name, value in _read_config(directory).items() if name.endswith("_token")}
    named = {name: text for name, text in special.items() if isinstance(text, str)}
    return TextTokenizer(read_tokenizer(directory), named, read_template(directory), directory)


def read_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer:
    """The `tokenizer.json` of a directory.

    Raises:
      InputError: there is none, or it is damaged.
    """
    file = directory / TOKENS
    if not file.is_file():
        raise InputError(f"{directory} has no tokenizer.json: save the model with its fast tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{file} can't be read: {error}") from None


def _content(token: Any) -> Any:
    """The text of a special token, which may be written as an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def read_template(directory: pathlib.Path) -> str | None:
    """The chat template of a directory: `chat_template.jinja`, or what `tokenizer_config.json` has, or none.

    Raises:
      InputError: it can't be read.
    """
    file = directory / TEMPLATE
    if file.is_file():
        with files.reading(file):
            return file.read_text(encoding="utf-8")
    found = _read_config(directory).get("chat_template")
    if isinstance(found, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise InputError(f"{directory / _CONFIG}: chat_template must be a text, or a list with one of the name 'default'")
    return found


def _read_config(directory: pathlib.Path) -> dict[str, Any]:
    file = directory / _CONFIG
    return files.read_json_object(file) if file.is_file() else {}

"""The columns of tables for language models: the library's own, whose names may be others, and those of well-known data sets.

    text            a text
    pairs           prompt, completion
    messages        a chat
    sharegpt        conversations: a chat as lists of {"from": "human", "gpt" or "system", "value": ...}
    alpaca          instruction, output and often input: a prompt by Alpaca's template, and a completion
    question        question, answer: a prompt and a completion
    instruction     instruction, response: a prompt and a completion

Alpaca's template is that of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, `PROMPT_DICT`), whatever the chat
template of the model; who wants that gives chats.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lora_jax.core.errors import InputError

_PAIRED = ", paired with an input that provides further context"
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:"
)
Columns = Literal["any", "own", "text", "pairs", "messages", "sharegpt", "alpaca", "question", "instruction"]
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What some columns hold.

    Args:
      kind: `"text"`, `"pairs"` or `"chat"`.
      fields: the columns that every row has.
      take: makes an item of a row; what its errors call the row comes first.
      said: the columns in words.
    """

    kind: str
    fields: tuple[str, ...]
    take: Callable[[str, Mapping[str, Any]], Any]
    said: str = ""


def _pair(*fields: str) -> Layout:
    return Layout("pairs", fields, lambda where, row: _texts(where, row, fields), f"pairs of the columns {', '.join(fields)}")


def _alpaca(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    instruction, given, output = _texts(where, {"input": "", **row}, ("instruction", "input", "output"))
    more = {"paired": _PAIRED, "input": f"### Input:\n{given}\n\n"} if given else {"paired": "", "input": ""}
    return _ALPACA.format(instruction=instruction, **more), output


def _sharegpt(where: str, row: Mapping[str, Any]) -> list[Any]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError(f"{where}: 'conversations' must be a list of objects with a from and a value, not {turns!r:.80}")
    for turn in turns:
        if turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
            raise InputError(
                f"{where}: each turn must be from {', '.join(_ROLES)} and have a text as its value, not {turn!r:.80}; where "
                "they have a role and a content, give --messages-field conversations"
            )
    return [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in turns]


def _texts(where: str, row: Mapping[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    values = tuple("" if row[field] is None else row[field] for field in fields)
    for field, value in zip(fields, values):
        if not isinstance(value, str):
            raise InputError(f"{where}: {field!r} must be a text, not {type(value).__name__}")
    return values


_OTHERS = {
    "sharegpt": Layout("chat", ("conversations",), _sharegpt, "chats of the column conversations (ShareGPT)"),
    "alpaca": Layout(
        "pairs", ("instruction", "output"), _alpaca, "pairs by Alpaca's template, of instruction, input and output"
    ),
    "question": _pair("question", "answer"),
    "instruction": _pair("instruction", "response"),
}


def own(text: str, pair: tuple[str, str], messages: str) -> dict[str, Layout]:
    """The library's own layouts, with these names of the columns."""
    return {
        "text": Layout("text", (text,), lambda where, row: _texts(where, row, (text,))[0], f"texts of the column {text}"),
        "pairs": _pair(*pair),
        "messages": Layout("chat", (messages,), lambda where, row: row[messages], f"chats of the column {messages}"),
    }


_DEFAULT = own("text", ("prompt", "completion"), "messages")


def find(file: pathlib.Path, present: Sequence[str], named: Mapping[str, Layout], columns: str) -> Layout:
    """The layout of a table.

    Args:
      file: the table, for errors.
      present: its columns.
      named: the library's own layouts; of those whose names were chosen one must be there.
      columns: one of `Columns`.

    Raises:
      InputError: the columns are those of no layout, or of several.
    """
    chosen = {name: layout for name, layout in named.items() if layout.fields != _DEFAULT[name].fields}
    every = {"any": chosen or {**named, **_OTHERS}, "own": named}
    wanted = every[columns] if columns in every else {columns: {**named, **_OTHERS}[columns]}
    found = [name for name, layout in wanted.items() if set(layout.fields) <= set(present)]
    if len(found) > 1:
        raise InputError(
            f"{file} has the columns of several kinds of data, {' and '.join(found)}: say which by --columns {found[0]}, say"
        )
    if not found:
        needed = "; ".join(" and ".join(map(repr, layout.fields)) for layout in wanted.values())
        columns = ", ".join(map(repr, present)) or "none"
        raise InputError(f"{file} must have the columns of one kind of data: {needed}; its columns are {columns}")
    return wanted[found[0]]

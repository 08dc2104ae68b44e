"""Chat templates: messages as the text that a model was trained on, and where in it the assistant speaks."""

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from lora_jax.core.errors import InputError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
_ROLES = ("system", "user", "assistant", "tool")
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode keeps these two free for use inside a program


class Written(NamedTuple):
    """A text as a chat template writes it.

    Args:
      text: the text.
      spans: `text[start:end]` are the assistant's turns to learn.
      unprompted: how many of them do not follow the template's prompt for the assistant, but an earlier part of it.
    """

    text: str
    spans: tuple[Span, ...]
    unprompted: int


class ChatTemplate:
    """A Jinja chat template of a tokenizer, rendered in a sandbox as `transformers` does.

    Args:
      source: the template.
      special_tokens: what it knows as `bos_token`, `eos_token` and so on.
      today: what `strftime_now` tells it.

    Raises:
      InputError: the template is not Jinja.

    >>> talk = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    >>> template = ChatTemplate(talk + "{% if add_generation_prompt %}<assistant>{% endif %}", {}, datetime.date(2025, 1, 1))
    >>> [chat] = template.turns([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    >>> chat.text, [chat.text[start:end] for start, end in chat.spans]
    ('<user>Hi</><assistant>Hello</>', ['Hello</>'])
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], today: datetime.date):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = today.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template is not a Jinja template: {error}") from None
        self._source, self._special_tokens = source, dict(special_tokens)
        self._tools: Any = None
        self.marked = any(node.identifier.endswith("_Generation") for node in _extension_calls(environment, source))

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> "ChatTemplate":
        """The same, told of these tools: a list of JSON schemas, which many templates write before the first message."""
        told = copy.copy(self)
        told._tools = tools
        return told

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of the messages; with `add_generation_prompt`, up to where the assistant is to speak.

        Raises:
          InputError: the template does not take these messages.
        """
        self._check(messages)
        return self._render(messages, add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def turns(self, messages: Messages) -> list[Written]:
        """The texts from which the assistant's turns are learnt, each turn from one of them.

        Templates with `{% generation %}` marks say themselves where the turns are, in the text of all messages. In others a
        turn is what the template adds to the messages before it and the prompt for the assistant, while no message follows: so
        it is learnt as it is to be said. One text has all turns, unless the template writes a turn in another way once more
        follows (it takes the thinking away, or ends it otherwise): then the next turn has a text of its own.

        Where the prompt opens a thinking that the template does not write in turns (DeepSeek-R1), a message that begins with
        that opening follows the prompt as it is; another one follows what comes before the opening.

        Raises:
          InputError: the template does not take these messages, or writes those before a turn in another way once the turn is
            there, so that it has no certain beginning.
        """
        self._check(messages)
        if self.marked:
            return [_marked(self._render(messages, False))]
        found: list[Written] = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                turn = self._turn(messages, i)
                earlier = found.pop() if found and turn.text.startswith(found[-1].text) else Written("", (), 0)
                found.append(Written(turn.text, earlier.spans + turn.spans, earlier.unprompted + turn.unprompted))
        return found

    def _turn(self, messages: Messages, i: int) -> Written:
        """The messages up to the assistant's turn `i`, of which that turn alone is learnt."""
        before, after = self._prompt(messages, i), self.render(messages[: i + 1])
        if after.startswith(before):
            return Written(after, ((len(before), len(after)),), 0)
        shown = self._render([*messages[:i], {**messages[i], "content": _OPEN}], False)
        begin = _shared(before, shown)  # not with `after`: what is said may begin as the opening does
        if not (after.startswith(before[:begin]) and before[:begin].startswith(self.render(messages[:i]))):
            place = _shared(before, after)
            raise InputError(
                f"the chat template writes what is before the assistant's turn (message {i + 1}) in another way once that is "
                f"there ({before[place:][:20]!r} becomes {after[place:][:20]!r}), so it has no certain beginning: put "
                "{% generation %} and {% endgeneration %} around the turn in the template"
            )
        said, opening = messages[i].get("content") or "", before[begin:]
        for written in (opening, opening.rstrip()):
            if written and said.startswith(written):
                text = before + said.removeprefix(written) + shown.partition(_OPEN)[2]
                return Written(text, ((len(before), len(text)),), 0)
        return Written(after, ((begin, len(after)),), 1)

    def _prompt(self, messages: Messages, i: int) -> str:
        """The text up to where the assistant is to say message `i`."""
        try:
            return self.render(messages[:i], add_generation_prompt=True)
        except InputError as error:
            raise InputError(
                f"where the assistant's turn (message {i + 1}) begins can't be found from the messages before it: {error}"
            ) from None

    def _check(self, messages: Messages) -> None:
        """Raise an InputError for what a template would write without a word."""
        plain = json.dumps(list(messages), ensure_ascii=False)
        if _OPEN in plain or _CLOSE in plain:
            raise InputError("a message holds U+FDD0 or U+FDD1, which are no characters: remove them")
        for role in (message["role"] for message in messages if "role" in message):
            if role not in _ROLES and not any(quote + role + quote in self._source for quote in "'\""):
                raise InputError(f"there is no role {role!r}, but {', '.join(_ROLES)} and those that the chat template names")

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=self._tools,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # a template can raise whatever Python can
            raise InputError(f"the chat template does not take these messages: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: puts marks around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _extension_calls(environment: jinja2.Environment, source: str) -> Any:
    return environment.parse(source).find_all(jinja2.nodes.ExtensionAttribute)


def _marked(marked: str) -> Written:
    pieces, spans, length, start = [], [], 0, None
    for part in marked.replace(_CLOSE, _OPEN).split(_OPEN):
        pieces.append(part)
        if start is not None:
            spans.append((start, length + len(part)))
        length += len(part)
        start = length if start is None else None
    return Written("".join(pieces), tuple(spans), 0)


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})

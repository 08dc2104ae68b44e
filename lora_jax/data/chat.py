"""Chat templates: messages as the text that a model was trained on, and where in it the assistant speaks."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from lora_jax.core.errors import InputError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode keeps these two free for use inside a program


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
    >>> text, spans = template.turns([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    >>> text, [text[start:end] for start, end in spans]
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
        self._special_tokens = dict(special_tokens)
        self.marked = any(node.identifier.endswith("_Generation") for node in _extension_calls(environment, source))

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The text of the messages; with `add_generation_prompt`, up to where the assistant is to speak.

        Raises:
          InputError: the template does not take these messages.
        """
        return self._render(messages, add_generation_prompt).replace(_OPEN, "").replace(_CLOSE, "")

    def turns(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text of the messages, and the spans `text[start:end]` of the assistant's turns in it.

        Templates with `{% generation %}` marks say themselves where these are. In others a turn begins where the text of the
        messages before it ends, the prompt for the assistant included, and goes to the end of the text up to its message.

        Raises:
          InputError: the template does not take these messages, or its text of the first messages does not begin its text
            of more messages, so that a turn has no certain place.
        """
        if self.marked:
            return _marked_spans(self._render(messages, False))
        text, spans = self.render(messages), []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], add_generation_prompt=True)
            after = self.render(messages[: i + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise InputError(
                    f"the chat template writes the first {i + 1} messages in another way when more follow, so the place of the "
                    "assistant's turn is not certain: put {% generation %} and {% endgeneration %} around it in the template"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        plain = json.dumps(list(messages), ensure_ascii=False)
        if _OPEN in plain or _CLOSE in plain:
            raise InputError("a message holds U+FDD0 or U+FDD1, which are no characters: remove them")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
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


def _marked_spans(marked: str) -> tuple[str, list[Span]]:
    pieces, spans, length, start = [], [], 0, None
    for part in marked.replace(_CLOSE, _OPEN).split(_OPEN):
        pieces.append(part)
        if start is not None:
            spans.append((start, length + len(part)))
        length += len(part)
        start = length if start is None else None
    return "".join(pieces), spans


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """Jinja's own filter would escape HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})

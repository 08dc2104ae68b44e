"""A chat with the models of runs, in a terminal or through pipes: what `lora-jax chat` does."""

import argparse
import dataclasses
import datetime
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tokenizers.decoders

from lora_jax.adapters import algebra
from lora_jax.command import arguments, run, several
from lora_jax.command.options import DrawOptions
from lora_jax.command.tasks import lm
from lora_jax.core.adapter import Adapter, LowRank, attach
from lora_jax.core.errors import InputError
from lora_jax.data.chat import ChatTemplate
from lora_jax.data.tokenizer import opening
from lora_jax.models import llama
from lora_jax.training import many

_HELP = """\
/adapter NAME or NUMBER   go on with the adapters of that run; /adapter none: with the base alone; /adapter: list them
/reset                    begin a new conversation
/system TEXT              begin one with this message of the system; without a text: with none
/quit                     end (or Ctrl-D); Ctrl-C stops an answer
"""


def chat_command(line: argparse.Namespace) -> int:
    """`lora-jax chat`; returns the exit code."""
    one = prepare(line.runs, DrawOptions(**arguments.given(line, DrawOptions)))
    say("/help lists the commands")
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            say("\n/quit ends")
            continue
        if text.strip() == "/quit":
            return 0
        try:
            one.hear(text.strip())
        except InputError as error:
            say(f"lora-jax: {error}")


def say(text: str) -> None:
    """Write a line that is no answer."""
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Chat:
    """A conversation.

    Args:
      base: the model of all runs.
      template: of its chats.
      ends: the ids that end an answer.
      members: its parameters with the adapters of each run, by name, and as `"none"` with ones that change nothing: trees of
        one structure, so that one program is for all.
      how: how tokens are chosen, and the system's message.
      adapter: which member answers.
      messages: what was said after the system's message.
    """

    base: lm.Base
    template: ChatTemplate
    ends: tuple[int, ...]
    members: Mapping[str, Any]
    how: DrawOptions
    adapter: str
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def hear(self, text: str) -> None:
        """Do what a line says: a command, or something to answer.

        Raises:
          InputError: there is no such command or run, or the conversation is too long; nothing has changed then.
        """
        command, _, argument = text.partition(" ")
        if command == "/help":
            say(_HELP)
        elif command == "/reset":
            self.messages = []
        elif command == "/system":
            self.how, self.messages = dataclasses.replace(self.how, system=argument.strip() or None), []
        elif command == "/adapter":
            self.switch(argument.strip())
        elif text.startswith("/"):
            raise InputError(f"there is no command {command}: /help lists them")
        elif text:
            self.answer(text)

    def switch(self, name: str) -> None:
        """Let the adapters of another run answer, by its name or number.

        Raises:
          InputError: there is no such run.
        """
        runs = [own for own in self.members if own != "none"]
        if name in self.members:
            self.adapter = name
        elif name.isdecimal() and 1 <= int(name) <= len(runs):
            self.adapter = runs[int(name) - 1]
        elif name:
            raise InputError(f"there are no adapters {name!r}, but {', '.join(self.members)}")
        listed = [f"{i} {own}" for i, own in enumerate(runs, 1)]
        say(f"adapter: {self.adapter} (of {', '.join([*listed, 'none'])})")

    def answer(self, text: str) -> None:
        """Write the answer as it comes.

        Raises:
          InputError: the conversation is too long, or the template does not take it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        written = self.template.render([*opening(self.how.system), *messages], add_generation_prompt=True)
        [ids] = self.base.tokenizer.ids([written], special=False)
        positions = self.base.model.config.max_position_embeddings
        if len(ids) + self.how.max_new_tokens > positions:
            raise InputError(
                f"the conversation's {len(ids)} tokens and {self.how.max_new_tokens} new ones are more than the model's "
                f"{positions} positions: /reset begins a new one"
            )
        said = ""
        try:
            for piece in self._pieces(ids):
                print(piece, end="", flush=True)
                said += piece
        except KeyboardInterrupt:
            say(" (stopped)")
        print(flush=True)
        self.messages = [*messages, {"role": "assistant", "content": said}]

    def _pieces(self, ids: np.ndarray) -> Iterator[str]:
        """What is said, as soon as its characters are whole."""
        tokenizer, new, shown = self.base.tokenizer.tokenizer, [], ""
        pieces = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        key = jax.random.fold_in(jax.random.key(self.how.seed), len(self.messages))
        options: Any = {"max_new_tokens": self.how.max_new_tokens, "temperature": self.how.temperature, "key": key}
        for token in llama.stream(self.base.model.model, self.members[self.adapter], ids, eos_ids=self.ends, **options):
            if token in self.ends:
                break
            new.append(token)
            piece = pieces.step(tokenizer, token) or ""
            shown += piece
            yield piece
        yield tokenizer.decode(new, skip_special_tokens=True).removeprefix(shown)  # a character that was cut off


def prepare(directories: Sequence[pathlib.Path], how: DrawOptions) -> Chat:
    """A conversation with the base of some runs, the adapters of the first answering.

    Raises:
      InputError: there is no such run, one does not go with the first, is of another task or has no checkpoint, or there is no
        chat template.
    """
    base, ends = several.with_decoder(directories, "chat")
    names = _names(directories)
    template = base.tokenizer.chat(datetime.date.today())
    variables = base.model.variables
    sets = _alike([run.load_adapters(directory, variables) for directory in directories])
    members = dict(zip(names, sets)) | {"none": many.neutral(variables, sets[0])}
    attached = {name: attach(variables, own) for name, own in members.items()}
    return Chat(base, template, ends, attached, how, names[0])


def _names(directories: Sequence[pathlib.Path]) -> list[str]:
    """The runs' names: those of their directories, or as they were given where two have the same."""
    names = [directory.absolute().name for directory in directories]
    return names if len({*names, "none"}) > len(names) else [str(directory) for directory in directories]


def _alike(sets: Sequence[Mapping[str, Adapter]]) -> list[dict[str, Adapter]]:
    """Adapter sets of one structure, for one program.

    Raises:
      InputError: some have magnitudes, biases or whole parameters where others have not.
    """
    rank = max((a.rank for one in sets for a in one.values() if isinstance(a, LowRank)), default=1)
    return many.unstack(many.stack([algebra.pad_rank(algebra.fold_scale(one), rank) for one in sets]))

"""Text from a finished run of the task `lm`: what `lora-jax generate` does."""

import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.command import run
from lora_jax.command.inspect import load_adapters
from lora_jax.command.tasks import lm
from lora_jax.command.tasks.registry import check_task
from lora_jax.core.adapter import attach
from lora_jax.core.errors import InputError
from lora_jax.models import llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to go on from a prompt.

    Args:
      max_new_tokens: at most this many tokens.
      temperature: 0 takes the most likely token; above 0, tokens are drawn from softmax(logits / temperature).
      seed: of the draws.
      chat: the prompt is what a user says, written with the model's chat template.
      base: without the run's adapters.

    Raises:
      InputError: an option is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    base: bool = False

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"--temperature must be at least 0 and finite, not {self.temperature}")
        if self.seed < 0:
            raise InputError(f"--seed must be at least 0, not {self.seed}")


def generate(directory: pathlib.Path, prompt: str, options: Options) -> str:
    """What the run's model writes after the prompt; without `chat`, the prompt stands before it.

    Raises:
      InputError: there is no such run, it is of another task, it has no checkpoint yet, its base model is gone or changed, the
        prompt is empty or too long, or there is no chat template.
    """
    config = run.read_config(directory)
    check_task(config, "lm")
    base = lm.load_base(lm.base_directory(config), config)
    variables: Any = base.model.variables
    if not options.base:
        variables = attach(variables, load_adapters(directory, variables))
    ids = base.tokenizer.prompt(prompt, chat=options.chat)
    positions = base.model.config.max_position_embeddings
    if len(ids) + options.max_new_tokens > positions:
        raise InputError(
            f"the prompt's {len(ids)} tokens and {options.max_new_tokens} new ones are more than the model's {positions} "
            "positions: shorten the prompt, or lower --max-new-tokens"
        )
    found = llama.generate(
        base.model.model,
        variables,
        jnp.asarray(ids)[None],
        max_new_tokens=options.max_new_tokens,
        eos_ids=lm.end_ids(base),
        temperature=options.temperature,
        key=jax.random.key(options.seed),
    )
    return _text(base, ids, np.asarray(found.tokens[0])[: int(found.lengths[0])], options.chat)


def _text(base: lm.Base, prompt: np.ndarray, new: np.ndarray, chat: bool) -> str:
    """Decoded together with the prompt where it is shown: a tokenizer may drop the space of a text's first word."""
    shown = new if chat else np.concatenate([prompt, new])
    return base.tokenizer.tokenizer.decode(shown.tolist(), skip_special_tokens=True)

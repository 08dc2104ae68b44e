"""Text from a finished run of the task `lm`: what `lora-jax generate` does."""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.command import options, run
from lora_jax.command.options import GenerateOptions
from lora_jax.command.tasks import lm
from lora_jax.command.tasks.registry import check_task
from lora_jax.core.adapter import attach
from lora_jax.core.errors import InputError
from lora_jax.models import llama


def generate_command(line: argparse.Namespace) -> int:
    """`lora-jax generate`; returns the exit code."""
    print(generate(line.run, line.prompt, GenerateOptions(**options.given(line, GenerateOptions))))
    return 0


def generate(directory: pathlib.Path, prompt: str, how: GenerateOptions) -> str:
    """What the run's model writes after the prompt; without `chat`, the prompt stands before it.

    Raises:
      InputError: there is no such run, it is of another task, it has no checkpoint yet, its base model is gone or changed, the
        prompt is empty or too long, or there is no chat template.
    """
    config = run.read_config(directory)
    check_task(config, "lm")
    base = lm.load_base(lm.base_directory(config), config, own=run.own_base(directory))
    variables: Any = base.model.variables
    if not how.base:
        variables = attach(variables, run.load_adapters(directory, variables))
    ids = base.tokenizer.prompt(prompt, chat=how.chat)
    positions = base.model.config.max_position_embeddings
    if len(ids) + how.max_new_tokens > positions:
        raise InputError(
            f"the prompt's {len(ids)} tokens and {how.max_new_tokens} new ones are more than the model's {positions} "
            "positions: shorten the prompt, or lower --max-new-tokens"
        )
    ends = lm.end_ids(base, config)
    found = llama.generate(
        base.model.model,
        variables,
        jnp.asarray(ids)[None],
        max_new_tokens=how.max_new_tokens,
        eos_ids=ends,
        temperature=how.temperature,
        key=jax.random.key(how.seed),
    )
    new = np.asarray(found.tokens[0])[: int(found.lengths[0])]
    return _text(base, ids, new[:-1] if new[-1] in ends else new, how.chat)


def _text(base: lm.Base, prompt: np.ndarray, new: np.ndarray, chat: bool) -> str:
    """Decoded together with the prompt where it is shown: a tokenizer may drop the space of a text's first word."""
    shown = new if chat else np.concatenate([prompt, new])
    return base.tokenizer.tokenizer.decode(shown.tolist(), skip_special_tokens=True)

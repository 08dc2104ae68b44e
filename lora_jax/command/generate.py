"""Text from finished runs with a decoder: what `lora-jax generate` does."""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import algebra
from lora_jax.command import arguments, run, several
from lora_jax.command.options import GenerateOptions
from lora_jax.command.tasks import lm
from lora_jax.core.adapter import attach
from lora_jax.core.errors import InputError
from lora_jax.models import llama
from lora_jax.training import many


def generate_command(line: argparse.Namespace) -> int:
    """`lora-jax generate`; returns the exit code."""
    found = generate_all(line.runs, line.prompt, GenerateOptions(**arguments.given(line, GenerateOptions)))
    if len(line.runs) == 1 == len(line.prompt):
        print(found[0][0])
        return 0
    for directory, texts in zip(line.runs, found):
        for number, text in enumerate(texts, 1):
            print(f"--- {directory}, prompt {number}\n{text}")
    return 0


def generate(directory: pathlib.Path, prompt: str, how: GenerateOptions) -> str:
    """What the run's model writes after the prompt; without `chat`, the prompt stands before it.

    Raises:
      InputError: as `generate_all`.
    """
    return generate_all([directory], [prompt], how)[0][0]


def generate_all(directories: Sequence[pathlib.Path], prompts: Sequence[str], how: GenerateOptions) -> list[list[str]]:
    """What the model of each run writes after each prompt, all in one batch.

    Raises:
      InputError: there is no such run, it is of another task, it has no checkpoint yet, its base model is gone or changed, it
        does not go with the first one, a prompt is empty or too long, or there is no chat template.
    """
    if how.base and len(directories) > 1:
        raise InputError("--base leaves the adapters out, by which alone runs on one base differ: name one run")
    base, ends = several.with_decoder(directories, "generate")
    ids = [base.tokenizer.prompt(prompt, chat=how.chat, system=how.system) for prompt in prompts]
    length, positions = max(map(len, ids)), base.model.config.max_position_embeddings
    if length + how.max_new_tokens > positions:
        raise InputError(
            f"the prompt's {length} tokens and {how.max_new_tokens} new ones are more than the model's {positions} "
            "positions: shorten the prompt, or lower --max-new-tokens"
        )
    rows = ids * len(directories)
    options: Any = {"max_new_tokens": how.max_new_tokens, "eos_ids": ends, "temperature": how.temperature}
    params = _parameters(base.model.variables, directories, how, len(prompts))
    begun = time.perf_counter()
    found = llama.generate(base.model.model, params, *lm.padded(rows, length), key=jax.random.key(how.seed), **options)
    new = [row[:size] for row, size in zip(np.asarray(found.tokens), np.asarray(found.lengths))]
    if len(rows) > 1:
        _say_rate(sum(map(len, new)), time.perf_counter() - begun)
    texts = [_text(base, prompt, own[:-1] if own[-1] in ends else own, how.chat) for prompt, own in zip(rows, new)]
    return [texts[start : start + len(prompts)] for start in range(0, len(texts), len(prompts))]


def _parameters(variables: Any, directories: Sequence[pathlib.Path], how: GenerateOptions, prompts: int) -> Any:
    """The base's parameters with the adapters of the run, or of the run that each row is of."""
    if how.base:
        return variables
    sets = [run.load_adapters(directory, variables) for directory in directories]
    if len(sets) == 1:
        return attach(variables, sets[0])
    stacked = many.stack([algebra.fold_scale(one) for one in sets])
    return llama.RowAdapters(variables, stacked, jnp.repeat(jnp.arange(len(sets)), prompts))


def _say_rate(tokens: int, seconds: float) -> None:
    rate = f"{tokens / seconds:,.1f} tokens a second"
    print(f"lora-jax: note: {tokens:,} tokens in {seconds:.1f} s, compilation included: {rate}", file=sys.stderr)


def _text(base: lm.Base, prompt: np.ndarray, new: np.ndarray, chat: bool) -> str:
    """Decoded together with the prompt where it is shown: a tokenizer may drop the space of a text's first word."""
    shown = new if chat else np.concatenate([prompt, new])
    return base.tokenizer.tokenizer.decode(shown.tolist(), skip_special_tokens=True)

"""Completions that a run writes, compared with those of a file."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import lm
from lora_jax.core.errors import InputError
from lora_jax.models import llama

_ROWS = 8


def read(config: RunConfig, file: pathlib.Path) -> Sequence[tuple[str, str]]:
    """The prompts and completions of a file.

    Raises:
      InputError: the run is not of language, or the file has none.
    """
    corpus = lm.read(config, str(file)) if config.task == "lm" else None
    if corpus is None or corpus.kind != "pairs":
        raise InputError(
            f"--exact-match is for runs of --task lm and files with the columns {config.prompt_field!r} and "
            f"{config.completion_field!r}, of which {file} and a run of {config.task!r} are not: leave it out"
        )
    return corpus.items


def measure(config: RunConfig, base: lm.Base, params: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The share of completions that are, but for spaces around them, what the model writes, the most likely token each time.

    Args:
      config: the run's options.
      base: its base.
      params: the base's parameters with adapters.
      pairs: prompts and completions.

    Raises:
      InputError: a prompt and its completion are longer than the model's positions.
    """
    prompts = base.tokenizer.ids([prompt for prompt, _ in pairs])
    wanted = [completion for _, completion in pairs]
    count = 1 + max(map(len, base.tokenizer.ids(wanted, special=False)))
    length, positions = max(1, *map(len, prompts)), base.model.config.max_position_embeddings
    if not all(map(len, prompts)):
        raise InputError("there is an empty prompt, from which nothing can be written: leave --exact-match out")
    if length + count > positions:
        raise InputError(
            f"there are prompts of up to {length} tokens and completions of up to {count}, which are more than the model's "
            f"{positions} positions: leave --exact-match out"
        )
    ends, said = lm.end_ids(base, config), []
    for start in range(0, len(pairs), _ROWS):
        rows = [prompts[i % len(pairs)] for i in range(start, start + _ROWS)]
        ids, mask = lm.padded(rows, length)
        found = llama.generate(base.model.model, params, ids, mask, max_new_tokens=count, eos_ids=ends)
        new = [row[:size] for row, size in zip(np.asarray(found.tokens), np.asarray(found.lengths))]
        said += base.tokenizer.tokenizer.decode_batch([row[~np.isin(row, ends)].tolist() for row in new])
    same = [one.strip() == other.strip() for one, other in zip(said, wanted)]
    return {"exact_match": sum(same) / len(same)}

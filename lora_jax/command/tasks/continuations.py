"""What a decoder writes after held-out prompts, for the report of a run.

It is few tokens of few prompts, so compiling is what takes time: each token is written by a program that reads the whole row.
"""

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.command.tasks.base import Evaluate, Examples
from lora_jax.core.transform import lora
from lora_jax.data.language import Document
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.models import llama

_PROMPTS, _LONGEST, _NEW = 2, 16, 8


def examples(
    tokenizer: TextTokenizer,
    model: llama.Loaded,
    ends: Collection[int],
    mesh: Mesh | None,
    documents: Sequence[Document],
    begins: Sequence[int],
) -> Examples:
    """The documents with the shortest prompts, the most likely token each time.

    Args:
      tokenizer: of the model.
      model: the base.
      ends: the ids after which nothing more is shown.
      mesh: the devices.
      documents: those that are held out; one of which nothing is learnt is not shown, and short ones are only if there are no
        others.
      begins: where in each the model writes; of longer prompts it sees the end.
    """
    positions = model.config.max_position_embeddings
    longest, count = min(_LONGEST, positions // 2), min(_NEW, positions // 2)
    learnt = [row for row, document in enumerate(documents) if document.targets.any()]
    rows = sorted(learnt, key=lambda row: (len(documents[row].tokens) < begins[row] + count, begins[row]))[:_PROMPTS]
    prompts = [documents[row].tokens[max(0, begins[row] - longest) : begins[row]] for row in rows]
    shown = []
    for row, prompt in zip(rows, prompts):
        text, own = parts(tokenizer, documents[row].tokens[begins[row] - len(prompt) :][: len(prompt) + count], len(prompt))
        shown.append({"prompt": text, "own": own})
    ids, mask = _padded(prompts, longest + count, sharding.round_up(mesh, len(prompts)))
    best = functools.partial(_best, model)

    def answer(evaluate: Evaluate) -> list[str]:
        batch = {"ids": ids, "mask": mask}
        for _ in range(count if prompts else 0):
            new = {"ids": evaluate(best, batch), "mask": np.ones(len(ids), np.int32)}
            batch = {name: np.concatenate([batch[name][:, 1:], new[name][:, None]], 1) for name in batch}
        found = zip(prompts, batch["ids"][:, -count:])
        return [parts(tokenizer, np.concatenate([prompt, _ended(row, ends)]), len(prompt))[1] for prompt, row in found]

    return Examples(kind="texts", shown=shown, answer=answer)


def parts(tokenizer: TextTokenizer, tokens: np.ndarray, begin: int) -> tuple[str, str]:
    """The text before a token and from there on: decoded together, since a tokenizer may drop a text's first space."""
    prompt, whole = (tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in (tokens[:begin], tokens))
    return prompt, whole[len(prompt) :]


def _padded(prompts: Sequence[np.ndarray], length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The prompts again and again up to so many rows, padded on the left, and which of it are tokens."""
    ids, mask = np.zeros((2, count, length), np.int32)
    for i in range(count):
        prompt = prompts[i % len(prompts)]
        ids[i, length - len(prompt) :], mask[i, length - len(prompt) :] = prompt, 1
    return ids, mask


def _ended(row: np.ndarray, ends: Collection[int]) -> np.ndarray:
    """The tokens before the first that ends the text."""
    return row[: int(np.argmax(is_end))] if (is_end := np.isin(row, list(ends))).any() else row


def _best(model: llama.Loaded, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The most likely token after each row, `(rows,)`."""
    logits = lora(model.apply)(params, batch["ids"], batch["mask"], last_only=True)
    return logits[:, -1].argmax(-1).astype(jnp.int32)

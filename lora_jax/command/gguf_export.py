"""Runs as GGUF files, which llama.cpp puts on their base with `--lora`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from lora_jax import peft
from lora_jax.command import run
from lora_jax.command.options import DECODERS, RunConfig
from lora_jax.command.tasks import lm
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.models import gguf_config, llama

FILE = "adapter.gguf"
_TIED = ("model.embed_tokens.weight", "lm_head.weight")
_OWN = "the run has a tokenizer or chat template of its own, which is not in the file: llama.cpp takes those of the base"


def check(directory: pathlib.Path, config: RunConfig) -> None:
    """Raise an InputError if llama.cpp has nothing like a run's model; its weights are not read."""
    if config.task not in DECODERS:
        raise InputError(
            f"--format gguf is for language models, and {directory} is of the task {config.task!r}: export it with --format "
            "peft or merged"
        )
    own = run.own_base(directory)
    if own is not None and run.own_embeddings(own):
        raise InputError(
            f"{directory} has embeddings of a vocabulary of its own, which no adapter of llama.cpp can bring: export the whole "
            "model with --format merged, and convert that"
        )
    gguf_config.architecture(lm.sizes(config))


def write(out: pathlib.Path, config: RunConfig, base: Any, adapters: Mapping[str, Adapter], name: str) -> tuple[str, ...]:
    """Write `FILE` into a directory; returns what the user should know about it.

    Args:
      out: the directory.
      config: the run's.
      base: its base, whose family is one that llama.cpp knows.
      adapters: the run's.
      name: what the base is called.

    Raises:
      InputError: llama.cpp has no such adapters.
    """
    fields = llama.gguf_fields(base.model)
    untied = [path for path in adapters if config.untie and fields["names"][path].name.endswith(_TIED)]
    if untied:
        raise InputError(
            f"{untied[0]} has an adapter, and in the base's GGUF file the head is the embedding, which this run has untied: "
            "export the whole model with --format merged, and convert that"
        )
    peft.save_gguf(out / FILE, adapters, **fields, base_model=name)
    return () if base.own is None else (_OWN,)

"""What an adapter directory has in place of its base's own: a tokenizer, a chat template, another vocabulary's embeddings."""

import pathlib
import shutil
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers

from lora_jax.command import hf_export, run
from lora_jax.command.tasks import lm
from lora_jax.core import files
from lora_jax.core.errors import InputError
from lora_jax.data import tokenizer as text_tokenizer
from lora_jax.huggingface import checkpoint_files
from lora_jax.models import gguf_files
from lora_jax.peft import files as peft_files

_ADDED = "added_tokens.json"


def own_files(source: pathlib.Path, model: pathlib.Path) -> list[str]:
    """The files of a tokenizer in a PEFT directory that the base has not, or has otherwise.

    Raises:
      InputError: one can't be read.
    """
    return [name for name in checkpoint_files.TOKENIZER if (source / name).is_file() and not _is_same(source, model, name)]


def keep(source: pathlib.Path, model: pathlib.Path, base: Any, directory: pathlib.Path) -> tuple[str, ...]:
    """Copy what is the adapters' own into a directory that a base is loaded with, if there is anything.

    Args:
      source: the PEFT directory.
      model: the base's directory or `.gguf` file.
      base: what was loaded from it.
      directory: to be made; it has all files of a tokenizer then, of the base those that the adapters lack.

    Returns:
      What is kept, in words: nothing if there is nothing.

    Raises:
      InputError: a file is damaged, or the tokens have no embeddings.
    """
    names = own_files(source, model)
    tensors = _embeddings(source, base) if isinstance(base, lm.Base) else {}
    if not names and not tensors:
        return ()
    directory.mkdir()
    hf_export.write_tokenizer(directory, model, base.tokenizer)
    for name in names:
        shutil.copyfile(source / name, directory / name)
    made = _tokenizer(source, directory, names)
    rows = max((len(tensor) for tensor in tensors.values()), default=base.model.config.vocab_size)
    if (largest := max(made.get_vocab().values(), default=-1)) >= rows:
        raise InputError(
            f"{source} has a token of the id {largest}, but there are embeddings of {rows} tokens only: save the adapters with "
            "theirs (save_embedding_layers=True)"
        )
    notes = []
    if names:
        notes.append(f"the adapters have their own {', '.join(names)}: kept with the run, and used in place of the base's")
    if tensors:
        safetensors.numpy.save_file(tensors, directory / run.EMBEDDINGS)
        known = base.model.config.vocab_size
        notes.append(f"the adapters have embeddings of {rows:,} tokens, the base of {known:,}: theirs are kept and used")
    return (*notes, *_keep_template(source, model, directory))


def _is_same(source: pathlib.Path, model: pathlib.Path, name: str) -> bool:
    """Whether the base has this very file."""
    with files.reading(source / name):
        return (model / name).is_file() and (model / name).read_bytes() == (source / name).read_bytes()


def _tokenizer(source: pathlib.Path, directory: pathlib.Path, names: list[str]) -> tokenizers.Tokenizer:
    """The tokenizer; a file of added tokens that has none beside it adds them to the base's."""
    if text_tokenizer.TOKENS in names:
        return text_tokenizer.read_tokenizer(source)
    made = text_tokenizer.read_tokenizer(directory)
    if _ADDED in names:
        wanted = files.read_json_object(source / _ADDED)
        known = made.get_vocab()
        for token, place in sorted(wanted.items(), key=lambda item: str(item[1]).zfill(20)):
            made.add_tokens([tokenizers.AddedToken(token, normalized=False, special=True)] if token not in known else [])
            if made.token_to_id(token) != place:
                raise InputError(
                    f"{source / _ADDED} gives {token!r} the id {place!r}, but in the base's tokenizer it is "
                    f"{made.token_to_id(token)}: save the adapters with their {text_tokenizer.TOKENS}"
                )
        made.save(str(directory / text_tokenizer.TOKENS))
    return made


def _keep_template(source: pathlib.Path, model: pathlib.Path, directory: pathlib.Path) -> tuple[str, ...]:
    """The adapters' template, or else the base's, as a file of its own, which counts before all others."""
    theirs = text_tokenizer.read_template(source)
    ours = gguf_files.chat_template(model) if model.is_file() else text_tokenizer.read_template(model)
    template = ours if theirs is None else theirs
    if template is not None:
        (directory / text_tokenizer.TEMPLATE).write_text(template, encoding="utf-8")
    if None in (theirs, ours) or theirs == ours:
        return ()
    return (f"the adapters' chat template differs from that of {model}: chats are written with the adapters'",)


def _embeddings(source: pathlib.Path, base: lm.Base) -> dict[str, np.ndarray]:
    """The embedding and the head in an adapter file, by their names, if they are of another size than the base's."""
    _, tensors = peft_files.read(source)
    found = {}
    for name in (base.model.names["params/embed_tokens/embedding"].name, "lm_head.weight"):
        tensor = tensors.get(name, tensors.get(f"{name.removesuffix('.weight')}.base_layer.weight"))
        if tensor is not None and len(tensor) != base.model.config.vocab_size:
            found[name] = np.ascontiguousarray(tensor)
    return found

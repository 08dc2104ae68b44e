"""Hugging Face model directories, written so that they are there in full or not at all."""

import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers

from lora_jax.adapters.merging import merge
from lora_jax.core import files, paths
from lora_jax.core.adapter import Adapter
from lora_jax.data.tokenizer import TextTokenizer
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.huggingface.names import HFName
from lora_jax.models import families, gguf_files, llama
from lora_jax.models.decoder_config import DecoderConfig

_DTYPES: dict[Any, Any] = {"F64": jnp.float64, "F32": jnp.float32, "F16": jnp.float16, "BF16": jnp.bfloat16}
_OWN: dict[Any, Any] = {jnp.dtype(dtype).name: dtype for dtype in _DTYPES.values()}
SHARD_BYTES = 5_000_000_000


def llama_fields(source: pathlib.Path, config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a decoder: the base's own, or for a `.gguf` file what says the same."""
    if source.is_file():
        return llama.hf_config(config)
    changed = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    return families.replaced(_dense_fields(source), changed)


def _dense_fields(source: pathlib.Path) -> dict[str, Any]:
    """The base's own `config.json`, without how its weights are quantised: they are written dense."""
    fields = checkpoint_files.read_json(source, "config.json")
    fields.pop("quantization_config", None)
    return fields


def generation_fields(source: pathlib.Path, config: DecoderConfig, ends: Sequence[int]) -> dict[str, Any]:
    """The `generation_config.json` of a decoder: the base's own, with the ids after which nothing more is generated."""
    file = source / "generation_config.json"
    special = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
    fields = files.read_json_object(file) if file.is_file() else {name: id for name, id in special.items() if id is not None}
    return fields | ({"eos_token_id": ends[0] if len(ends) == 1 else list(ends)} if ends else {})


def labelled_fields(source: pathlib.Path, labels: Sequence[str], architecture: str) -> dict[str, Any]:
    """The `config.json` of a classifier: the base's own with these labels, for this class of transformers."""
    fields = _dense_fields(source)
    fields.pop("num_labels", None)  # `id2label` says it
    return fields | {
        "architectures": [architecture],
        "problem_type": "single_label_classification",
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def stored_dtypes(source: pathlib.Path) -> dict[str, Any]:
    """The dtype of each tensor of a directory, by its name; of a `.gguf` file's none.

    A head that is not stored, since it is the embedding, has the embedding's. Quantised tensors have the one that the
    configuration names, float32 without.
    """
    if source.is_file():
        return {}
    tensors, fields = _open(source), checkpoint_files.read_json(source, "config.json")
    own = _OWN.get(fields.get("dtype") or fields.get("torch_dtype"), jnp.float32)
    found = {name: _DTYPES.get(tensors.dtype(name), own) for name in tensors.shapes}
    for embedding in [name for name in found if name.endswith("model.embed_tokens.weight")]:
        found.setdefault("lm_head.weight", found[embedding])
    return found


def other_parts(source: pathlib.Path, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors beside the decoder's of a larger model, an image encoder's say."""
    spare = families.FAMILIES[config.model_type].spare
    if spare:
        tensors = _open(source)
        yield from ((name, tensors.read(name)) for name in tensors.shapes if name.startswith(spare))


def _open(source: pathlib.Path) -> Any:
    """The tensors of a directory as they are called in memory."""
    return open_tensors(source, families.rename(checkpoint_files.read_json(source, "config.json")["model_type"]))


def stored_dtype(dtypes: Mapping[str, Any], name: str, default: Any) -> Any:
    """The dtype of a tensor: a checkpoint of an encoder alone has its name without the outermost module."""
    return dtypes.get(name, dtypes.get(name.partition(".")[2], default))


def write(
    directory: pathlib.Path,
    variables: Any,
    adapters: Mapping[str, Adapter],
    names: Mapping[str, HFName],
    fields: Mapping[str, Any],
    dtypes: Mapping[str, Any],
    others: Iterable[tuple[str, np.ndarray]] = (),
) -> dict[str, tuple[float, float]]:
    """`config.json` and the weights with the adapters folded in, in several files if there is more than `SHARD_BYTES`.

    Args:
      directory: an empty directory.
      variables: the base's parameters.
      adapters: `{path: adapter}`.
      names: `{path: HFName}`.
      fields: of `config.json`.
      dtypes: by tensor, as `stored_dtypes` has them; float32 where there is none.
      others: tensors that are written as they are.

    Returns:
      The Frobenius norm of what rounding to the dtype took from each tensor that the adapters change, and of the change.
    """
    config = directory / "config.json"
    write_json(config, fields)
    shards: list[tuple[list[str], int]] = []
    held: dict[str, np.ndarray] = {}
    lost: dict[str, tuple[float, float]] = {}

    def close() -> None:
        file = directory / f"{len(shards)}.safetensors"
        safetensors.numpy.save_file(held, file, metadata={"format": "pt"})
        shutil.copymode(config, file)  # safetensors makes files that only their owner can read
        shards.append((list(held), sum(tensor.nbytes for tensor in held.values())))
        held.clear()

    kept = ((name, tensor, None) for name, tensor in others)
    for name, exact, base in itertools.chain(_tensors(variables, adapters, names), kept):
        tensor = np.ascontiguousarray(exact.astype(stored_dtype(dtypes, name, np.float32)))
        if base is not None:
            lost[name] = _norm(tensor.astype(np.float32) - exact), _norm(exact - base)
        if held and tensor.nbytes + sum(other.nbytes for other in held.values()) > SHARD_BYTES:
            close()
        held[name] = tensor
    close()
    _name_shards(directory, shards)
    return lost


def _tensors(
    variables: Any, adapters: Mapping[str, Adapter], names: Mapping[str, HFName]
) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """Each tensor in turn, and what it was before if it has an adapter; a parameter at a time is folded."""
    before, _ = paths.flatten(variables)
    leaves, _ = paths.flatten(merge(variables, adapters))
    for path, leaf in leaves.items():
        array = np.asarray(jax.device_get(leaf))
        base = np.asarray(before[path]) if path in adapters else None
        for index, tensor in names[path].tensors(array.shape).items():
            yield tensor, names[path].export(array, index), None if base is None else names[path].export(base, index)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _name_shards(directory: pathlib.Path, shards: Sequence[tuple[Sequence[str], int]]) -> None:
    if len(shards) == 1:
        (directory / "0.safetensors").rename(directory / checkpoint_files.SINGLE)
        return
    places = {}
    for i, (tensors, _) in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.safetensors").rename(directory / file)
        places |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": places}
    write_json(directory / checkpoint_files.INDEX, index)


def write_tokenizer(directory: pathlib.Path, source: pathlib.Path, tokenizer: TextTokenizer | tokenizers.Tokenizer) -> None:
    """The base's tokenizer files; for a `.gguf` file ones that say the same."""
    if source.is_dir():
        for name in checkpoint_files.TOKENIZER:
            if (source / name).is_file():
                with files.reading(source / name):
                    shutil.copyfile(source / name, directory / name)
        return
    assert isinstance(tokenizer, TextTokenizer)
    tokenizer.tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    template = gguf_files.chat_template(source)
    if template is not None:
        config["chat_template"] = template
    write_json(directory / "tokenizer_config.json", config)


def write_preprocessor(directory: pathlib.Path, source: pathlib.Path) -> None:
    """How images become pixels, as the base has it, if it does."""
    for name in (checkpoint_files.PREPROCESSOR, checkpoint_files.PROCESSOR):
        if (source / name).is_file():
            with files.reading(source / name):
                shutil.copyfile(source / name, directory / name)


def name_end(directory: pathlib.Path, tokenizer: TextTokenizer, ends: Sequence[int]) -> None:
    """Make what ends a turn the `eos_token` of tokenizer files, for tools that look for the end there.

    Not where there are several, nor where the chat template writes `eos_token` itself.
    """
    if len(ends) != 1 or "eos_token" in (tokenizer.template or ""):
        return
    text = tokenizer.tokenizer.id_to_token(ends[0])
    if text == tokenizer.special_tokens.get("eos_token"):
        return
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).is_file():
            write_json(directory / name, files.read_json_object(directory / name) | {"eos_token": text})


def write_json(file: pathlib.Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(fields), indent=2) + "\n", encoding="utf-8")

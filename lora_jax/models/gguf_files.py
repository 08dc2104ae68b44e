"""What a GGUF file says about its model besides the weights: the sizes, the tokenizer, the chat template."""

import pathlib
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.huggingface.gguf_reader import GgufFile
from lora_jax.models.gguf_config import read_config as read_config

__all__ = ["chat_template", "special_tokens", "tokenizer"]

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_SPLITS = {"llama-bpe": _LLAMA_3, "qwen2": _QWEN_2}
_BYTE_LEVEL = ("gpt-2", "smollm")
_CONTROL, _USER_DEFINED = 3, 4


def chat_template(file: str | pathlib.Path) -> str | None:
    """The file's Jinja template for chats, if it has one.

    Args:
      file: a `.gguf` file.

    Raises:
      MissingError: the file is missing.
      InputError: it can't be read.

    >>> import gguf, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = gguf.GGUFWriter(file := f"{directory}/tiny.gguf", "llama")
    ...     writer.add_chat_template("{{ messages }}")
    ...     writer.write_header_to_file()
    ...     writer.write_kv_data_to_file()
    ...     writer.close()
    ...     chat_template(file)
    '{{ messages }}'
    """
    return GgufFile(file).metadata.get("tokenizer.chat_template")


def special_tokens(file: str | pathlib.Path) -> dict[str, str]:
    """The texts of the file's special tokens by the names that chat templates know: `bos_token`, `eos_token`, ...

    Args:
      file: a `.gguf` file.

    Raises:
      MissingError: the file is missing.
      InputError: it can't be read, or one of these is none of its tokens.

    >>> import gguf, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = gguf.GGUFWriter(file := f"{directory}/tiny.gguf", "llama")
    ...     writer.add_token_list(["a", "b", "ab", "<end>"])
    ...     writer.add_eos_token_id(3)
    ...     writer.write_header_to_file()
    ...     writer.write_kv_data_to_file()
    ...     writer.close()
    ...     special_tokens(file)
    {'eos_token': '<end>'}
    """
    return _special_tokens(GgufFile(file))


def _special_tokens(opened: GgufFile) -> dict[str, str]:
    words = _texts(opened, "tokens")
    found = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        place = opened.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if place is not None:
            if not isinstance(place, int) or not 0 <= place < len(words):
                raise InputError(f"{opened.file}: the {name} token is number {place} of {len(words)} tokens")
            found[f"{name}_token"] = words[place]
    return found


def tokenizer(file: str | pathlib.Path) -> Any:
    """The file's tokenizer, as a `tokenizers.Tokenizer`: byte-level BPE (`tokenizer.ggml.model` is `gpt2`).

    Args:
      file: a `.gguf` file.

    Raises:
      MissingError: the file is missing.
      InputError: another kind of tokenizer, or a broken one.

    >>> import gguf, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     writer = gguf.GGUFWriter(file := f"{directory}/tiny.gguf", "llama")
    ...     writer.add_tokenizer_model("gpt2")
    ...     writer.add_token_list(["a", "b", "ab", "<end>"])
    ...     writer.add_token_merges(["a b"])
    ...     writer.write_header_to_file()
    ...     writer.write_kv_data_to_file()
    ...     writer.close()
    ...     tokenizer(file).encode("abb").tokens
    ['ab', 'b']
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    opened = GgufFile(file)
    metadata = opened.metadata
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in (*_SPLITS, *_BYTE_LEVEL):
        raise InputError(
            f"{opened.file}: its tokenizer is {kind!r} with the splitting {split!r}; 'gpt2' with "
            f"{', '.join(map(repr, (*_BYTE_LEVEL, *_SPLITS)))} can be read: load the Hugging Face model that the file was made "
            f"from{_origin(metadata)}, which has a tokenizer.json"
        )
    words, merges = _texts(opened, "tokens"), [tuple(merge.split(" ")) for merge in _texts(opened, "merges")]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(words))
    vocabulary = {word: i for i, word in enumerate(words)}
    if len(vocabulary) != len(words) or len(kinds) != len(words) or any(len(merge) != 2 for merge in merges):
        raise InputError(f"{opened.file}: its tokenizer is broken: tokens, token types and merges do not fit together")
    try:
        made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    except Exception as error:  # the package raises nothing narrower
        raise InputError(f"{opened.file}: its tokenizer is broken: {error}") from None
    _split(made, split)
    made.decoder = decoders.ByteLevel()
    added = [
        AddedToken(word, special=kind == _CONTROL, normalized=False)
        for word, kind in zip(words, kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    made.add_tokens(added)
    _frame(made, opened, split)
    return made


def _origin(metadata: dict[str, Any]) -> str:
    """The name of the model that a file was made from, if it says so."""
    name = (
        metadata.get("general.base_model.0.repo_url") or metadata.get("general.source.repo_url") or metadata.get("general.name")
    )
    return f" ({name})" if isinstance(name, str) else ""


def _split(made: Any, split: str) -> None:
    """How texts are cut before the merges."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    if split in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[split]), "isolated")
    elif split == "smollm":
        cut = pre_tokenizers.Digits(individual_digits=True)
    else:
        cut = None
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in _BYTE_LEVEL)
    made.pre_tokenizer = level if cut is None else pre_tokenizers.Sequence([cut, level])
    if split == "qwen2":
        made.normalizer = normalizers.NFC()


def _frame(made: Any, opened: GgufFile, split: str) -> None:
    """The tokens that the file wants before and after each text."""
    from tokenizers import processors

    named = _special_tokens(opened)
    metadata = opened.metadata
    wanted = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    bos, eos = (named.get(name) if on else None for name, on in wanted.items())
    if bos is None and eos is None:
        return
    template = " ".join(part for part in (bos and "bos", "$A", eos and "eos") if part)
    pairs = [(name, token) for name, token in (("bos", bos), ("eos", eos)) if token]
    special = [{"id": name, "ids": [made.token_to_id(token)], "tokens": [token]} for name, token in pairs]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _texts(opened: GgufFile, name: str) -> list[str]:
    value = opened.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise InputError(f"{opened.file} has no tokenizer.ggml.{name}, a list of texts")
    return value

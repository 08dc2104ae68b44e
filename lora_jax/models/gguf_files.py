"""What a GGUF file says about its model besides the weights: the sizes, the tokenizer, the chat template."""

import pathlib
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.huggingface.gguf_reader import GgufFile
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.rotary import LinearRope, Llama3Rope, plain

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
_SPLITS = {"llama-bpe": _LLAMA_3, "qwen2": _QWEN_2}
_BYTE_LEVEL = ("gpt-2", "smollm")
_CONTROL, _USER_DEFINED = 3, 4


def read_config(tensors: GgufFile) -> DecoderConfig:
    """The sizes of a model of the `llama` or `qwen2` architecture.

    Raises:
      InputError: another architecture, or a value that is missing or that the model can't do.
    """
    metadata, kind = tensors.metadata, tensors.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise InputError(f"{tensors.file}: the architecture is {kind!r}; 'llama' and 'qwen2' can be read")
    if metadata.get(f"{kind}.expert_count"):
        raise InputError(f"{tensors.file} is a mixture of experts, which can't be read")

    def number(name: str, default: int | None = None) -> int:
        return tensors.number(f"{kind}.{name}", default)

    heads, width, layers = number("attention.head_count"), number("embedding_length"), number("block_count")
    head_dim = number("attention.key_length", width // heads)
    if {number("rope.dimension_count", head_dim), number("attention.value_length", head_dim)} != {head_dim}:
        raise InputError(f"{tensors.file}: only heads of one size, rotated whole, can be read")
    window = metadata.get(f"{kind}.attention.sliding_window") and number("attention.sliding_window")
    bias = "model.layers.0.self_attn.q_proj.bias" in tensors.shapes
    special = lambda name: metadata.get(f"tokenizer.ggml.{name}_token_id")
    ends = dict.fromkeys(id for id in (special("eos"), special("eot")) if id is not None)
    fields: Any = dict(
        model_type="mistral" if window and kind == "llama" else kind,
        vocab_size=tensors.shapes.get("model.embed_tokens.weight", (0,))[0],
        hidden_size=width,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=_shortest(metadata.get(f"{kind}.attention.layer_norm_rms_epsilon", 1e-6)),
        rope_theta=_shortest(metadata.get(f"{kind}.rope.freq_base", 10000.0)),
        rope_scaling=_scaling(tensors, kind),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias and kind == "llama",
        tie_word_embeddings="lm_head.weight" not in tensors.shapes,
        sliding_window=window or None,
        sliding_layers=tuple(range(layers)) if window else (),
        bos_token_id=special("bos"),
        eos_token_ids=tuple(ends),
        pad_token_id=special("padding"),
    )
    try:
        return DecoderConfig(**fields)
    except InputError as error:
        raise InputError(f"{tensors.file}: {error}") from None


def _shortest(value: float) -> float:
    """A float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling(tensors: GgufFile, kind: str) -> Llama3Rope | LinearRope | None:
    """The scaling of the rotary frequencies. Llama 3's stands in the file as the divisor of each frequency."""
    metadata = tensors.metadata
    method = metadata.get(f"{kind}.rope.scaling.type", "none")
    if "rope_freqs.weight" in tensors.shapes:
        return _llama3_scaling(tensors, kind)
    if method not in ("none", "linear"):
        raise InputError(f"{tensors.file}: the rope scaling is {method!r}; 'linear' and Llama 3's can be read")
    factor = metadata.get(f"{kind}.rope.scaling.factor", metadata.get(f"{kind}.rope.scale_linear", 1.0))
    return None if factor in (0, 1) else LinearRope(factor=_shortest(factor))


def _llama3_scaling(tensors: GgufFile, kind: str) -> Llama3Rope:
    divisors = tensors.read("rope_freqs.weight").reshape(-1)
    theta = _shortest(tensors.metadata.get(f"{kind}.rope.freq_base", 10000.0))
    frequencies = plain(theta, 2 * divisors.size)
    rope = Llama3Rope(
        factor=_shortest(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    if not np.allclose(frequencies / rope.scale(frequencies), divisors, rtol=1e-4):
        raise InputError(f"{tensors.file}: the divisors in rope_freqs.weight are not those of Llama 3, so they can't be read")
    return rope


def chat_template(file: str | pathlib.Path) -> str | None:
    """The file's Jinja template for chats, if it has one."""
    return GgufFile(file).metadata.get("tokenizer.chat_template")


def special_tokens(file: str | pathlib.Path) -> dict[str, str]:
    """The texts of the file's special tokens by the names that chat templates know: `bos_token`, `eos_token`, ..."""
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

    Raises:
      InputError: another kind of tokenizer, or a broken one.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    opened = GgufFile(file)
    metadata = opened.metadata
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in (*_SPLITS, *_BYTE_LEVEL):
        raise InputError(
            f"{opened.file}: its tokenizer is {kind!r} with the splitting {split!r}; 'gpt2' with "
            f"{', '.join(map(repr, (*_BYTE_LEVEL, *_SPLITS)))} can be read: give the model's tokenizer.json instead"
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

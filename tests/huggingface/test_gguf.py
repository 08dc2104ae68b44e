"""GGUF files: the same model as from safetensors, dequantised; the tokenizer; files that lie."""

import dataclasses
import json
import math
import shutil
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.huggingface.gguf_reader import GgufFile
from lora_jax.models import gguf_config, gguf_files, llama
from lora_jax.models.families import read_config
from tests.support.gguf_write import ALPHABET, BASE, CONVERTED, DATA, TEMPLATE, write, write_family


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "tiny.gguf", "base", tokens=True)


LINEAR = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 3.0}


@pytest.mark.parametrize(
    ("name", "metadata", "changes"),
    [
        ("base", {}, {}),
        ("linear", LINEAR, {}),
        ("mistral", {"add_sliding_window": 4}, {}),
        ("qwen2", {}, {"sliding_window": None, "sliding_layers": ()}),  # llama.cpp slides on no layer of Qwen2
    ],
)
def test_the_same_model_as_from_safetensors(tmp_path, name, metadata, changes):
    got, want = llama.load(write(tmp_path / "tiny.gguf", name, **metadata)), llama.load(BASE if name == "base" else DATA / name)
    changes = {"bos_token_id": None, "eos_token_ids": (), **changes}
    assert got.config == dataclasses.replace(want.config, **changes)
    assert got.names == want.names
    jax.tree.map(np.testing.assert_array_equal, got.variables, want.variables)


FAMILIES = DATA.parent / "families"
OF_YARN = {
    "add_rope_scaling_type": gguf.RopeScalingType.YARN,
    "add_rope_scaling_factor": 4.0,
    "add_rope_scaling_orig_ctx_len": 32,
}
METADATA = {
    "gemma3": {"add_sliding_window_pattern": [True, True, True, False]},
    "olmo3": {"add_sliding_window_pattern": [True, True]},
    "phi3": {"add_sliding_window": 0},
    "llama_yarn": OF_YARN,
}


# Fields that llama.cpp's code knows, and not its files: the query's scale, and that OLMo 3's layers all rotate alike.
NOT_IN_FILES = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "olmo3": {"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}},
}


def same_logits(got, want):
    assert got.names == want.names
    ids = jnp.arange(36, dtype=jnp.int32).reshape(2, 18) * 5 % want.config.vocab_size
    logits, expected = (np.asarray(jax.jit(model.apply)(model.variables, ids)) for model in (got, want))
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", [case for case in CONVERTED if case != "phi3_longrope"])
def test_the_logits_of_a_family_are_those_of_its_directory(case, tmp_path):
    """The file is written as llama.cpp's converter does."""
    want = llama.load(changed(case, tmp_path / "base", **NOT_IN_FILES.get(case, {})))
    same_logits(llama.load(write_family(tmp_path / "tiny.gguf", case, **METADATA.get(case, {}))), want)


def test_longrope_of_phi3(tmp_path):
    """A text that is longer than the original length, of which the divisors stand in two tensors."""
    rope = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 16}
    parts = {"short": [1.0, 1.1, 1.2, 1.3], "long": [1.0, 2.0, 3.0, 4.0]}
    rope |= {f"{part}_factor": divisors for part, divisors in parts.items()}
    divisors = {f"rope_factors_{part}.weight": np.float32(divisors) for part, divisors in parts.items()}
    factor = math.sqrt(1 + math.log(128 / 16) / math.log(16))
    metadata = {"add_sliding_window": 0, "add_rope_scaling_orig_ctx_len": 16, "add_rope_scaling_attn_factors": factor}
    file = write_family(tmp_path / "tiny.gguf", "phi3_longrope", divisors, **metadata)
    same_logits(
        llama.load(file),
        llama.load(changed("phi3_longrope", tmp_path / "base", rope_parameters=rope, original_max_position_embeddings=16)),
    )


def changed(case, directory, **fields):
    """A copy with other fields in its config.json."""
    shutil.copytree(FAMILIES / case / "base", directory)
    (directory / "config.json").write_text(json.dumps(json.loads((directory / "config.json").read_text()) | fields))
    return directory


@pytest.mark.parametrize(("case", "layers", "scalar"), [("gemma2", 46, 8), ("gemma3", 62, 8), ("gemma3", 34, 16)])
def test_the_query_scale_of_the_largest_gemmas(case, layers, scalar, tmp_path):
    """The width for each head, 32 / 4, in the models of 27B; else a head's size."""
    file = GgufFile(write_family(tmp_path / "tiny.gguf", case, add_block_count=layers))
    assert gguf_config.read_config(file).query_scale == scalar**-0.5


def test_windows_of_gemma3(tmp_path):
    """Every sixth layer sees all tokens, unless the file says otherwise; without a window every layer does."""
    file = GgufFile(write_family(tmp_path / "tiny.gguf", "gemma3", add_block_count=7))
    config = gguf_config.read_config(file)
    assert config.windows == (4, 4, 4, 4, 4, None, 4) and config.sliding_rope.theta == 10_000.0
    file = GgufFile(write_family(tmp_path / "none.gguf", "gemma3", add_sliding_window=0))
    assert gguf_config.read_config(file).windows == (None,) * 4


def test_phi3_needs_to_say_its_window(tmp_path):
    with pytest.raises(ValueError, match=r"has no phi3\.attention\.sliding_window \(0: none\): .* convert the model again"):
        llama.load(write_family(tmp_path / "tiny.gguf", "phi3"))


def test_scanned_and_cast(file):
    got = llama.load(file, scan_layers=True, dtype=jnp.bfloat16)
    want = llama.load(BASE, scan_layers=True, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got.variables) == jax.tree.map(
        lambda x: (x.shape, x.dtype), want.variables
    )
    same = jax.tree.map(
        lambda g, w: np.array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32)), got.variables, want.variables
    )
    assert all(jax.tree.leaves(same))
    assert (got.config.bos_token_id, got.config.eos_token_ids, got.config.pad_token_id) == (1, (0,), 0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q5_0"])
def test_quantised(tmp_path, kind):
    quantised = gguf.GGMLQuantizationType[kind]
    got = llama.load(write(tmp_path / "tiny.gguf", "base", quantised)).variables
    want = llama.load(BASE).variables
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7, "Q4_1": 3, "Q5_0": 4}[kind]
    for near, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(near - exact).max()) <= 2.0**-bits * float(jnp.abs(exact).max())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_rope_scaling_of_llama_3(tmp_path, factor):
    config = read_config({**json.loads((BASE / "config.json").read_text()), "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}})  # fmt: skip
    plain = dataclasses.replace(config, rope_scaling=None).frequencies()
    divisors = {"rope_freqs.weight": plain / config.frequencies()}
    file = write(tmp_path / "tiny.gguf", "base", extra=divisors, add_rope_freq_base=5e5)
    assert llama.load(file).config.rope_scaling == config.rope_scaling
    other = write(tmp_path / "other.gguf", "base", extra={"rope_freqs.weight": np.float32([1, 2, 3, 9])})
    with pytest.raises(ValueError, match=r"the divisors in rope_freqs\.weight are not those of Llama 3"):
        llama.load(other)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_tokenizer(file):
    tokenizer = gguf_files.tokenizer(file)
    text = "<|user|>hello hell2 12\n<tool>held<|end|>"
    encoded = tokenizer.encode(text)
    words = ["<|user|>", "hello", "Ġ", "hell", "2", "Ġ", "1", "2", "Ċ", "<tool>", "he", "l", "d", "<|end|>"]
    assert encoded.tokens == words and encoded.ids == [ALPHABET.index(word) for word in words]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == text.replace("<|user|>", "").replace("<|end|>", "")
    assert gguf_files.chat_template(file) == TEMPLATE
    assert gguf_files.special_tokens(file) == {"bos_token": "<|user|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    again = type(tokenizer).from_str(tokenizer.to_str())
    assert again.encode(text).ids == encoded.ids


def test_tokens_around_a_text(tmp_path):
    options = {"add_add_bos_token": True, "add_add_eos_token": True}
    file = write(tmp_path / "tiny.gguf", "base", tokens=True, **options)
    assert gguf_files.tokenizer(file).encode("hello").tokens == ["<|user|>", "hello", "<|end|>"]
    assert gguf_files.tokenizer(file).encode("hello", add_special_tokens=False).tokens == ["hello"]


@pytest.mark.parametrize("split", ["llama-bpe", "qwen2", "gpt-2"])
def test_other_ways_to_split(tmp_path, split):
    file = write(tmp_path / "tiny.gguf", "base", tokens=split)
    words = gguf_files.tokenizer(file).encode("hello 12").tokens
    assert words == [*(["<|user|>"] if split == "llama-bpe" else []), "hello", "Ġ", "1", "2"]
    assert (
        len(gguf_files.tokenizer(file).pre_tokenizer.pre_tokenize_str(" 1234"))
        == {"llama-bpe": 3, "qwen2": 5, "gpt-2": 1}[split]
    )


def test_other_tokenizers(tmp_path):
    with pytest.raises(ValueError, match="its tokenizer is 'gpt2' with the splitting 'deepseek-llm'"):
        gguf_files.tokenizer(write(tmp_path / "tiny.gguf", "base", tokens="deepseek-llm"))
    named = write(tmp_path / "named.gguf", "base", tokens="deepseek-llm", add_name="Tiny 1B")
    with pytest.raises(
        ValueError, match=r"load the Hugging Face model that the file was made from \(Tiny 1B\), which has a tok"
    ):
        gguf_files.tokenizer(named)
    bare = write(tmp_path / "bare.gguf", "base")
    assert gguf_files.chat_template(bare) is None
    with pytest.raises(ValueError, match="its tokenizer is None"):
        gguf_files.tokenizer(bare)
    with pytest.raises(ValueError, match=r"has no tokenizer\.ggml\.tokens, a list of texts"):
        gguf_files.special_tokens(bare)


# --- files that lie ---------------------------------------------------------------------------------------------------


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def header(entries, tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries)) + b"".join(entries)


HOSTILE = {
    "empty": (b"", "is no GGUF file"),
    "other file": (b"PK\x03\x04" + bytes(40), "is no GGUF file"),
    "cut in the magic": (b"GGUF\x03", "is truncated"),
    "version": (header([], version=1), "has the GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "many entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "is truncated"),
    "many tensors": (header([], tensors=2**60), "is truncated"),
    "long text": (header([struct.pack("<Q", 2**62)]), "is truncated"),
    "long array": (header([text("a") + struct.pack("<IIQ", 9, 4, 2**60)]), "is truncated"),
    "long array of bytes": (header([text("a") + struct.pack("<IIQ", 9, 0, 2**60)]), "is truncated"),
    "long array of texts": (header([text("a") + struct.pack("<IIQ", 9, 8, 2**60)]), "is truncated"),
    "nested arrays": (header([text("a") + struct.pack("<IIQ", 9, 9, 1) * 5000]), "an array of the type 9"),
    "type": (header([text("a") + struct.pack("<I", 77)]), "unknown type 77"),
    "not UTF-8": (header([struct.pack("<Q", 2) + b"\xff\xfe"]), "is not UTF-8"),
    "axes": (header([], tensors=1) + text("t") + struct.pack("<I", 2**31), r"has 2147483648 axes"),
    "no axes": (header([], tensors=1) + text("t") + struct.pack("<I", 0), r"t has 0 axes; 1 to 4 can be read"),
    "alignment": (header([text("general.alignment") + struct.pack("<II", 4, 0)]), r"general\.alignment must be a positive"),
    "no architecture": (header([]), "the architecture is None"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    content, message = HOSTILE[case]
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        llama.load(tmp_path / "bad.gguf")


LIES = {
    "other architecture": ({"architecture": "mamba"}, "the architecture is 'mamba'; these can be read: 'llama', 'qwen2', 'qwen3', .*'gemma3'"),
    "experts": ({"add_expert_count": 4}, r"llama\.expert_used_count must be a positive whole number, not None"),
    "part of a head": ({"add_rope_dimension_count": 4}, "partial_rotary_factor is 0.5; this family rotates whole heads"),
    "values": ({"add_value_length": 4}, "keys and values of different sizes"),
    "unknown value": ({"add_max_alibi_bias": 8.0}, r"does not know: llama\.attention\.max_alibi_bias \(8\.0\)"),
    "many experts": ({"extra": {"x": np.zeros((10_001, 1, 1), np.float32)}}, "x is of 10001 experts; at most 10000"),
    "layers": ({"add_block_count": 10**6}, "at most 10000 can be read"),
    "more layers": ({"add_block_count": 9}, "has 3 layers; the configuration asks for 9"),
    "sizes": ({"add_feed_forward_length": 40}, r"mlp\.gate_proj\.weight has the shape \(48, 32\); the configuration asks for \(40, 32\)"),
    "yarn": ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, r"rope\.scaling\.original_context_length must be a positive"),
    "rope": ({"add_rope_scaling_type": gguf.RopeScalingType.LONGROPE}, "the rope scaling is 'longrope'"),
    "no heads": ({"add_head_count": 0}, "must be a positive whole number, not 0"),
    "heads by layer": ({"add_head_count": [4, 4, 2]}, r"must be a positive whole number, not \[4, 4, 2\]"),
    "unknown tensor": ({"extra": {"blk.0.attn_sinks.weight": np.ones(3, np.float32)}}, r"unexpected tensors blk\.0\.attn_sinks\.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_lies(tmp_path, case):
    changes, message = LIES[case]
    with pytest.raises(ValueError, match=message):
        llama.load(write(tmp_path / "bad.gguf", "base", **changes))


def test_truncated_or_mutated(file, tmp_path):
    content = file.read_bytes()
    bad = tmp_path / "bad.gguf"
    random = np.random.default_rng(0)
    for _ in range(30):
        bad.write_bytes(content[: random.integers(len(content) - 40)])
        with pytest.raises(ValueError, match=r"truncated|no GGUF"):
            llama.load(bad)
    end = GgufFile(file)._start
    for _ in range(60):  # some changes are harmless, as one in the chat template
        changed = bytearray(content)
        changed[random.integers(end)] = random.integers(256)
        bad.write_bytes(changed)
        for read in (llama.load, gguf_files.tokenizer):
            try:
                read(bad)
            except ValueError as error:
                assert str(bad) in str(error)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        llama.load(tmp_path / "nothing.gguf")

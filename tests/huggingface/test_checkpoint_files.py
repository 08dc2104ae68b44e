"""Hugging Face directories: tensors in several files, dtypes, shardings, and files that lie."""

import json
import pathlib
import pickle
import shutil
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.core import paths
from lora_jax.models import bert, llama

DATA = pathlib.Path(__file__).parents[1] / "data"
BASE = DATA / "peft" / "llama" / "base"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(tmp_path):
    """A writable copy of the tiny Llama."""
    directory = tmp_path / "model"
    shutil.copytree(BASE, directory)
    return directory


def tensors_of(directory):
    return load_file(directory / "model.safetensors")


def rewrite(directory, dtype=None, leave_out=(), **changes):
    tensors = {name: tensor for name, tensor in tensors_of(directory).items() if name not in leave_out} | changes
    save_file({name: t if dtype is None else t.astype(dtype) for name, t in tensors.items()}, directory / "model.safetensors")


def shard(directory, count=3, **changes):
    """The same tensors in several files and an index."""
    tensors, placed = tensors_of(directory), {}
    (directory / "model.safetensors").unlink()
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, directory / file)
        placed |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed | changes}))


def configure(directory, **changes):
    fields = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(fields))


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got.variables, want.variables)


def test_several_files(model):
    shard(model)
    same(llama.load(model), llama.load(BASE))
    same(llama.load(model, scan_layers=True), llama.load(BASE, scan_layers=True))


def test_several_files_of_a_bert(tmp_path):
    shutil.copytree(DATA / "bert" / "base", tmp_path / "bert")
    shard(tmp_path / "bert")
    same(bert.load(tmp_path / "bert"), bert.load(DATA / "bert" / "base"))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_stored_dtypes(model, dtype):
    want = llama.load(model)
    rewrite(model, dtype)
    got = llama.load(model)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), want.variables)
    jax.tree.map(np.testing.assert_array_equal, got.variables, rounded)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_sharding(model, scan_layers):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    by_path = {}

    def place(path, shape):
        axis = next((i for i, size in reversed(list(enumerate(shape))) if size % 4 == 0), None)
        spec = [None] * len(shape) if axis is None else [*[None] * axis, "x"]
        by_path[path] = jax.NamedSharding(mesh, jax.P(*spec))
        return by_path[path]

    got = llama.load(model, scan_layers=scan_layers, sharding=place, dtype=jnp.bfloat16)
    same(got, llama.load(model, scan_layers=scan_layers, dtype=jnp.bfloat16))
    for path, leaf in paths.flatten(got.variables)[0].items():
        assert leaf.sharding == by_path[path]
    everywhere = jax.NamedSharding(mesh, jax.P())
    assert {x.sharding for x in jax.tree.leaves(llama.load(model, sharding=everywhere).variables)} == {everywhere}


def test_no_second_copy_is_held(tmp_path):
    config = llama.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    made = llama.init(config, jax.random.key(0))
    leaves, _ = paths.flatten(made.variables)
    save_file(
        {name.name: np.ascontiguousarray(name.export(np.asarray(leaves[path]))) for path, name in made.names.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(llama.hf_config(config)))
    tracemalloc.start()
    loaded = llama.load(tmp_path, dtype=jnp.bfloat16, scan_layers=True)
    peak = tracemalloc.get_traced_memory()[1]  # numpy's buffers; on a CPU they are what the parameters are made of
    tracemalloc.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(loaded.variables)]
    assert peak < sum(sizes) + 2 * max(sizes)


# --- tied heads -------------------------------------------------------------------------------------------------------


def test_a_head_beside_tied_embeddings(model):
    table = tensors_of(model)["model.embed_tokens.weight"]
    configure(model, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        llama.load(model)
    rewrite(model, **{"lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    tied = llama.load(model)
    assert "params/lm_head/kernel" not in tied.names
    rewrite(model, leave_out=["lm_head.weight"])
    same(llama.load(model), tied)
    untied = llama.load(model, tie=False)
    np.testing.assert_array_equal(untied.variables["params"]["lm_head"]["kernel"], table.T)
    assert untied.names["params/lm_head/kernel"].name == "lm_head.weight"
    assert json.loads(json.dumps(llama.hf_config(untied.config)))["tie_word_embeddings"] is False


def test_tying_what_is_stored_twice(model):
    with pytest.raises(ValueError, match=r"tie=True asks for one matrix, but lm_head\.weight differs"):
        llama.load(model, tie=True)
    rewrite(model, **{"lm_head.weight": tensors_of(model)["model.embed_tokens.weight"]})
    assert llama.load(model, tie=True).config.tie_word_embeddings
    rewrite(model, leave_out=["lm_head.weight"])
    with pytest.raises(ValueError, match=r"lacks the tensors lm_head\.weight"):
        llama.load(model)


# --- files that lie ---------------------------------------------------------------------------------------------------


def header(directory, **changes):
    """The file's own data behind a changed header."""
    content = (directory / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    fields = json.loads(content[8 : 8 + size]) | changes
    text = json.dumps(fields).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def overwrite(directory, start, content):
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[start : start + len(content)] = content
    (directory / "model.safetensors").write_bytes(data)


def place(directory, file):
    """An index that leads out of the directory, to a file that is there."""
    shutil.copy(directory / "model.safetensors", directory.parent / "outside.safetensors")
    shard(directory, **{"model.norm.weight": file.format(parent=directory.parent)})


NORM = "model.norm.weight"
HOSTILE = {
    "truncated": (lambda d: overwrite(d, 8, b"") or (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "is truncated or not"),
    "empty": (lambda d: (d / "model.safetensors").write_bytes(b""), "is truncated or not"),
    "header length": (lambda d: overwrite(d, 0, struct.pack("<Q", 2**62)), "is truncated or not"),
    "short header": (lambda d: overwrite(d, 0, struct.pack("<Q", 3)), "is truncated or not"),
    "header is no JSON": (lambda d: overwrite(d, 8, b"}}"), "is truncated or not"),
    "huge shape": (lambda d: header(d, **{NORM: {"dtype": "F32", "shape": [2**60, 2**60], "data_offsets": [0, 128]}}), "is truncated or not"),
    "huge offsets": (lambda d: header(d, **{NORM: {"dtype": "F32", "shape": [32], "data_offsets": [2**62, 2**62 + 128]}}), "is truncated or not"),
    "integers": (lambda d: rewrite(d, **{NORM: np.ones(32, np.int32)}), r"model\.norm\.weight is stored as I32; F64, F32, F16, BF16 can be read"),
    "float8": (lambda d: rewrite(d, **{NORM: np.ones(32, ml_dtypes.float8_e4m3fn)}), "is stored as F8_E4M3"),
    "shape": (lambda d: rewrite(d, **{NORM: np.ones(31, np.float32)}), r"model\.norm\.weight has the shape \(31,\); the configuration asks for \(32,\)"),
    "missing": (lambda d: rewrite(d, leave_out=[NORM]), r"lacks the tensors model\.norm\.weight"),
    "10,000 unknown": (lambda d: rewrite(d, **{f"x{i:05d}": np.zeros(1, np.float32) for i in range(10_000)}), r"unexpected tensors x00000, .* x00007 and 9992 more"),
    "layers": (lambda d: configure(d, num_hidden_layers=5000), "has 3 layers; the configuration asks for 5000"),
    "huge size": (lambda d: configure(d, vocab_size=2**60), "the configuration asks for"),
    "config": (lambda d: configure(d, rope_scaling={"type": "x"}, rope_parameters=None), r"config\.json: the rope_type is 'x'"),
    "deep config": (lambda d: (d / "config.json").write_text("[" * 100_000), r"config\.json is not JSON"),
    "index is a list": (lambda d: shard(d) or (d / INDEX).write_text("[]"), "must hold a JSON object"),
    "no weight_map": (lambda d: shard(d) or (d / INDEX).write_text("{}"), "must have a weight_map"),
    "weight_map of numbers": (lambda d: shard(d, **{NORM: 3}), "must have a weight_map"),
    "parent": (lambda d: place(d, "../outside.safetensors"), r"not plain ones ending in \.safetensors: '\.\./outside\.safetensors'"),
    "absolute": (lambda d: place(d, "{parent}/outside.safetensors"), "not plain ones"),
    "backslash": (lambda d: place(d, "..\\outside.safetensors"), "not plain ones"),
    "drive": (lambda d: place(d, "C:outside.safetensors"), "not plain ones"),
    "NUL": (lambda d: place(d, "a\0.safetensors"), "not plain ones"),
    "pickle in the index": (lambda d: place(d, "pytorch_model.bin"), "not plain ones"),
    "tensor not in its file": (lambda d: shard(d, extra="model-00001-of-00003.safetensors"), r"lacks the tensors extra that model\.safetensors\.index\.json places there"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_directories(model, case):
    spoil, message = HOSTILE[case]
    spoil(model)
    with pytest.raises(ValueError, match=message) as caught:
        llama.load(model)
    assert str(model) in str(caught.value) and len(str(caught.value)) < 1000


def test_a_listed_file_that_is_missing(model):
    shard(model)
    (model / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-00002-of-00003\.safetensors"):
        llama.load(model)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_pickles_stay_closed(model):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(FileNotFoundError, match=r"in pytorch_model\.bin only, a pickle, .* is never opened"):
        llama.load(model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        llama.load(model)


def test_mutated_headers(model):
    content = (model / "model.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    random = np.random.default_rng(0)
    for _ in range(40):
        changed = bytearray(content)
        for place in random.integers(end, size=3):
            changed[place] = random.integers(256)
        (model / "model.safetensors").write_bytes(changed)
        with pytest.raises(ValueError, match=str(model)):
            llama.load(model)

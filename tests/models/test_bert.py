"""The BERT loader against logits that Hugging Face's own BERT gave, and its errors."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.huggingface.names import HFName
from lora_jax.models import bert

DATA = pathlib.Path(__file__).parents[1] / "data" / "bert"
INPUTS = {name: jnp.asarray(x, jnp.int32) for name, x in load_file(DATA / "inputs.safetensors").items()}
EXPECTED = load_file(DATA / "expected.safetensors")["base_output"]


@pytest.fixture
def model(tmp_path):
    """A writable copy of the model's directory."""
    directory = tmp_path / "model"
    shutil.copytree(DATA / "base", directory)
    return directory


def rewrite(directory, rename=lambda name: name, **changes):
    """Write the tensors again under new names (`None`: left out), some of them replaced."""
    tensors = {rename(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if name is not None}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")


def configure(directory, **changes):
    fields = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(fields))


def as_sentence_model(directory, mode="pooling_mode_mean_tokens"):
    rewrite(directory, lambda name: name.removeprefix("bert.") if not name.startswith("classifier") else None)
    (directory / "modules.json").write_text("[]")
    (directory / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, mode: True}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes))


def logits(loaded):
    return loaded.apply(loaded.variables, **INPUTS)


def test_logits_are_those_of_hugging_face():
    loaded = bert.load(DATA / "base")
    np.testing.assert_allclose(logits(loaded), EXPECTED, rtol=0, atol=1e-5)
    assert loaded.new == () and loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("bert."),
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ],
    ids=["no prefix", "old norm names"],
)
def test_other_names_of_the_same_tensors(model, rename):
    rewrite(model, rename, **{rename("bert.embeddings.position_ids"): np.arange(32)[None]})
    np.testing.assert_allclose(logits(bert.load(model)), EXPECTED, rtol=0, atol=1e-5)


def test_names_lead_to_every_tensor_and_back():
    loaded = bert.load(DATA / "base")
    tensors = load_file(DATA / "base" / "model.safetensors")
    leaves, _ = paths.flatten(loaded.variables)
    assert loaded.names["params/encoder/layer_1/attention/out/kernel"] == HFName(
        "bert.encoder.layer.1.attention.output.dense.weight", "i o -> o i"
    )
    assert set(leaves) == set(loaded.names)
    assert sorted(name.name for name in loaded.names.values()) == sorted(tensors)
    for path, name in loaded.names.items():
        np.testing.assert_array_equal(name.export(leaves[path]), tensors[name.name])


def test_without_a_mask_nothing_is_padding():
    loaded = bert.load(DATA / "base")
    full = loaded.apply(loaded.variables, INPUTS["input_ids"], jnp.ones_like(INPUTS["input_ids"]))
    np.testing.assert_array_equal(loaded.apply(loaded.variables, input_ids=INPUTS["input_ids"]), full)
    np.testing.assert_allclose(full[0], EXPECTED[0], rtol=0, atol=1e-5)  # its mask is all ones
    other = loaded.apply(loaded.variables, INPUTS["input_ids"], None, jnp.ones_like(INPUTS["input_ids"]))
    assert jnp.abs(other - full).max() > 1e-3  # token types are read


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_changes_nothing(model, pooling):
    if pooling != "pooler":
        as_sentence_model(model, {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[pooling])
    loaded = bert.load(model)
    assert loaded.config.pooling == pooling
    ids, mask = INPUTS["input_ids"][1:], INPUTS["attention_mask"][1:]
    short = loaded.apply(loaded.variables, ids[:, :6])
    np.testing.assert_allclose(loaded.apply(loaded.variables, ids, mask), short, rtol=0, atol=1e-6)


def test_sentence_model_reads_the_mean_of_the_tokens(model):
    as_sentence_model(model)
    loaded = bert.load(model, num_labels=2, seed=5)
    assert loaded.new == ("params/classifier/bias", "params/classifier/kernel")
    assert loaded.names["params/encoder/layer_0/mlp/up/kernel"].name == "bert.encoder.layer.0.intermediate.dense.weight"
    out, captured = loaded.apply(loaded.variables, **INPUTS, capture_intermediates=True, mutable=["intermediates"])
    [hidden] = captured["intermediates"]["encoder"]["__call__"]
    mask = np.asarray(INPUTS["attention_mask"], np.float32)[:, :, None]
    mean = (np.asarray(hidden) * mask).sum(1) / mask.sum(1)
    head = loaded.variables["params"]["classifier"]
    np.testing.assert_allclose(out, mean @ np.asarray(head["kernel"]), rtol=0, atol=1e-6)
    assert out.shape == (2, 2) and float(jnp.abs(head["kernel"]).max()) > 0


def test_new_head_comes_from_the_seed():
    kernels = [
        bert.load(DATA / "base", num_labels=2, seed=seed).variables["params"]["classifier"]["kernel"] for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert float(jnp.abs(kernels[0] - kernels[2]).max()) > 0
    assert bert.load(DATA / "base", num_labels=3).new == ()


def test_bfloat16(lenient):
    loaded = bert.load(DATA / "base", dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {"bfloat16"}
    out = logits(loaded)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), EXPECTED, rtol=0, atol=2e-2 * np.abs(EXPECTED).max())


def test_every_kernel_takes_a_pair():
    loaded = bert.load(DATA / "base")
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), loaded.apply, loaded.variables, **INPUTS)
    assert set(adapters) == {path for path in loaded.names if path.endswith("/kernel")}
    out = lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), **INPUTS)
    np.testing.assert_array_equal(out, logits(loaded))


def test_too_many_tokens():
    loaded = bert.load(DATA / "base")
    with pytest.raises(ValueError, match=r"input_ids has the shape \(1, 33\), but the model has 32 positions"):
        loaded.apply(loaded.variables, jnp.zeros((1, 33), jnp.int32))


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
BAD = {
    "other architecture": (lambda d: configure(d, model_type="mpnet"), "model_type is 'mpnet'"),
    "relative positions": (
        lambda d: configure(d, position_embedding_type="relative_key"),
        "position_embedding_type is 'relative_key'; only 'absolute'",
    ),
    "unknown activation": (lambda d: configure(d, hidden_act="softmax"), "hidden_act 'softmax' is not one of gelu"),
    "heads do not divide": (lambda d: configure(d, num_attention_heads=5), "hidden_size 32, num_attention_heads 5"),
    "size missing": (lambda d: configure(d, vocab_size=None), "it lacks vocab_size"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object, not list"),
    "tensor missing": (lambda d: rewrite(d, lambda n: None if n == QUERY else n), f"lacks the tensors {QUERY}"),
    "tensor unexpected": (lambda d: rewrite(d, extra=np.zeros(2)), "has unexpected tensors extra"),
    "layer missing in config": (
        lambda d: configure(d, num_hidden_layers=1),
        "unexpected tensors bert.encoder.layer.1.",
    ),
    "wrong shape": (
        lambda d: configure(d, intermediate_size=40),
        r"output.dense.weight has the shape \(32, 48\); the configuration asks for \(32, 40\)",
    ),
    "truncated": (truncate, "model.safetensors is truncated or not a safetensors file"),
    "max pooling": (lambda d: as_sentence_model(d, "pooling_mode_max_tokens"), "mean or first-token pooling"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directory(model, case):
    spoil, message = BAD[case]
    spoil(model)
    with pytest.raises(ValueError, match=message):
        bert.load(model)


def test_missing_files(model):
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        bert.load(model / "nothing")
    (model / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        bert.load(model)

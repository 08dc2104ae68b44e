"""What `lora-jax export` says, and how it writes what not every reader of the formats knows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax.command import cli, hf_export, options, run
from lora_jax.command.tasks.base import digest
from lora_jax.models import llama
from tests.support import tiny_lm


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a model that is stored in bfloat16."""
    directory = tmp_path_factory.mktemp("home")
    tiny_lm.model(directory / "model")
    file = directory / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(half, file, metadata={"format": "pt"})
    return directory


def make_run(home, name, scale=1.0, **changes):
    """A run whose pairs have seen no training: B is drawn, too."""
    model = llama.load(home / "model")
    config = options.new_run("lm", {"model": str(home / "model"), "rank": 4, "alpha": 16.0, "scaling": "rslora"})
    config = dataclasses.replace(config, model_sha256=digest(home / "model"), date="2025-01-01")
    lora = dataclasses.replace(config.lora, init="orthogonal", **changes)
    adapters = lj.init(jax.random.key(0), lora, model.apply, model.variables, jnp.ones((1, 4), jnp.int32))
    drawn = jax.tree.map(lambda leaf: scale * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    run.create(home / name, config)
    lj.checkpoint.save(home / name / "adapters", drawn, config=lora)
    return model, drawn


def export(home, name, form, capsys):
    """The directory, and what was said."""
    assert cli.main(["export", str(home / name), "--format", form]) == 0
    return home / name / form, capsys.readouterr().err


def test_every_reader_of_the_format_finds_the_scale_of_rslora(home, capsys):
    """`lora_alpha / r`, with no `use_rslora` and no patterns."""
    model, adapters = make_run(home, "rslora")
    directory, said = export(home, "rslora", "peft", capsys)
    fields = json.loads((directory / "adapter_config.json").read_text())
    assert fields["lora_alpha"] / fields["r"] == 16 / np.sqrt(4) and not fields["use_rslora"] and said == ""
    assert not fields["rank_pattern"] and not fields["alpha_pattern"]
    loaded = lj.peft.load(directory, model.variables, names=model.names)
    assert {pair.scale for pair in loaded.values()} == {8.0}
    for path, pair in adapters.items():
        np.testing.assert_allclose(loaded[path].delta(), pair.delta(), rtol=1e-6)


def test_several_ranks_are_said_and_can_be_made_one(home, capsys, tmp_path):
    model, adapters = make_run(home, "ranks", rank_pattern={"q_proj": 2})
    directory, said = export(home, "ranks", "peft", capsys)
    assert "lora-jax: note: the pairs have several ranks or scales" in said
    fields = json.loads((directory / "adapter_config.json").read_text())
    assert len(fields["rank_pattern"]) == 2 and fields["r"] == 4
    one = lj.algebra.pad_rank(lj.algebra.fold_scale(adapters), 4)
    lj.peft.save(tmp_path, one, names=model.names)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"], fields["rank_pattern"], fields["alpha_pattern"]) == (4, 4, {}, {})
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    change = (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).T
    np.testing.assert_allclose(change, adapters["params/layer_0/self_attn/q_proj/kernel"].delta(), rtol=1e-5, atol=1e-5)


def test_what_rounding_takes_off_a_merged_model_is_said(home, capsys):
    """A change that is small beside the kernels is lost in part where these are stored in bfloat16."""
    model, adapters = make_run(home, "small", scale=0.002)
    directory, said = export(home, "small", "merged", capsys)
    merged, exact = llama.load(directory).variables, lj.merge(model.variables, adapters)
    distance = lambda one, other: sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(*map(jax.tree.leaves, (one, other)))) ** 0.5
    share = distance(merged, exact) / distance(exact, model.variables)
    assert 0.3 < share < 1 and f"which takes {share:.1%} off what the adapters change; --format peft keeps all" in said
    make_run(home, "large")
    _, said = export(home, "large", "merged", capsys)
    assert said == ""


def test_a_head_that_was_the_embedding_is_stored_as_it_was(home, tmp_path):
    model, dtypes = llama.load(home / "model", tie=False), hf_export.stored_dtypes(home / "model")
    hf_export.write(tmp_path, model.variables, {}, model.names, llama.hf_config(model.config), dtypes)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" in tensors and {tensor.dtype for tensor in tensors.values()} == {np.dtype(jnp.bfloat16)}


def test_a_model_that_moved(home, capsys):
    """The run says where to write its new place, and whether it is the same is checked."""
    make_run(home, "moved")
    (home / "model").rename(home / "elsewhere")
    try:
        assert cli.main(["export", str(home / "moved"), "--format", "peft"]) == 2
        assert "if it has moved, write its new place into 'model' of the run's config.json" in capsys.readouterr().err
        file = home / "moved" / "config.json"
        file.write_text(file.read_text().replace(str(home / "model"), str(home / "elsewhere")))
        assert export(home, "moved", "peft", capsys)[1] == ""
    finally:
        (home / "elsewhere").rename(home / "model")

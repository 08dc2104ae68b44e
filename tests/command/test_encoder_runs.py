"""Runs of the command on an encoder of each family: the head is trained whole, and what is exported has the run's logits."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.command import cli, run
from lora_jax.models import bert
from tests.support import tiny
from tests.support.marks import slow_unless

FAMILIES = pathlib.Path(__file__).parents[1] / "data" / "families"
ARCHITECTURES = {
    "distilbert": "DistilBertForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "modernbert": "ModernBertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
}
IDS = jnp.arange(2, 14, dtype=jnp.int32).reshape(2, 6)

pytestmark = pytest.mark.usefixtures("usual_promotion")


def call(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("case", slow_unless(lambda case: case == "roberta", ARCHITECTURES))
def test_a_run_and_its_exports(case, tmp_path, capsys):
    tiny.model(tmp_path / "model", FAMILIES / case / "base")
    tiny.reviews(tmp_path / "reviews.csv", 60)
    few = ["--targets", "qkv" if case == "modernbert" else "query", "down/kernel", "--max-length", 8]
    call(capsys, *tiny.options(tmp_path, tmp_path / "run", 8), *few)
    base = bert.load(tmp_path / "model", num_labels=2, seed=run.read_config(tmp_path / "run").seed)
    adapters = lj.checkpoint.load(tmp_path / "run" / "adapters")
    whole = {path for path, adapter in adapters.items() if isinstance(adapter, lj.Full)}
    assert whole == {path for path in base.names if path.startswith("params/classifier/")}
    logits = lj.lora(base.apply)(lj.attach(base.variables, adapters), IDS)
    assert float(jnp.abs(logits - base.apply(base.variables, IDS)).max()) > 1e-3

    call(capsys, "export", tmp_path / "run", "--format", "merged", "--out", tmp_path / "merged")
    merged = bert.load(tmp_path / "merged")
    assert merged.labels == ("bad", "good") and not merged.new
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["architectures"] == [ARCHITECTURES[case]]
    np.testing.assert_allclose(merged.apply(merged.variables, IDS), logits, rtol=0, atol=1e-5)

    call(capsys, "export", tmp_path / "run", "--format", "peft", "--out", tmp_path / "peft")
    call(capsys, "import", tmp_path / "peft", "--model", tmp_path / "model", "--out", tmp_path / "again")
    said = [call(capsys, "predict", tmp_path / name, "--text", "good film").split("\t")[1] for name in ("run", "again")]
    assert said[0] == said[1]


@pytest.mark.slow
def test_a_checkpoint_without_prefix_is_merged_in_its_own_dtype(tmp_path, capsys):
    tiny.model(tmp_path / "model", FAMILIES / "modernbert" / "base")
    tiny.reviews(tmp_path / "reviews.csv", 60)
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor.astype(jnp.bfloat16) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    call(capsys, *tiny.options(tmp_path, tmp_path / "run", 2), "--targets", "qkv", "--max-length", 8)
    call(capsys, "export", tmp_path / "run", "--format", "merged", "--out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {np.dtype(jnp.bfloat16)}

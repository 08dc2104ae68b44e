"""`lora-jax` on quantised bases: training and going on, using a run, exporting it, and what is refused."""

import json
import re
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax.command import cli, predict, run
from lora_jax.command.tasks import classify, lm
from lora_jax.core import paths
from lora_jax.models import llama
from tests.support import interrupting, tiny, tiny_lm
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion")


def call(arguments, capsys, code=0):
    """Run the command in this process; returns what it printed."""
    found = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lm.home(tmp_path_factory.mktemp("home"))


def options(home, out):
    return tiny_lm.options(home, out, steps=9, quantize="nf4", block=16)


@pytest.fixture(scope="module")
def reference(home):
    """A run that was never stopped."""
    assert cli.main(options(home, home / "reference")) == 0
    return home / "reference"


@pytest.mark.slow
def test_a_stopped_run_ends_alike(home, reference, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 4)
        call(options(home, tmp_path / "run"), capsys, code=130)
    call(["finetune", "--resume", tmp_path / "run"], capsys)
    ours, theirs = (lj.checkpoint.load(directory / "adapters") for directory in (tmp_path / "run", reference))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert lasting(tmp_path / "run") == lasting(reference)


def test_the_base_of_a_run_is_quantised(reference):
    config = run.read_config(reference)
    assert (config.quantize, config.block) == ("nf4", 16)
    leaves, _ = paths.flatten(lm.load_base(lm.base_directory(config), config).model.variables)
    assert {leaf.qtype for leaf in leaves.values() if paths.is_quantized(leaf)} == {"nf4"}
    assert sum(map(paths.is_quantized, leaves.values())) == 14
    scores = [json.loads(line)["perplexity"] for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert scores[-1] < 0.5 * scores[0]


@pytest.mark.slow
def test_generate(home, reference, capsys):
    asked = ["generate", reference, "--prompt", "The cat", "--max-new-tokens", 6]
    loaded = llama.load(home / "model", quantize="nf4", block=16)
    for arguments, adapters in (([], lj.checkpoint.load(reference / "adapters")), (["--base"], {})):
        dense = lj.merge(loaded.variables, adapters, quantized="dense") if adapters else loaded.variables
        params = jax.tree.map(lj.quant.dense, dense, is_leaf=paths.is_quantized)
        ids, logits_of = tiny_lm.tokenizer().encode("The cat").ids, jax.jit(loaded.apply)
        for _ in range(6):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(logits_of(params, padded)[0, len(ids) - 1].argmax()))
            if ids[-1] == 2:
                break
        assert call([*asked, *arguments], capsys).out == tiny_lm.tokenizer().decode(ids) + "\n"


def test_inspect(reference, capsys):
    rows = {line.split()[0]: line.split()[1:] for line in call(["inspect", reference], capsys).out.splitlines()[1:]}
    assert set(rows) == set(lj.checkpoint.load(reference / "adapters"))
    assert all(float(row[3]) > 0 for row in rows.values())


def test_export(home, reference, tmp_path, capsys):
    """Into the base as it is stored, and it says so."""
    printed = call(["export", reference, "--format", "merged", "--out", tmp_path / "out"], capsys)
    assert "kernels quantised to nf4 and are folded into the base as it is stored" in printed.err
    written, loaded = llama.load(tmp_path / "out"), llama.load(home / "model")
    want = lj.merge(loaded.variables, lj.checkpoint.load(reference / "adapters"))
    jax.tree.map(np.testing.assert_array_equal, written.variables, want)
    printed = call(["export", reference, "--format", "peft", "--out", tmp_path / "peft"], capsys)
    assert "trained beside kernels quantised to nf4; with the base as it is stored" in printed.err
    assert len(safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")) == 28


@pytest.mark.slow
def test_a_classifier(tmp_path, capsys):
    tiny.model(tmp_path / "model")
    tiny.reviews(tmp_path / "reviews.csv", count=60)
    few = ["--max-length", 8, "--targets", "query"]
    call([*tiny.options(tmp_path, tmp_path / "run", steps=3), *few, "--quantize", "int8", "--block", 8], capsys)
    base = classify.load_base(tmp_path / "model", run.read_config(tmp_path / "run"))
    leaves, _ = paths.flatten(base.model.variables)
    assert sum(map(paths.is_quantized, leaves.values())) == 6 * base.model.config.num_hidden_layers
    assert "classifier/kernel" in call(["inspect", tmp_path / "run"], capsys).out
    params = lj.attach(base.model.variables, lj.checkpoint.load(tmp_path / "run" / "adapters"))
    ids = np.array([base.tokenizer.encode("lovely plot").ids])
    want = jax.nn.softmax(lj.lora(base.model.apply)(params, ids))[0]
    [found] = predict.predict(tmp_path / "run", ["lovely plot"])
    np.testing.assert_allclose([found["bad"], found["good"]], want, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantize", "int3"], "quantize must be one of 'nf4', 'int4', 'int8', 'fp8', not 'int3'"),
        (["--quantize", "nf4", "--block", "0"], "block must be None or a whole number of at least 1, not 0"),
        (["--block", "32"], "block is for a quantised base: leave it out, or say how to quantise"),
        (
            ["--quantize", "nf4", "--init", "pissa"],
            "init='pissa' takes a part off the base's kernels, which quantize='nf4' has rounded",
        ),
        (
            ["--quantize", "nf4"],
            r"no axis of params/layer_0/self_attn/q_proj/kernel of the shape \(32, 32\) can be cut into blocks of 64",
        ),
    ],
)
def test_what_is_refused(home, tmp_path, capsys, arguments, message):
    given = ["finetune", "--task", "lm", "--model", home / "model", "--data", home / "texts.jsonl", "--max-length", 48]
    printed = call([*given, "--out", tmp_path / "run", *arguments], capsys, code=2)
    assert re.search(message, printed.err)
    assert not (tmp_path / "run").exists()


def test_without_qwix(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    printed = call(options(home, tmp_path / "run"), capsys, code=2)
    assert printed.err == "lora-jax: the package qwix is missing: pip install 'lora-jax[quant]'\n"

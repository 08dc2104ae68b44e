"""Runs of the task `images` on a tiny ViT: they learn, go on as if never stopped, and refuse what they can't use."""

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.command import cli, run
from lora_jax.models import vision
from tests.support import interrupting, tiny_images
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion")
STEPS = 120
FAMILIES = pathlib.Path(__file__).parents[1] / "data" / "families"
PIXELS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 3)), jnp.float32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the model and the images."""
    return tiny_images.home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def reference(home):
    """A run that was never stopped."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(tiny_images.options(home, home / "run", STEPS)) == 0
    return home / "run"


def refused(arguments, message, capsys):
    assert cli.main([str(x) for x in arguments]) == 2
    assert message in capsys.readouterr().err


def test_it_learns(reference):
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    tested = {line["step"]: line["test_accuracy"] for line in lines if line["test_accuracy"] is not None}
    assert list(tested) == [0, 40, 80, 120]
    assert tested[0] < 0.5 and tested[120] > 0.85  # a third says what the most frequent class is
    assert np.mean([line["loss"] for line in lines[-20:]]) < 0.4
    config = run.read_config(reference)
    assert config.labels == ["across", "along", "plain"] and (config.crop, config.flip) == (0.5, True)


def test_predict(home, reference, capsys):
    files = [home / "images" / label / f"{i}.png" for i, label in enumerate(tiny_images.LABELS)]
    assert cli.main(["predict", str(reference), *(str(x) for file in files for x in ("--image", file))]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [label for label, *_ in lines] == list(tiny_images.LABELS)
    assert [file for *_, file in lines] == [str(file) for file in files]
    assert all(1 / 3 < float(probability) <= 1 for _, probability, _ in lines)
    refused(["predict", reference, "--text", "a"], "use `lora-jax predict --image` with it, not `predict`", capsys)
    refused(["predict", reference, "--image", home / "none.png"], "none.png can't be read as an image", capsys)


def test_eval(home, reference, capsys):
    config = run.read_config(reference)
    capsys.readouterr()
    assert cli.main(["eval", str(reference), "--data", config.data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["run"]
    counts = np.array(found["confusion"])
    files = [len(list((pathlib.Path(config.data) / label).iterdir())) for label in config.labels]
    assert counts.sum(1).tolist() == files and found["accuracy"] == pytest.approx(np.trace(counts) / sum(files))
    assert found["accuracy"] > 0.85 and list(found["classes"]) == list(config.labels)


def test_inspect(reference, capsys):
    assert cli.main(["inspect", str(reference)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert set(rows) == set(lj.checkpoint.load(reference / "adapters"))
    assert rows["params/embeddings/patch/kernel"][:2] == ["4x4x3x32", "4"]
    assert float(rows["params/encoder/layer_1/mlp/up/kernel"][3]) > 0.01


def logits(directory):
    """Those of a merged model for the same images."""
    loaded = vision.load(directory)
    return loaded.labels, loaded.apply(loaded.variables, PIXELS)


def test_export_and_import(home, reference, tmp_path, capsys):
    loaded = vision.load(home / "model", num_labels=3)
    adapters = lj.checkpoint.load(reference / "adapters")
    expected = lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), PIXELS)
    for form in ("merged", "peft"):
        assert cli.main(["export", str(reference), "--format", form, "--out", str(tmp_path / form)]) == 0
    labels, found = logits(tmp_path / "merged")
    assert labels == tuple(tiny_images.LABELS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    fields = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert fields["architectures"] == ["ViTForImageClassification"] and fields["id2label"]["1"] == "along"
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    stored = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert stored == tiny_images.PREPROCESSOR
    assert cli.main(["import", str(tmp_path / "peft"), "--model", str(home / "model"), "--out", str(tmp_path / "run")]) == 0
    again = lj.checkpoint.load(tmp_path / "run" / "adapters")
    assert set(again) == set(adapters)
    found = lj.lora(loaded.apply)(lj.attach(loaded.variables, again), PIXELS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert run.read_config(tmp_path / "run").task == "images"


@pytest.mark.parametrize("case", ["vit", "dinov2", "dinov2_gated"])
def test_adapters_of_peft(case, tmp_path, capsys):
    """Imported and folded in, they give the logits that PEFT gave."""
    shutil.copytree(FAMILIES / case / "base", tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text(json.dumps(tiny_images.PREPROCESSOR))
    out, run = str(tmp_path / "merged"), str(tmp_path / "run")
    assert cli.main(["import", str(FAMILIES / case / "adapter"), "--model", str(tmp_path / "base"), "--out", run]) == 0
    assert cli.main(["export", run, "--format", "merged", "--out", out]) == 0
    assert ("which older versions can't read" in capsys.readouterr().err) == (case == "dinov2_gated")
    loaded = vision.load(out)
    pixels = load_file(FAMILIES / case / "inputs.safetensors")["pixel_values"].transpose(0, 2, 3, 1)
    expected = load_file(FAMILIES / case / "expected.safetensors")["output"]
    np.testing.assert_allclose(loaded.apply(loaded.variables, pixels), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_stopped_run_ends_as_one_that_was_not(home, reference, tmp_path):
    directory = tmp_path / "run"
    for stop, begin in ((7, tiny_images.options(home, directory, STEPS)), (31, ["finetune", "--resume", str(directory)])):
        with pytest.MonkeyPatch.context() as patch:
            interrupting.at_step(patch, stop)
            assert cli.main(begin) == 130
        assert lj.checkpoint.restore(directory / "adapters").step == stop
    assert cli.main(["finetune", "--resume", str(directory)]) == 0
    ours, theirs = (jax.tree.leaves(lj.checkpoint.load(d / "adapters")) for d in (directory, reference))
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert lasting(directory) == lasting(reference)
    for file in ("curve.png", "config.json"):
        assert (directory / file).read_bytes() == (reference / file).read_bytes(), file


@pytest.mark.slow
def test_sweep(home, tmp_path, capsys):
    line = tiny_images.options(home, tmp_path / "sweep", 6)
    assert cli.main(["sweep", *line[1:], "--seed", "0", "3"]) == 0
    assert cli.main([*tiny_images.options(home, tmp_path / "alone", 6), "--seed", "3"]) == 0
    several, one = (lj.checkpoint.load(tmp_path / d / "adapters") for d in ("sweep/2", "alone"))
    assert set(several) == set(one)
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (several, one)]
    np.testing.assert_allclose(*flat, rtol=0, atol=1e-3 * np.abs(flat[1]).max())


@pytest.mark.slow
def test_other_ways(home, tmp_path, capsys):
    line = tiny_images.options(home, tmp_path / "run", 2)
    assert cli.main([*line, "--no-flip", "--crop", "1", "--accumulate", "2", "--dtype", "bfloat16", "--mesh", "data=8"]) == 0
    assert "in training: no crops, never mirrored" in capsys.readouterr().out
    line = tiny_images.options(home, tmp_path / "quantised", 2)
    assert cli.main([*line, "--quantize", "int8", "--block", "16", "--init", "orthogonal"]) == 0


def test_bad_options(home, tmp_path, capsys):
    line = tiny_images.options(home, tmp_path / "run", 2)

    def without(option):
        place = line.index(option)
        return line[:place] + line[place + 2 :]

    refused(without("--model"), "--task images has no model of its own: give --model", capsys)
    refused(without("--data"), "--task images has no data of its own: give --data", capsys)
    for option, tasks in {
        "--max-length": "classify and lm and dpo",
        "--label-field": "classify",
        "--attention-block": "lm and dpo",
    }.items():
        value = {"--max-length": "8", "--label-field": "a", "--attention-block": "8"}[option]
        refused([*line, option, value], f"{option} is an option of --task {tasks}; leave it out of --task images", capsys)
    refused([*line, "--crop", "0"], "crop must be", capsys)
    refused([*without("--task"), "--no-flip"], "--flip is an option of --task images; leave it out of --task classify", capsys)


def test_what_changed_since_the_run_began(home, reference, tmp_path, capsys):
    for name in ("model", "images", "run"):
        shutil.copytree(home / name, tmp_path / name)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config |= {"model": str(tmp_path / "model"), "data": str(tmp_path / "images")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    resume = ["finetune", "--resume", tmp_path / "run"]
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(tiny_images.PREPROCESSOR | {"resample": 3}))
    refused(resume, "the preprocessor_config.json of the run's model has changed, so the run can't go on", capsys)
    file.write_text(json.dumps(tiny_images.PREPROCESSOR))
    (tmp_path / "images" / "plain" / "2.png").unlink()
    refused(resume, "has changed since the run began", capsys)


def test_without_pillow(home, tmp_path, capsys, monkeypatch):
    for module in ("lora_jax.command.tasks.images", "lora_jax.data.images", "lora_jax.data.pixels"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    line = tiny_images.options(home, tmp_path / "run", 2)
    refused(line, "the package PIL is missing: pip install 'lora-jax[images]'", capsys)

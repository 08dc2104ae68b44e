"""Runs of the command on a tiny BERT: what they write, and that a stopped run ends as one that was never stopped.

`LORA_JAX_KILLS` and `LORA_JAX_KILL_STEPS` make the test with `kill -9` larger: 20 kills of a 30-second run, say.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import cli, metrics, plots, predict, run
from lora_jax.command.tasks import classify
from tests.support import tiny
from tests.support.run_lines import lasting

STEPS = 120
KILLS = int(os.environ.get("LORA_JAX_KILLS", "2"))
KILL_STEPS = int(os.environ.get("LORA_JAX_KILL_STEPS", str(STEPS)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with the model and the texts."""
    return tiny.home(tmp_path_factory.mktemp("home"))


def uninterrupted(home, directory, steps):
    began = time.monotonic()
    code, output = tiny.finish(*tiny.options(home, directory, steps))
    assert code == 0, output
    return directory, output, time.monotonic() - began


@pytest.fixture(scope="module")
def reference(home):
    """A run that was never stopped, what it printed, and its seconds."""
    return uninterrupted(home, home / "reference", STEPS)


FIELDS = ("step", "loss", "test_accuracy", "learning_rate", "grad_norm", "skipped", "examples_per_second")


def same(directory, reference):
    """Assert that two runs ended alike, bit for bit."""
    ours, theirs = (jax.tree.leaves(lj.checkpoint.load(d / "adapters")) for d in (directory, reference))
    assert len(ours) == len(theirs) > 20
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert lasting(directory) == lasting(reference)
    for file in ("curve.png", "config.json"):
        assert (directory / file).read_bytes() == (reference / file).read_bytes(), file


def test_run_directory(reference):
    directory, *_ = reference
    assert sorted(entry.name for entry in directory.iterdir()) == [
        "adapters",
        "config.json",
        "curve.png",
        "metrics.jsonl",
        "report.html",
    ]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert all(tuple(line) == FIELDS for line in lines)
    for field in ("loss", "learning_rate", "grad_norm", "examples_per_second"):
        assert [line["step"] for line in lines if line[field] is None] == [0]
    assert [line["skipped"] for line in lines] == [0] * (STEPS + 1)
    tested = {line["step"]: line["test_accuracy"] for line in lines if line["test_accuracy"] is not None}
    assert list(tested) == [0, 40, 80, 120]
    assert tested[0] < 0.7 and tested[120] > 0.95 and lines[-1]["loss"] < 0.1
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = run.read_config(directory)
    assert config.labels == ["bad", "good"] and config.steps == STEPS and config.text_field == "review"


def test_what_is_printed(reference):
    _, output, _ = reference
    assert re.search(r"params/encoder/layer_\*/mlp/up/kernel \(2 of them\) +32x48 +LowRank +4 ", output)
    assert re.search(r"params/classifier/kernel +32x2 +Full ", output)
    number = r"[\d.e+-]+"
    assert "160 texts to train on, 80 to test on" in output and "a new head for the labels bad, good" in output
    assert re.search(
        rf"^step 60/{STEPS}  loss \d\.\d{{3}}  grad {number}  rate {number}  \d+ examples/s  \d:\d\d left$",
        output,
        re.M,
    )
    assert re.search(r"^test accuracy on 80 texts: \d\d\.\d% before, \d+\.\d% after$", output, re.M)
    assert "adapter: 14,600 bytes, base: 77,320 bytes (18.88%)" in output
    assert not re.search(r"\x1b|Warning", output)


def test_adapters_need_nothing_of_the_command(reference):
    found = lj.checkpoint.restore(reference[0] / "adapters")
    assert found.step == STEPS and found.config == run.read_config(reference[0]).lora
    assert found.adapters["params/encoder/layer_1/attention/query/kernel"].a.shape == (32, 4)


def test_predict(reference, capsys):
    assert cli.main(["predict", str(reference[0]), "--text", "superb cast and plot", "--text", "weak plot and the film"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(label, text) for label, _, text in lines] == [
        ("good", "superb cast and plot"),
        ("bad", "weak plot and the film"),
    ]
    assert all(0.5 < float(probability) <= 1 for _, probability, _ in lines)


def test_predict_a_file(reference, tmp_path, monkeypatch, capsys):
    """In the order of the file, whatever the batches are, and without a column of labels."""
    texts = ["superb cast and plot", "weak", "the film and its plot are superb", "a superb\nfilm", "weak plot and the film"]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"review": text}) + "\n" for text in texts))
    said = [cli.main(["predict", str(reference[0]), "--text", text]) or capsys.readouterr().out for text in texts]
    monkeypatch.setattr(predict, "_BATCH", 2)
    assert cli.main(["predict", str(reference[0]), "--data", str(tmp_path / "some.jsonl")]) == 0
    assert capsys.readouterr().out == "".join(said) and said[3].endswith("\ta superb film\n")
    (tmp_path / "some.jsonl").write_text('{"texts": "weak"}\n')
    assert cli.main(["predict", str(reference[0]), "--data", str(tmp_path / "some.jsonl")]) == 2
    assert "line 1: there is no column 'review'" in capsys.readouterr().err
    assert cli.main(["predict", str(reference[0]), "--data", str(tmp_path / "some.jsonl"), "--text-field", "texts"]) == 0
    assert capsys.readouterr().out == said[1]


def test_texts_that_are_cut_are_counted(reference, capsys):
    directory, output, _ = reference
    assert "were cut" not in output  # the longest review has 15 tokens
    assert cli.main(["predict", str(directory), "--text", "plot " * 14, "--text", "plot " * 15]) == 0
    assert "note: 1 texts were longer than 16 tokens and were cut at their end" in capsys.readouterr().err
    config = run.read_config(directory)
    task = classify.prepare(dataclasses.replace(config, max_length=4, tokens_sha256="")).task
    assert "240 texts were longer than 4 tokens and were cut at their end" in task.description


def test_inspect(reference, capsys):
    directory = reference[0]
    assert cli.main(["inspect", str(directory)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    adapters = lj.checkpoint.load(directory / "adapters")
    assert set(rows) == set(adapters)
    path = "params/encoder/layer_0/mlp/up/kernel"
    shape, rank, scale, change, effective = rows[path]
    assert (shape, rank, scale) == ("32x48", "4", "4")
    delta = 4.0 * np.asarray(adapters[path].a, np.float64) @ np.asarray(adapters[path].b, np.float64)
    base = lj.models.bert.load(run.read_config(directory).model).variables["params"]["encoder"]["layer_0"]["mlp"]["up"]
    assert float(change) == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base["kernel"]), abs=1e-4)
    share = np.linalg.svd(delta, compute_uv=False)[:4] / np.linalg.svd(delta, compute_uv=False).sum()
    assert float(effective) == pytest.approx(np.exp(-(share * np.log(share)).sum()), abs=0.01)
    assert rows["params/classifier/kernel"][:3] == ["32x2", "whole", "-"]


def test_inspect_without_the_base(reference, capsys, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "adapters").symlink_to(reference[0] / "adapters")
    fields = json.loads((reference[0] / "config.json").read_text()) | {"model": str(tmp_path / "gone")}
    (directory / "config.json").write_text(json.dumps(fields))
    assert cli.main(["inspect", str(directory)]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["params/encoder/layer_0/mlp/up/kernel"][3] == "-"
    assert cli.main(["predict", str(directory), "--text", "fine"]) == 2
    assert "there is no directory" in capsys.readouterr().err


@pytest.mark.slow
def test_signals_save_and_resume_goes_on(home, reference, tmp_path):
    directory, arguments = tmp_path / "run", tiny.options(home, tmp_path / "run", STEPS)
    for signum, code, step in ((signal.SIGINT, 130, 42), (signal.SIGTERM, 143, 84)):
        process, output = tiny.start(*arguments), ""
        while f"step {step}/" not in output and process.poll() is None:
            output += process.stdout.readline()
        process.send_signal(signum)
        output += process.communicate()[0]
        assert process.returncode == code, output
        assert f"stopped by {signum.name}; go on with: lora-jax finetune --resume {directory}" in output
        assert "Traceback" not in output
        stopped = lj.checkpoint.restore(directory / "adapters")
        assert step <= stopped.step < STEPS and metrics.read(directory)[-1]["step"] == stopped.step
        arguments = ["finetune", "--resume", directory]
    with (directory / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 99, "lo')  # as a crash would leave it
    code, output = tiny.finish(*arguments)
    assert code == 0, output
    same(directory, reference[0])


@pytest.fixture(scope="module")
def kill_reference(home, reference):
    """The uninterrupted run of the test with kill -9, and its seconds."""
    found = reference if KILL_STEPS == STEPS else uninterrupted(home, home / "kill_reference", KILL_STEPS)
    return found[0], found[2]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(KILLS))
def test_kill_at_a_random_moment(home, kill_reference, tmp_path, number):
    reference, seconds = kill_reference
    directory, start = tmp_path / "run", tiny.options(home, tmp_path / "run", KILL_STEPS)
    draw = random.Random(number)
    share = (number + draw.random()) / KILLS
    process = tiny.start(*start, quiet=True)
    began = time.monotonic()
    if share < 0.2:  # before the first steps
        time.sleep(share * seconds)
    else:  # by progress, since a busy machine is slower than the reference was
        lines = (share - 0.2) / 0.8 * KILL_STEPS
        while process.poll() is None and len(metrics.read(directory)) <= lines:
            time.sleep(0.01)
        time.sleep(0.1 * draw.random())
    process.kill()
    process.wait()
    moment, found = time.monotonic() - began, metrics.read(directory)
    has_run = (directory / "config.json").exists()
    print(f"killed after {moment:.2f} s at step {found[-1]['step'] if found else None}, exit code {process.returncode}")
    code, output = tiny.finish(*(["finetune", "--resume", directory] if has_run else start))
    assert code == 0, output
    same(directory, reference)


def test_resume_of_a_finished_run_changes_nothing(home, reference, capsys):
    before = (reference[0] / "metrics.jsonl").read_bytes()
    code, output = tiny.finish("finetune", "--resume", reference[0])
    assert code == 0 and "after" in output.splitlines()[-4] and output.splitlines()[-1].startswith("report: "), output
    assert (reference[0] / "metrics.jsonl").read_bytes() == before


def test_metrics_drop_what_a_crash_cut_off_and_what_comes_again(tmp_path):
    with metrics.Log(tmp_path, 0, metrics.ACCURACY) as log:
        for step in range(6):
            log.append(step, None if step == 0 else 1.0 / step, 0.5 if step % 5 == 0 else None, {})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for cut in (whole[:-1], whole[:-20], whole + b'{"step": 6, "loss"', whole + b"\xff\x00", whole + b"null\n"):
        (tmp_path / "metrics.jsonl").write_bytes(cut)
        with metrics.Log(tmp_path, 3, metrics.ACCURACY) as log:
            assert [line["step"] for line in log.lines] == [0, 1, 2, 3]
            assert (log.score(0), log.score(5)) == ("50.0%", "unknown")
        assert whole.startswith((tmp_path / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_run_of_an_older_format(reference, tmp_path, capsys, version):
    directory = tmp_path / "run"
    shutil.copytree(reference[0], directory)
    fields = json.loads((directory / "config.json").read_text()) | {"format_version": version}
    new = ("untie", "ends", "warmup_from")
    if version < 4:
        new += ("quantize", "block")
    if version < 3:
        new += ("method", "scaling", "dora", "init", "lora_plus")
    if version == 1:
        new += ("task", "prompt_field", "completion_field", "messages_field", "held_out", "dtype", "date", "imported")
    (directory / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if k not in new}))
    assert run.read_config(directory) == dataclasses.replace(run.read_config(reference[0]), warmup_from=0)
    assert cli.main(["predict", str(directory), "--text", "superb cast"]) == 0
    assert capsys.readouterr().out.startswith("good")


def test_a_damaged_checkpoint_is_refused(reference, tmp_path, capsys):
    directory = tmp_path / "run"
    shutil.copytree(reference[0], directory)
    for file in (directory / "adapters").glob("*/meta/metadata"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 7}))
    assert cli.main(["finetune", "--resume", str(directory)]) == 2
    assert "has the format version 7" in capsys.readouterr().err


def test_curve_of_little():
    for losses in ([], [(1, 0.5)], [(1, None), (2, 0.25)]):
        lines = [{"step": 0, "loss": None, "test_accuracy": 0.5}]
        lines += [{"step": step, "loss": loss, "test_accuracy": None} for step, loss in losses]
        assert plots.draw(lines, "a $ in a_name", metrics.ACCURACY, ("chance", 0.5)).startswith(b"\x89PNG")

"""The options of a run: each does what it says, and those that do not go together are refused before any work."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import cli, config_files, metrics, processes, run
from lora_jax.command.options import new_run
from tests.support import interrupting, tiny
from tests.support.marks import every_other

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, data, and a run of six steps on them."""
    home = tiny.home(tmp_path_factory.mktemp("home"))
    train(home, home / "run")
    return home


def train(home, out, *more, steps=6, code=0):
    line = tiny.options(home, out, steps)
    if steps is None:
        at = line.index("--steps")
        line = line[:at] + line[at + 2 :]
    assert cli.main([*line, *map(str, more)]) == code
    return out


def adapters(directory, folder="adapters"):
    return lj.checkpoint.load(directory / folder)


def losses(directory):
    return [line["loss"] for line in metrics.read(directory)[1:]]


def scores(directory):
    """The accuracy of each test, by its step."""
    return {line["step"]: line["test_accuracy"] for line in metrics.read(directory) if line["test_accuracy"] is not None}


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def refused(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


# --- what is adapted --------------------------------------------------------------------------------------------------


def test_patterns(home, tmp_path):
    more = ["--exclude", "key", "value", "out", "down", "pooler", "--layers", "0-0", "--rank-pattern", "query=2"]
    more += ["--alpha-pattern", "mlp/up=12", "--train", "norm"]
    out = train(home, tmp_path / "run", *more, steps=1)
    found = adapters(out)
    pairs = {path: pair for path, pair in found.items() if isinstance(pair, lj.LowRank)}
    assert {path.rsplit("/", 2)[1]: (pair.rank, pair.scale) for path, pair in pairs.items()} == {
        "query": (2, 8.0),
        "up": (4, 3.0),
    }
    assert all("layer_0" in path for path in pairs)
    whole = [path for path in found if path not in pairs]
    assert any("norm" in path for path in whole) and any("classifier" in path for path in whole)


def test_a_pattern_that_matches_nothing(home, tmp_path, capsys):
    line = tiny.options(home, tmp_path / "run")
    for option, value in {"--exclude": "nothing", "--rank-pattern": "nothing=2", "--train": "nothing", "--layers": "9"}.items():
        assert value.partition("=")[0] in refused(capsys, *line, option, value)
    assert not (tmp_path / "run").exists()


# --- how it is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        ["--dropout", "0.5"],
        pytest.param(["--max-grad-norm", "0.01"], marks=pytest.mark.slow),
        pytest.param(["--weight-decay", "0.5"], marks=pytest.mark.slow),
        pytest.param(["--warmup", "3"], marks=pytest.mark.slow),
        pytest.param(["--schedule", "linear"], marks=pytest.mark.slow),
        pytest.param(["--min-rate", "0.004"], marks=pytest.mark.slow),
        ["--optimizer", "lion"],
    ],
)
def test_an_option_changes_the_losses(home, tmp_path, more):
    usual, found = losses(home / "run"), losses(train(home, tmp_path / "run", *more))
    assert found != usual and all(np.isfinite(found))
    if more[0] not in ("--dropout", "--schedule"):
        assert found[0] == usual[0]  # they change what a step does, and not what it begins with


@pytest.mark.slow
def test_gradients_that_are_not_clipped(home, tmp_path):
    """Those of the run are shorter than 1, to which they are clipped."""
    assert losses(train(home, tmp_path / "run", "--max-grad-norm", 0)) == losses(home / "run")


@pytest.mark.slow
def test_microbatches_add_up(home, tmp_path):
    found = losses(train(home, tmp_path / "run", "--accumulate", 4))
    np.testing.assert_allclose(found, losses(home / "run"), rtol=1e-4)


def test_epochs(home, tmp_path, capsys):
    out = train(home, tmp_path / "run", "--epochs", "0.5", steps=None)
    assert "0.5 epochs are 5 steps" in capsys.readouterr().out  # of 16, from 160 texts
    assert run.read_config(out).steps == 5 and len(losses(out)) == 5
    message = "--epochs says in another way what --steps does: leave one of the two out"
    assert message in refused(capsys, *tiny.options(home, tmp_path / "other"), "--epochs", 2)


# --- tests and checkpoints --------------------------------------------------------------------------------------------


def test_data_that_is_held_out(home, tmp_path, capsys):
    file = tiny.reviews(tmp_path / "held_out.csv", 24)
    out = train(home, tmp_path / "run", "--eval-data", file, steps=2)
    assert "240 texts to train on, 24 to test on" in capsys.readouterr().out
    shutil.rmtree(out / "adapters" / "2")
    file.write_text(file.read_text() + "good,good\n")
    assert "held_out.csv has changed since the run began" in refused(capsys, "finetune", "--resume", out)
    file.write_text("review,verdict\ngood,good\nbad,bad\nwell,unknown\n")
    line = tiny.options(home, tmp_path / "other")
    assert "has the labels unknown, which" in refused(capsys, *line, "--eval-data", file)


def test_steps_between_tests_and_checkpoints(home, tmp_path):
    out = train(home, tmp_path / "run", "--eval-every", 2, "--save-every", 5)
    assert list(scores(out)) == [0, 2, 4, 6]
    assert sorted(int(folder.name) for folder in (out / "adapters").iterdir()) == [5, 6]
    same(adapters(out), adapters(home / "run"))


IDLE = ["--learning-rate", "1e-9", "--eval-every", "1", "--keep", "best"]  # no test is better than the first


def test_the_best_adapters_are_kept(home, tmp_path, capsys):
    out = train(home, tmp_path / "run", *IDLE, steps=2)
    assert "(of step 0, the best)" in capsys.readouterr().out
    assert [folder.name for folder in (out / "best").iterdir()] == ["0"]
    kept, last = run.load_adapters(out), adapters(out)
    same(kept, adapters(out, "best"))
    pairs = [path for path, pair in kept.items() if isinstance(pair, lj.LowRank)]
    assert all((kept[path].b == 0).all() and (last[path].b != 0).any() for path in pairs)
    better = train(home, tmp_path / "better", "--keep", "best", steps=40)
    assert scores(better)[40] > 0.9 and [folder.name for folder in (better / "best").iterdir()] == [
        str(max(scores(better), key=lambda step: (scores(better)[step], -step)))
    ]


def test_a_run_stops_when_it_gets_no_better(home, tmp_path, capsys, monkeypatch):
    """And goes on after an interruption to the same end, and further after it."""
    out = train(home, tmp_path / "run", *IDLE, "--patience", 3)
    assert "stopped at step 3: 3 tests in a row were no better than the best" in capsys.readouterr().out
    found = scores(out)
    assert list(found) == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 2)
        train(home, tmp_path / "stopped", *IDLE, "--patience", 3, code=130)
    assert cli.main(["finetune", "--resume", str(tmp_path / "stopped")]) == 0
    for name in ("adapters", "best"):
        same(adapters(tmp_path / "stopped", name), adapters(out, name))
    assert scores(tmp_path / "stopped") == found
    assert cli.main(["finetune", "--resume", str(out)]) == 0 and scores(out) == found  # it has ended
    assert cli.main(["finetune", "--resume", str(out), "--steps", "1"]) == 0
    assert max(scores(out)) == 4 and list(run.read_config(out).finished) == [3]


def test_the_best_is_told_to_other_processes(home, tmp_path, monkeypatch):
    """In JSON, as `processes.from_first` does where there are several."""
    out = train(home, tmp_path / "run", *IDLE, "--patience", 2)
    want, told = scores(out), processes.from_first
    monkeypatch.setattr(processes, "from_first", lambda value: told(json.loads(json.dumps(value))))
    assert cli.main(["finetune", "--resume", str(out)]) == 0 and scores(out) == want


def test_a_crash_before_the_best_was_kept(home, tmp_path):
    out = train(home, tmp_path / "run", *IDLE, steps=1)
    want = adapters(out, "best")
    shutil.rmtree(out / "adapters" / "1")
    shutil.rmtree(out / "best")
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    same(adapters(out, "best"), want)


@pytest.mark.parametrize(
    "more", every_other([["--optimizer", "muon", "--schedule", "wsd", "--dropout", "0.1"], ["--optimizer", "adafactor"]])
)
def test_resume_is_exact(home, tmp_path, monkeypatch, more):
    want = adapters(train(home, tmp_path / "run", *more))
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 3)
        train(home, tmp_path / "stopped", *more, code=130)
    assert cli.main(["finetune", "--resume", str(tmp_path / "stopped")]) == 0
    same(adapters(tmp_path / "stopped"), want)


def test_a_sweep_has_no_patience(home, tmp_path, capsys):
    line = ["sweep", *tiny.options(home, tmp_path / "sweep")[1:], "--patience", 1, "--seed", 0, 1]
    assert "the runs of a sweep end together: leave --patience out" in refused(capsys, *line)


@pytest.mark.slow
def test_a_sweep_keeps_the_best_of_each_run(home, tmp_path):
    line = tiny.options(home, tmp_path / "sweep", 8)
    at = line.index("--learning-rate")
    line = ["sweep", *line[1:at], *line[at + 2 :], *IDLE[2:], "--learning-rate", "0.01", "1e-9"]
    assert cli.main(line) == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())["runs"]
    for result in results:
        directory = tmp_path / "sweep" / result["run"]
        assert result["test_accuracy"] == max(scores(directory).values())
        assert len(list((directory / "best").iterdir())) == 1 and (directory / "adapters" / "8").is_dir()


# --- configuration files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'rank = 2\nlearning-rate = 1e-4\nlayers = ["0-1"]\nrank_pattern = {query = 4}\n'),
        ("a.yaml", "rank: 2\nlearning-rate: 1e-4\nlayers: [0, 1]\nrank_pattern: {query: 4}\n"),
        ("a.json", '{"rank": 2, "learning_rate": 1e-4, "layers": [0, 1], "rank_pattern": {"query": 4}}'),
    ],
)
def test_options_of_a_file(home, tmp_path, capsys, name, text):
    (tmp_path / name).write_text(text)
    assert cli.main(["finetune", "--config", str(tmp_path / name), "--rank", "8", "--print-config"]) == 0
    printed = capsys.readouterr().out
    for line in ("rank: 8", "learning_rate: 0.0001", "layers:\n- 0\n- 1", "rank_pattern:\n  query: 4", "steps: 180"):
        assert f"{line}\n" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert cli.main(["finetune", "--config", str(tmp_path / "printed.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def test_options_of_a_file_that_are_left_open(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("data:\nmodel: null\neval_data:\nepochs: null\nsteps: 7\n")
    assert cli.main(["finetune", "--config", str(tmp_path / "a.yaml"), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "steps: 7\n" in printed and not re.search("data|model|epochs", printed)


def test_what_the_device_decides_stays_open(tmp_path, capsys):
    """In what is printed; a run of a decoder says what was decided, which is the same on another device."""
    words = ["finetune", "--task", "lm", "--remat", "none", "--print-config"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "remat: none\n" in printed and not re.search("dtype|scan_layers|attention_block", printed)
    (tmp_path / "config.json").write_text(new_run("lm", {"attention_block": 8}).to_json())
    decided = {"dtype": "float32", "scan_layers": False, "remat": "none", "attention_block": 8}
    assert config_files.read(tmp_path / "config.json") == {"task": "lm", **decided}


def test_what_a_run_of_images_said(tmp_path):
    config = new_run("images", {"model": "/vit", "data": "/images", "adapter": "/other", "crop": 0.7})
    (tmp_path / "config.json").write_text(config.to_json())
    said = {"task": "images", "model": "/vit", "data": "/images", "adapter": "/other", "crop": 0.7}
    assert config_files.read(tmp_path / "config.json") == {**said, "targets": []}


def test_a_run_once_more(home, tmp_path):
    """From its `config.json`."""
    out = tmp_path / "run"
    assert cli.main(["finetune", "--config", str(home / "run" / "config.json"), "--out", str(out)]) == 0
    same(adapters(out), adapters(home / "run"))
    assert run.read_config(out) == run.read_config(home / "run")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "learning_rat: 1\n", "a.yaml: there is no option learning_rat; do you mean learning_rate?"),
        ("a.toml", "rank = \n", "a.toml can't be read"),
        ("a.yaml", "- 1\n", "a.yaml must hold options by their names"),
        ("a.txt", "", "options are read from .toml, .yaml, .yml, .json files"),
        ("a.yaml", "rank: many\n", "rank must be a whole number"),
        ("a.yaml", "epochs: 2\nsteps: 3\n", "--epochs says in another way"),
        ("a.yaml", "data: 3\n", "data must be"),
        ("a.yaml", "model: 3\n", "model must be"),
        ("a.yaml", "rank:\n", "rank must be a whole number"),
        ("a.yaml", "layers: [3-]\n", "'3-' is neither a number from 0 on nor a range such as 8-15"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert message in refused(capsys, "finetune", "--config", tmp_path / name)
    assert "none.yaml can't be read" in refused(capsys, "finetune", "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--schedule", "constant", "--min-rate", "1e-4"], "schedule='constant' does not: leave one out"),
        (["--min-rate", "1"], "min_rate=1 is above learning_rate=0.005, from which it falls"),
        (["--rank-pattern", "query"], "'query' is not of the form PATTERN=NUMBER"),
        (["--task", "lm", "--eval-data", "a", "--held-out", "9"], "--eval-data is all held out: leave one out"),
        (["--batch-size", "16", "--accumulate", "3"], "accumulate=3 does not divide batch_size=16"),
        (["--optimizer", "adam"], "optimizer must be one of adamw, adafactor, lamb, lion, muon, sgd, not 'adam'"),
        (["--layers", "1", "1"], "layers"),
        (["--layers", "8-3"], "'8-3' is neither a number from 0 on nor a range such as 8-15"),
        (["--print-config"], "--print-config prints the options of a new run: leave --plan, --resume and --out out"),
    ],
)
def test_options_that_are_refused(home, tmp_path, capsys, more, message):
    line = tiny.options(home, tmp_path / "run")
    if "--task" in more:
        line = ["finetune"]
    assert message in refused(capsys, *line, *more)
    assert not (tmp_path / "run").exists()

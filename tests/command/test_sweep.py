"""`lora-jax sweep`: its runs are those that `lora-jax finetune` makes, whatever the task, and bad grids are refused."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.command import cli, run, sweep
from lora_jax.command.options import GRID
from tests.support import tiny, tiny_lm
from tests.support.identity import distance

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a model and texts of each task."""
    directory = tmp_path_factory.mktemp("home")
    tiny.model(directory / "model")
    tiny.reviews(directory / "reviews.csv", count=90)
    (directory / "lm").mkdir()
    tiny_lm.model(directory / "lm" / "model")
    tiny_lm.texts(directory / "lm" / "texts.jsonl", count=60)
    return directory


def arguments(home, task, command, out, **changes):
    """A command line, with lists for options of several values."""
    if task == "lm":
        line = tiny_lm.options(home / "lm", out, steps=6, max_length=24, targets="up_proj")
    else:
        line = [*tiny.options(home, out, steps=6), "--targets", "up", "value"]
        line[line.index("--max-length") + 1] = "8"
    given = dict(zip(line[1::2], line[2::2])) | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
    given = {option: value if isinstance(value, list) else [value] for option, value in given.items() if value is not None}
    return [command, *(str(x) for option, values in given.items() for x in (option, *values))]


GRIDS = {
    "classify": {"rank": [2, 4], "learning_rate": None, "seed": [0, 3]},
    "lm": {"rank": None, "learning_rate": [0.02, 0.005], "alpha": [4, 16]},
}
ALONE = {
    "classify": (2, {"rank": 2, "learning_rate": None, "seed": 3}),
    "lm": (2, {"rank": None, "learning_rate": 0.005, "alpha": 4}),
}


def whole_distance(got, want):
    """Of all arrays together: Adam magnifies rounding in a kernel whose gradients are near its epsilon."""
    flat = [jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)]) for tree in (got, want)]
    return distance(*flat)


METRIC = {"classify": "test_accuracy", "lm": "perplexity"}


@pytest.fixture(scope="module", params=["classify", pytest.param("lm", marks=pytest.mark.slow)])
def swept(request, home):
    """The task, the directory of a sweep of it and what was printed, and one of its runs made by itself."""
    task = request.param
    out = home / f"sweep-{task}"
    code, output = tiny.finish(*arguments(home, task, "sweep", out, **GRIDS[task]))
    assert code == 0, output
    number, options = ALONE[task]
    assert cli.main(arguments(home, task, "finetune", home / f"alone-{task}", **options)) == 0
    return task, out, output, out / str(number), home / f"alone-{task}"


def test_a_run_of_a_sweep_is_the_run_by_itself(swept):
    task, _, _, one, alone = swept
    assert run.read_config(one) == run.read_config(alone)
    tx = optax.adamw(lambda count: 0.0)
    ours, theirs = (lj.checkpoint.restore(d / "adapters", tx=tx) for d in (one, alone))
    assert ours.state is not None and theirs.state is not None
    assert jax.tree.structure(ours.state) == jax.tree.structure(theirs.state)
    assert whole_distance(ours.adapters, theirs.adapters) < 1e-5
    assert whole_distance(ours.state.opt_state, theirs.state.opt_state) < 1e-4
    assert (ours.step, ours.config, ours.data["position"]) == (theirs.step, theirs.config, theirs.data["position"])
    mine, other = ([json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()] for d in (one, alone))
    assert [tuple(line) for line in mine] == [tuple(line) for line in other] and len(mine) == 7
    for field in ("loss", METRIC[task]):
        values = [[line[field] for line in lines] for lines in (mine, other)]
        assert [x is None for x in values[0]] == [x is None for x in values[1]]
        assert np.allclose(*([x for x in v if x is not None] for v in values), rtol=1e-4)
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in alone.iterdir())


def test_results(swept):
    task, out, output, *_ = swept
    assert sorted(entry.name for entry in out.iterdir()) == ["1", "2", "3", "4", "results.json", "sweep.png"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] == METRIC[task]
    scores = [one[METRIC[task]] for one in results["runs"]]
    assert scores == sorted(scores, reverse=task == "classify") and len({one["run"] for one in results["runs"]}) == 4
    for one in results["runs"]:
        config = run.read_config(out / one["run"])
        assert {name: getattr(config, name) for name in GRID} == {name: one[name] for name in GRID}
    header, *rows = [line.split() for line in output.splitlines() if line.startswith((" ", "run ")) and "loss" not in line[:5]][
        -5:
    ]
    differing = ["rank", "seed"] if task == "classify" else ["alpha", "learning", "rate"]
    assert header == ["run", *differing, "loss", *METRIC[task].split("_")]
    assert [row[0] for row in rows] == [one["run"] for one in results["runs"]]
    assert f"best run: {out / results['runs'][0]['run']}" in output and "4 runs as one program" in output


def test_the_best_run_serves_the_other_commands(swept, capsys):
    task, _, output, *_ = swept
    best = output.split("best run: ")[1].split()[0]
    use = {
        "classify": ["predict", best, "--text", "fine"],
        "lm": ["generate", best, "--prompt", "The cat", "--max-new-tokens", "3"],
    }
    for line in (use[task], ["inspect", best], ["export", best, "--format", "peft"]):
        assert cli.main(line) == 0
    assert "written:" in capsys.readouterr().out


def test_a_list_of_runs(home, tmp_path, capsys):
    listed = [{"rank": 2, "alpha": 4}, {"learning_rate": 0.001}]
    (tmp_path / "runs.json").write_text(json.dumps(listed))
    out = tmp_path / "out"
    changes = {"configs": tmp_path / "runs.json", "rank": None, "learning_rate": None, "steps": 2}
    assert cli.main(arguments(home, "classify", "sweep", out, **changes)) == 0
    configs = [run.read_config(out / name) for name in ("1", "2")]
    assert [(c.rank, c.alpha, c.learning_rate) for c in configs] == [(2, 4.0, 2e-3), (8, 16.0, 1e-3)]


@pytest.mark.slow
def test_a_sweep_that_is_stopped_leaves_runs_to_go_on_with(home, tmp_path):
    out = tmp_path / "out"
    process = tiny.start(*arguments(home, "classify", "sweep", out, **GRIDS["classify"] | {"steps": 200000}))
    output = ""
    while not (out / "2" / "metrics.jsonl").exists() or len((out / "2" / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    assert f"go on with each of the 4 runs N by: lora-jax finetune --resume {out}/N" in output
    steps = {lj.checkpoint.restore(out / str(number) / "adapters").step for number in range(1, 5)}
    assert len(steps) == 1 and steps.pop() >= 2


BAD = {
    "one run": ({}, "a sweep has two runs or more"),
    "a value twice": ({"rank": [4, 4]}, "--rank has the value 4 more than once"),
    "a rank of zero": ({"rank": [0, 4]}, "rank must be a whole number of at least 1, not 0"),
    "a rank above a kernel": ({"rank": [4, 64]}, "64"),
    "means over padded arrays": (
        {"rank": [2, 4], "optimizer": "adafactor"},
        "--optimizer adafactor takes means over whole arrays",
    ),
    "no learning rate": ({"learning_rate": [0.1, 0]}, "learning_rate must be positive and finite"),
    "an option of the other task": ({"seed": [0, 1], "dtype": "bfloat16"}, "--dtype is an option of --task lm"),
    "no number": ({"seed": ["x", 1]}, "argument --seed: invalid int value: 'x'"),
    "no list": ({"configs": "nothing.json", "rank": None, "learning_rate": None}, "there is no file nothing.json"),
    "a grid and a list": ({"configs": "nothing.json"}, "leave one of the two out"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_grid_is_refused_before_any_work(home, tmp_path, capsys, case):
    changes, message = BAD[case]
    assert cli.main(arguments(home, "classify", "sweep", tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


LISTS = {
    "{}": "must hold a list of objects",
    "[1, 2]": "must hold a list of objects",
    "[{}, ": "is not JSON",
    '[{"rank": 2}, {"steps": 3}]': "run 2: 'steps' is none of rank, alpha, learning_rate, seed",
    '[{"rank": true}]': "run 1: rank must be a number",
    '[{"rank": 2.5}]': "run 1: rank must be a number",
    '[{"alpha": "2"}]': "run 1: alpha must be a number",
    '[{"rank": 2}, {"alpha": 16, "rank": 2}]': "the runs 1 and 2 of the sweep have the same options",
}


@pytest.mark.parametrize("text", LISTS)
def test_a_bad_list_is_refused(tmp_path, text):
    file = tmp_path / "runs.json"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        sweep.configurations("classify", {}, sweep.read(file))
    assert LISTS[text] in str(error.value)

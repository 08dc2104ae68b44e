"""`lora-jax finetune` with each method: what it trains, and that the other commands take the run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import cli, options, run
from lora_jax.command.tasks import registry
from tests.support import tiny

STEPS = 8

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.home(tmp_path_factory.mktemp("home"))


def train(home, out, *options):
    few = ["--max-length", "8", "--targets", "query", "down/kernel"]  # one length of a batch, and few pairs to compile
    assert cli.main([*tiny.options(home, out, STEPS), *few, *options]) == 0
    return lj.checkpoint.restore(out / "adapters")


@pytest.mark.parametrize(
    ("options", "frozen", "extra"),
    [
        (["--dora"], (), ("magnitude",)),
        pytest.param(["--method", "vera"], ("a", "b"), ("lambda_d", "lambda_b"), marks=pytest.mark.slow),
        pytest.param(["--method", "lora_fa", "--scaling", "rslora"], ("a",), (), marks=pytest.mark.slow),
        (["--lora-plus", "4"], (), ()),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else None,
)
def test_methods(home, tmp_path, capsys, options, frozen, extra):
    found = train(home, tmp_path / "run", *options)
    pairs = [a for a in found.adapters.values() if isinstance(a, lj.LowRank)]
    assert pairs and all(pair.frozen == frozen and set(extra) == set(pair.children()[2:]) for pair in pairs)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == STEPS + 1 and all(map(np.isfinite, losses[1:]))
    for command in (["predict", "--text", "superb cast"], ["inspect"]):
        assert cli.main([command[0], str(tmp_path / "run"), *command[1:]]) == 0
    assert "bad" in capsys.readouterr().out


@pytest.fixture(scope="module")
def plain(home):
    train(home, home / "plain", "--method", "lora")
    return home / "plain"


@pytest.fixture(scope="module")
def pissa(home):
    train(home, home / "pissa", "--init", "pissa")
    return home / "pissa"


@pytest.mark.parametrize(
    "init", ["pissa", *(pytest.param(init, marks=pytest.mark.slow) for init in options.CHANGE_THE_BASE if init != "pissa")]
)
def test_a_changed_base(home, plain, pissa, tmp_path, init):
    """The run trains pairs on the changed base; the other commands see plain ones of twice the rank on the original."""
    directory = pissa if init == "pissa" else tmp_path / "run"
    if init != "pissa":
        train(home, directory, "--init", init)
    found = lj.checkpoint.restore(directory / "adapters")
    initial, converted = lj.checkpoint.load(directory / "initial"), run.load_adapters(directory)
    base = registry.prepare(run.read_config(directory)).task.variables
    pairs = {path: a for path, a in initial.items() if isinstance(a, lj.LowRank)}
    trained = lj.merge(lj.unmerge(base, pairs), found.adapters)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), trained, lj.merge(base, converted))
    assert {converted[path].rank for path in pairs} == {8}
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    first = json.loads((plain / "metrics.jsonl").read_text().splitlines()[0])
    assert lines[0]["test_accuracy"] == first["test_accuracy"]  # step 0 is the base model
    assert cli.main(["export", str(directory), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 8


def test_a_kill_before_the_first_adapters_were_written(pissa, tmp_path):
    """Their folder is there, and a folder within that is not complete; that of the best adapters likewise."""
    shutil.copytree(pissa, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapters")
    for name in ("initial", "best"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        (tmp_path / "run" / name / "0.orbax-checkpoint-tmp").mkdir(parents=True)
    assert cli.main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    again, found = (run.load_adapters(directory) for directory in (tmp_path / "run", pissa))
    jax.tree.map(np.testing.assert_array_equal, again, found)


def test_a_run_on_a_changed_base_goes_on_where_it_stopped(pissa, tmp_path):
    """From the checkpoint before the last, a resumed run ends with the same adapters, bit for bit."""
    found, part = lj.checkpoint.restore(pissa / "adapters"), tmp_path / "part"
    shutil.copytree(pissa, part)
    shutil.rmtree(part / "adapters" / str(STEPS))
    assert cli.main(["finetune", "--resume", str(part)]) == 0
    again = lj.checkpoint.restore(part / "adapters")
    assert again.step == found.step == STEPS
    jax.tree.map(np.testing.assert_array_equal, again.adapters, found.adapters)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "pissa", "--dora"], "init='pissa' is for plain pairs: leave dora and method out"),
        (["--method", "vera", "--lora-plus", "4"], "lora_plus is for method='lora', which trains A and B, not for 'vera'"),
        (["--lora-plus", "0"], "lora_plus must be positive and finite, not 0.0"),
        (["--init", "svd"], "init must be one of"),
        (["--method", "vera", "--alpha", "4"], "method='vera' has no use for alpha"),
    ],
)
def test_options_that_do_not_go_together(home, tmp_path, capsys, options, message):
    assert cli.main([*tiny.options(home, tmp_path / "run", STEPS), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sweep_shares_its_base(home, tmp_path, capsys):
    arguments = ["sweep", *tiny.options(home, tmp_path / "sweep", STEPS)[1:], "--seed", "0", "1", "--init", "pissa"]
    assert cli.main(arguments) == 2
    assert "the runs of a sweep share one base" in capsys.readouterr().err


def test_the_configuration_says_the_method():
    config = options.new_run("classify", {"dora": True, "scaling": "rslora", "init": "gaussian"})
    assert config.lora == dataclasses.replace(
        lj.LoraConfig(train=["re:.*/classifier/.*"]), dora=True, scaling="rslora", init="gaussian"
    )

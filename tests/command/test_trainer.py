"""How a run is trained: the learning rate of each step, which checkpoints are written, and runs that diverge."""

import dataclasses
import io
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import lora_jax as lj
from lora_jax.command import cli, metrics, trainer
from lora_jax.command.options import RunConfig, new_run
from lora_jax.command.signals import Signals
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("usual_promotion")

# --- the learning rate ------------------------------------------------------------------------------------------------


def rates(config):
    """The learning rate of each step: AdamW moves a zero by it, against a gradient of ones."""
    tx, zero = trainer.optimizer(config), {"w": jnp.zeros(())}
    state, found = tx.init(zero), []
    for _ in range(config.steps):
        update, state = tx.update({"w": jnp.ones(())}, state, zero)
        found.append(-float(update["w"]))
    return found


def test_step_i_of_a_warmup_of_n_has_the_rate_i_plus_1_over_n():
    config = new_run("lm", {"steps": 40, "learning_rate": 0.5})
    warmup, fall = [0.25, 0.5], 0.25 * (1 + np.cos(np.pi * np.arange(38) / 38))
    np.testing.assert_allclose(rates(config), [*warmup, *fall], rtol=1e-4)
    old = RunConfig.from_json(
        config.to_json().replace('"format_version": 8', '"format_version": 4').replace(' "warmup_from": 1,\n', ""), "x"
    )
    np.testing.assert_allclose(rates(old), [0.0, 0.25, *fall], rtol=1e-4)
    assert RunConfig.from_json(old.to_json(), "x") == old == dataclasses.replace(config, warmup_from=0)


@pytest.mark.parametrize("steps", [1, 2, 16])
def test_every_step_of_a_short_run_learns(steps):
    found = rates(new_run("lm", {"steps": steps, "learning_rate": 0.5}))
    assert found[0] == pytest.approx(0.5, rel=1e-5) and min(found) > 0


# --- which checkpoints are written ------------------------------------------------------------------------------------


class Program:
    """Steps with the given losses, after some of which what is measured is not finite."""

    devices = jax.devices()[:1]

    def __init__(self, losses, bad_scores=()):
        self.losses, self.bad_scores, self.step, self.skipped, self.written = losses, bad_scores, 0, 0, []

    def advance(self):
        loss = self.losses[self.step]
        self.step, self.skipped = self.step + 1, self.skipped + (not np.isfinite(loss))
        return {"loss": np.array([loss]), "grad_norm": np.array([2 * loss]), "skipped": np.array([self.skipped])}

    def measure(self, batch):
        return np.array([np.nan if self.step in self.bad_scores else 0.5])

    def flops(self):
        return None

    def snapshot(self, step, last):
        return [lambda: self.written.append((step, last[0].get("loss")))]


def train(directory, program, steps, save_every):
    task = types.SimpleNamespace(
        metric=metrics.ACCURACY,
        per_step=1,
        unit="examples",
        test_batches=lambda: [None],
        test_count=1,
        score=float,
        details=lambda sums: {},
    )
    with metrics.Log(directory, 0, metrics.ACCURACY) as log, Signals() as signals:
        run = trainer.Run(RunConfig(steps=steps), directory, log)
        made = trainer.Trainer(task, [run], program, save_every=save_every)
        made.train(rich.console.Console(file=io.StringIO()), signals)
    return run, made.step


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("losses", "bad_scores", "written", "steps", "fault"), [
    ([1.0] * 10, (), [0, 4, 8, 10], 10, None),
    ([1.0] * 4 + [NAN] + [1.0] * 5, (), [0, 8, 10], 10, None),  # after step 4 nothing is known of its adapters
    ([1.0] * 9 + [INF], (), [0, 4, 8, 10], 10, None),  # the score says that they are good
    ([1.0] * 10, (10,), [0, 4, 8], 10, "what was measured last is not finite"),
    ([1.0] * 4 + [NAN] * 6, (6,), [0], 6, "the loss or gradient of 2 steps was not finite"),
    ([1.0] * 5 + [NAN] * 5, (), [0, 4, 7], 7, "the loss or gradient of 2 steps was not finite"),
    ([NAN] * 10, (0, 2), [], 2, "the loss or gradient of 2 steps was not finite"),
])  # fmt: skip
def test_checkpoints_are_those_of_good_adapters(tmp_path, losses, bad_scores, written, steps, fault):
    program = Program(losses, bad_scores)
    run, step = train(tmp_path, program, steps=10, save_every=4)
    assert ([step for step, _ in program.written], step, run.fault) == (written, steps, fault)
    lines = metrics.read(tmp_path)
    assert [line["step"] for line in lines] == list(range(steps + 1))
    finite = [loss if np.isfinite(loss) else None for loss in losses]
    assert [line["loss"] for line in lines[1:]] == finite[:steps]
    updates = np.cumsum([0, *np.isfinite(losses)])[:steps]  # the steps before that changed something
    np.testing.assert_allclose([line["learning_rate"] for line in lines[1:]], np.array(rates(run.config))[updates], rtol=1e-4)
    assert [line["skipped"] for line in lines] == np.cumsum([False, *~np.isfinite(losses)])[: steps + 1].tolist()
    assert all(loss == (finite[step - 1] if step else None) for step, loss in program.written)


# --- runs that diverge ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.home(tmp_path_factory.mktemp("home"))


def arguments(home, out, *more):
    line = tiny.options(home, out, steps=12)
    at = line.index("--learning-rate")
    return [*line[:at], *line[at + 2 :], "--targets", "up", *more]


def test_a_run_that_diverges_says_so_and_keeps_good_adapters(home, tmp_path, capsys):
    out = tmp_path / "run"
    for line in (arguments(home, out, "--learning-rate", "1e30"), ["finetune", "--resume", str(out)]):
        assert cli.main(line) == 3
        error = capsys.readouterr().err
        assert f"lora-jax: {out} diverged at step 3: the loss or gradient of 2 steps was not finite" in error
        assert "adapters are those of step 0, the last good ones. Start again" in error and "Traceback" not in error
        assert "a lower --learning-rate than 1e+30" in error
        assert [line["loss"] is None for line in metrics.read(out)] == [True, False, True, True]
        assert metrics.read(out)[-1]["test_accuracy"] is None  # `argmax` would make labels of logits that are NaN
    found = lj.checkpoint.restore(out / "adapters")
    assert found.step == 0 and all(
        bool(jnp.isfinite(pair.a).all()) for pair in found.adapters.values() if isinstance(pair, lj.LowRank)
    )
    assert cli.main(["predict", str(out), "--text", "superb cast"]) == 0


@pytest.mark.slow
def test_a_sweep_names_the_runs_that_diverge(home, tmp_path, capsys):
    line = ["sweep", *arguments(home, tmp_path / "some", "--learning-rate", "1e30", "0.005")[1:]]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    assert "run 1 diverged: the loss or gradient of 11 steps was not finite" in printed and "run 2 diverged" not in printed
    assert f"best run: {tmp_path / 'some' / '2'}" in printed
    assert [lj.checkpoint.restore(tmp_path / "some" / number / "adapters").step for number in ("1", "2")] == [0, 12]
    line = ["sweep", *arguments(home, tmp_path / "all", "--learning-rate", "1e30", "1e29")[1:]]
    assert cli.main(line) == 3
    assert f"all runs of {tmp_path / 'all'} diverged: start again with a lower --learning-rate" in capsys.readouterr().err

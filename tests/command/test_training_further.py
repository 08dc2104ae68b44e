"""Runs that begin with adapters that are there already, and finished runs that are trained for more steps."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import cli, metrics, run
from lora_jax.command.options import RunConfig
from lora_jax.command.trainer import optimizer
from lora_jax.core.fields import table
from tests.support import tiny_lm
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, a run of three steps on it and the run's PEFT directory."""
    home = tiny_lm.home(tmp_path_factory.mktemp("home"))
    train(home, home / "run", "--targets", "q_proj", "v_proj", rank=2, steps=3)
    assert cli.main(["export", str(home / "run"), "--format", "peft", "--out", str(home / "peft")]) == 0
    return home


def train(home, out, *more, code=0, **changes):
    assert cli.main([*tiny_lm.options(home, out, **changes), *map(str, more)]) == code


def adapters(directory):
    return lj.checkpoint.load(directory / "adapters")


def perplexities(directory):
    return [line["perplexity"] for line in metrics.read(directory)]


def test_a_run_begins_with_adapters(home, tmp_path, capsys):
    """Of a run or of its PEFT directory, which are the same: with their ranks, and nothing else."""
    for name in ("run", "peft"):
        train(home, tmp_path / name, "--adapter", home / name, rank=None, steps=2)
        assert f"4 adapters of {home / name} are trained further, and 0 begin anew" in capsys.readouterr().out
    ours, theirs, before = adapters(tmp_path / "run"), adapters(tmp_path / "peft"), adapters(home / "run")
    assert jax.tree.structure(ours) == jax.tree.structure(theirs) == jax.tree.structure(before)
    assert run.read_config(tmp_path / "run").rank == 2
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all((ours[path].a != before[path].a).any() for path in before)
    assert perplexities(tmp_path / "run")[0] == pytest.approx(perplexities(home / "run")[-1], rel=1e-6)


@pytest.mark.slow
def test_other_targets_begin_anew(home, tmp_path, capsys):
    first, out = shutil.copytree(home / "run", tmp_path / "first"), tmp_path / "run"
    train(home, out, "--adapter", first, "--targets", "q_proj", "up_proj", rank=4, steps=2)
    assert f"4 adapters of {first} are trained further, and 2 begin anew" in capsys.readouterr().out
    assert {path.split("/")[-2]: pair.rank for path, pair in adapters(out).items()} == {"q_proj": 2, "v_proj": 2, "up_proj": 4}
    assert perplexities(out)[0] == pytest.approx(perplexities(home / "run")[-1], rel=1e-6)  # a new pair changes nothing yet
    shutil.rmtree(first)  # a run that has a checkpoint needs the first adapters no more
    shutil.rmtree(out / "adapters" / "2")
    want = adapters(out)
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert jax.tree.structure(adapters(out)) == jax.tree.structure(want)


def test_a_finished_run_is_trained_further(home, tmp_path, capsys):
    out = tmp_path / "run"
    train(home, out, steps=3)
    before = metrics.read(out)
    assert cli.main(["finetune", "--resume", str(out), "--steps", "2"]) == 0
    assert "steps 4 to 5: the learning rate follows its schedule once more, up to 0.02" in capsys.readouterr().out
    after, config = metrics.read(out), run.read_config(out)
    assert after[:4] == before and [line["step"] for line in after] == list(range(6))
    assert (config.steps, config.finished) == (5, [3])
    for steps in (0, -1):
        message = f"--steps must be a whole number of at least 1, not {steps}"
        assert message in refused(["finetune", "--resume", out, "--steps", steps], capsys)
    shutil.rmtree(out / "adapters" / "5")
    want = lasting(out)
    assert cli.main(["finetune", "--resume", str(out), "--steps", "2"]) == 2
    assert "is at step 4 of 5: go on without --steps, which trains a finished run further" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", str(out)]) == 0  # to the same end, in every bit
    assert lasting(out) == want


def test_the_learning_rate_rises_and_falls_once_more():
    """AdamW's step on a constant gradient is the learning rate."""

    def rates(config):
        tx, weight = optimizer(config), {"w": jnp.zeros(())}
        state, found = tx.init(weight), []
        for _ in range(config.steps):
            step, state = tx.update({"w": jnp.ones(())}, state, weight)
            found.append(-float(step["w"]))
        return found

    first, second = rates(RunConfig(steps=40)), rates(RunConfig(steps=20))
    assert max(first) == pytest.approx(2e-3, rel=1e-4) and first[-1] < 0.01 * max(first)
    np.testing.assert_allclose(rates(RunConfig(steps=60, finished=[40])), first + second, rtol=1e-4)


def test_a_run_of_before_begins_once_more_with_its_first_step():
    """Its own warm-up began at 0; that of the steps that were added trains from the first."""
    tx, weight = optimizer(RunConfig(steps=2, finished=[1], warmup_from=0)), {"w": jnp.zeros(())}
    state = tx.init(weight)
    first, state = tx.update({"w": jnp.ones(())}, state, weight)
    second, _ = tx.update({"w": jnp.ones(())}, state, weight)
    assert first["w"] == 0 and second["w"] == pytest.approx(-2e-3, rel=1e-4)


def test_a_run_of_before_records_what_ends_its_texts(home, tmp_path):
    out = shutil.copytree(home / "run", tmp_path / "run")
    now = json.loads((out / "config.json").read_text())
    new = [name for name, row in table(RunConfig).items() if row.more.get("since", 1) > 4]
    before = {name: value for name, value in now.items() if name not in new} | {"format_version": 4}
    (out / "config.json").write_text(json.dumps(before))
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert now["ends"] and json.loads((out / "config.json").read_text()) == now | {"warmup_from": 0, "columns": "own"}


def test_a_tokenizer_that_is_not_used_is_named(home, tmp_path, capsys):
    source = shutil.copytree(home / "peft", tmp_path / "peft")
    shutil.copyfile(home / "model" / "tokenizer.json", source / "tokenizer.json")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    train(home, tmp_path / "run", "--adapter", source, rank=None, steps=1)
    assert "the adapters have their own chat_template.jinja, but the base's tokenizer" in capsys.readouterr().out


@pytest.mark.slow
def test_adapters_of_a_head_stay_with_what_they_change(home, tmp_path, capsys):
    """Those of an embedding that is the head, too, are others' on a base that is untied, and the other way round."""
    for name, flags in {"tied": ["--targets", "embed_tokens"], "untied": ["--targets", "lm_head", "--untie"]}.items():
        train(home, tmp_path / name, *flags, rank=2, steps=1)
    own = tiny_lm.options(home, tmp_path / "run", rank=None, steps=1)
    assert "as the embedding and the head: leave --untie out" in refused(
        [*own, "--untie", "--adapter", tmp_path / "tied"], capsys
    )
    assert "a kernel of its own: give --untie, too" in refused([*own, "--adapter", tmp_path / "untied"], capsys)
    assert not (tmp_path / "run").exists()
    train(home, tmp_path / "run", "--untie", "--adapter", tmp_path / "untied", rank=None, steps=1)
    assert perplexities(tmp_path / "run")[0] == pytest.approx(perplexities(tmp_path / "untied")[-1], rel=1e-6)


def refused(arguments, capsys):
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_what_does_not_go_together(home, tmp_path, capsys):
    own = tiny_lm.options(home, tmp_path / "run", steps=2, adapter=home / "peft")
    assert "--rank is for new pairs, and --adapter brings its own: leave it out, or name" in refused(own, capsys)
    own = tiny_lm.options(home, tmp_path / "run", rank=None, adapter=home / "peft")
    assert "init='pissa' changes the base" in refused([*own, "--targets", "o_proj", "--init", "pissa"], capsys)
    assert "the runs of a sweep begin anew: leave --adapter out" in refused(["sweep", *own[1:], "--seed", 0, 1], capsys)
    assert "is neither a PEFT directory (it has no adapter_config.json) nor a run" in refused(
        [*own[:-1], home / "model"], capsys
    )
    assert "--resume goes on with the run's own options" in refused(["finetune", "--resume", home / "run", "--rank", 3], capsys)
    shutil.copytree(home / "run", tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_sha256": "0" * 64}))
    assert "were trained on another base" in refused([*own[:-1], tmp_path / "other"], capsys)
    assert not (tmp_path / "run").exists()

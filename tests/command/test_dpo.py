"""`lora-jax finetune --task dpo`: preferences, with the base as the reference."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import cli, metrics
from lora_jax.command.options import new_run
from lora_jax.command.tasks import registry
from tests.support import interrupting, tiny_lm
from tests.support.marks import slow_unless
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, and pairs of which the chosen answer meows."""
    home = tmp_path_factory.mktemp("home")
    tiny_lm.model(home / "model")
    rows = [{"prompt": f"The cat {i}", "chosen": " meows.", "rejected": " barks."} for i in range(60)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def options(home, out, *more, steps=12):
    line = ["finetune", "--task", "dpo", "--model", home / "model", "--data", home / "pairs.jsonl", "--rank", 4]
    line += ["--learning-rate", 0.02, "--batch-size", 4, "--steps", steps, "--max-length", 24, "--out", out, *more]
    return [str(word) for word in line]


def adapters(directory):
    return lj.checkpoint.load(directory / "adapters")


def same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.fixture(scope="module")
def run(home):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main(options(home, home / "run")) == 0
    return home / "run"


def test_rewards_become_right(run):
    first, *_, last = metrics.read(run)
    assert (first["reward_accuracy"], first["reward_margin"]) == (0.5, 0.0)  # the model is its reference
    assert last["reward_accuracy"] == 1.0 and last["reward_margin"] > 0.5
    assert metrics.read(run)[1]["loss"] == pytest.approx(np.log(2), rel=1e-6) and last["loss"] < 0.5


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "orpo"])
def test_losses_by_hand(home, loss):
    """From whole logits, with the merged weights as the model and the base as the reference."""
    config = new_run("dpo", {"model": str(home / "model"), "data": str(home / "pairs.jsonl"), "max_length": 24, "loss": loss})
    session = registry.prepare(config)
    task, model = session.task, lj.models.load(home / "model")
    draw = np.random.default_rng(0)
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * draw.normal(size=leaf.shape).astype("float32"), session.init(session.config))
    batch = next(task.train_batches(0))

    def log_p(variables):
        ids, learnt = batch["input_ids"][..., 1:], batch["targets"][..., 1:]
        logits = jax.vmap(lambda rows: model.apply(variables, rows))(batch["input_ids"])[:, :, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], -1)[..., 0]
        total = (chosen * learnt).sum(-1)
        return total / learnt.sum(-1) if loss in ("ipo", "orpo") else total

    ours, base = (log_p(tree) for tree in (lj.merge(task.variables, moved), task.variables))
    if loss == "orpo":
        want = lj.losses.orpo(ours[:, 0], ours[:, 1])
    else:
        want = lj.losses.dpo(ours[:, 0], ours[:, 1], base[:, 0], base[:, 1], kind=loss)
    found = task.loss(lj.attach(task.variables, moved), batch, jax.random.key(0))
    np.testing.assert_allclose(found, want.losses.mean(), rtol=2e-5)
    sums = task.measure(lj.attach(task.variables, moved), batch)
    np.testing.assert_allclose(sums, [(want.margins > 0).sum(), want.margins.sum(), 4, *want.margins], rtol=1e-4, atol=1e-5)


def test_a_run_that_was_stopped_ends_the_same(home, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 5)
        assert cli.main(options(home, tmp_path / "run")) == 130
    assert cli.main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    same(adapters(tmp_path / "run"), adapters(run))
    assert lasting(tmp_path / "run") == lasting(run)


def test_afterwards(run, tmp_path, capsys):
    """A run is for the commands of language models, and what another may begin with."""
    assert cli.main(["generate", str(run), "--prompt", "The cat 3", "--max-new-tokens", "3"]) == 0
    assert cli.main(["export", str(run), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert cli.main(["predict", str(run), "--text", "a"]) == 2
    assert "the run is of the task 'dpo': use `lora-jax generate`" in capsys.readouterr().err
    home = run.parent
    tiny_lm.texts(home / "texts.jsonl")
    line = tiny_lm.options(home, tmp_path / "lm", rank=None, steps=1)
    assert cli.main([*line, "--adapter", str(run)]) == 0


@pytest.mark.parametrize(
    "more", slow_unless(lambda more: "--beta" in more, [["--beta", "1"], ["--label-smoothing", "0.2"], ["--loss", "hinge"]])
)
def test_an_option_changes_the_losses(home, run, tmp_path, more):
    assert cli.main(options(home, tmp_path / "run", *more, steps=2)) == 0
    found, usual = ([line["loss"] for line in metrics.read(directory)[1:3]] for directory in (tmp_path / "run", run))
    assert found[1] != usual[1]


def test_columns_and_held_out_pairs(home, tmp_path, capsys):
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    other = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    shutil.copy(tmp_path / "pairs.jsonl", tmp_path / "held_out.jsonl")
    line = options(
        home, tmp_path / "run", "--prompt-field", "question", "--chosen-field", "good", "--rejected-field", "bad", steps=1
    )
    line[line.index(str(home / "pairs.jsonl"))] = str(tmp_path / "pairs.jsonl")
    assert cli.main([*line, "--eval-data", str(tmp_path / "held_out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "60 pairs to train on" in printed and "60 pairs held out" in printed
    assert "prompts are learnt as they stand, and not by the model's chat template: for that give lists of messages" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init", "pissa"], "init='pissa' changes the base, which is the reference of preferences: leave it out"),
        (["--loss", "ipo", "--label-smoothing", "0.1"], "label_smoothing is for loss='sigmoid', not for 'ipo': leave it out"),
        (["--held-out", "5"], "--held-out is an option of --task lm; leave it out of --task dpo"),
        (["--text-field", "a"], "--text-field is an option of --task classify and lm"),
        (["--plan"], "--plan is for --task lm"),
    ],
)
def test_options_that_are_refused(home, tmp_path, capsys, more, message):
    line = options(home, tmp_path / "run", *more)
    if "--plan" in more:
        at = line.index("--out")
        line = line[:at] + line[at + 2 :]
    assert cli.main(line) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()

"""Where the metrics of a run go: each tracker's own files say what `metrics.jsonl` says, also of runs that went on."""

import io
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console

import lora_jax as lj
from lora_jax.command import cli, metrics, processes, progress, trackers
from lora_jax.command.meter import Meter, StepFlops
from lora_jax.command.options import TRACKERS, RunConfig
from lora_jax.planning import topology
from tests.support import interrupting, tiny, tracked
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion", "offline")
STEPS = 8


@pytest.fixture(scope="module")
def offline():
    """No tracker reaches the network, whatever the environment says; the service that wandb starts ends with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        yield
        if "wandb" in sys.modules:
            sys.modules["wandb"].teardown()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny.home(tmp_path_factory.mktemp("home"))


def arguments(home, out, *more, track=("tensorboard", "wandb")):
    given = ["--targets", "up", "--save-every", "2", *(["--track", *track] if track else []), *more]
    return [*tiny.options(home, out, STEPS), *map(str, given)]


@pytest.fixture(scope="module")
def reference(home, offline):
    """A run that was never stopped, with both trackers."""
    assert cli.main(arguments(home, home / "reference")) == 0
    return home / "reference"


def rows(directory):
    """The lines of a run without what is not known, by step."""
    return {
        line["step"]: {name: value for name, value in line.items() if value is not None and name != "step"}
        for line in metrics.read(directory)
    }


def history(directory):
    """The rows of Weights & Biases, of all sessions."""
    found = [r.history.item for records in tracked.wandb_records(directory).values() for r in records if r.HasField("history")]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in items} for items in found]


def shown_by_tensorboard(directory):
    """Assert that it shows each line once, with every value; returns what it shows of the end."""
    shown, final = {}, {}
    for name, pairs in tracked.scalars(directory).items():
        for step, value in pairs:
            own = final if name.startswith("final/") else shown.setdefault(step, {})
            assert name not in own, (name, step)
            own[name] = value
    expected = {step: {name: np.float32(value) for name, value in line.items()} for step, line in rows(directory).items()}
    assert shown == expected
    return final


def same_as_metrics(directory):
    """Assert that both trackers show each line once, with every value."""
    lines = rows(directory)
    shown_by_tensorboard(directory)
    found = [(row["_step"], {name: x for name, x in row.items() if not name.startswith("_")}) for row in history(directory)]
    assert [step for step, _ in found] == list(lines)
    for step, row in found:  # a step that came again was measured again, and stays as it was first
        assert row.keys() == lines[step].keys()
        assert all(value == lines[step][name] for name, value in row.items() if not metrics.is_of_time(name))
    return found


def test_each_tracker_says_what_the_metrics_say(reference):
    assert [step for step, line in rows(reference).items() if "test_accuracy" in line] == [0, 3, 6, 8]
    found = same_as_metrics(reference)
    assert all(row == rows(reference)[step] for step, row in found)  # the speed, too


def test_each_tracker_knows_the_options(reference):
    config = json.loads((reference / "config.json").read_text())
    plain = lambda value: value if isinstance(value, str | int | float) else json.dumps(value)
    found, ended = tracked.hyperparameters(reference)
    assert found == {name: plain(value) for name, value in config.items() if value is not None} and ended == 1
    assert (found["rank"], found["learning_rate"], found["labels"]) == (4, 0.005, '["bad", "good"]')
    [records] = tracked.wandb_records(reference).values()
    [run] = [record.run for record in records if record.HasField("run")]
    given = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert {name: given[name] for name in config} == config
    assert (run.run_id, run.project) == ((reference / "wandb" / "id").read_text(), "lora-jax")
    assert run.display_name == f"{reference.parent.name}/reference"


def test_each_tracker_knows_the_end(reference):
    [records] = tracked.wandb_records(reference).values()
    updates = [item for record in records if record.HasField("summary") for item in record.summary.update]
    summary = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
    last = metrics.read(reference)[-1]
    assert {name: summary[name] for name in ("steps", "loss", "skipped", "test_accuracy")} == {
        "steps": STEPS, "loss": last["loss"], "skipped": 0, "test_accuracy": last["test_accuracy"]
    }  # fmt: skip
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    expected = {f"final/{name}": np.float32(summary[name]) for name in ("steps", "loss", "skipped", "test_accuracy")}
    assert shown_by_tensorboard(reference) == expected


def test_trackers_change_nothing(home, reference, tmp_path):
    assert cli.main(arguments(home, tmp_path / "run", track=())) == 0
    plain = {"adapters", "config.json", "curve.png", "metrics.jsonl", "report.html"}
    found = [{entry.name for entry in directory.iterdir()} for directory in (tmp_path / "run", reference)]
    assert found == [plain, plain | {"tensorboard", "wandb"}]
    assert lasting(tmp_path / "run") == lasting(reference)
    jax.tree.map(np.testing.assert_array_equal, *(lj.checkpoint.load(d / "adapters") for d in (tmp_path / "run", reference)))


def test_a_run_that_goes_on_goes_on_in_both(home, reference, tmp_path, capsys):
    """Also one that was killed: its last checkpoint is older than the last step that the trackers have."""
    out = tmp_path / "run"
    for stop, line in ((3, arguments(home, out)), (6, ["finetune", "--resume", str(out)])):
        with pytest.MonkeyPatch.context() as patch:
            interrupting.at_step(patch, stop)
            assert cli.main(line) == 130
        # Stopped in the test of this step, whose line comes when the run goes on: of what the checkpoint says.
        assert metrics.read(out)[-1]["step"] == stop - 1 and lj.checkpoint.restore(out / "adapters").step == stop
    shutil.rmtree(out / "adapters" / "6")
    assert lj.checkpoint.restore(out / "adapters").step == 4
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert lasting(out) == lasting(reference)
    same_as_metrics(out)
    sessions = list(tracked.wandb_records(out).values())
    assert [[record.exit.exit_code for record in one if record.HasField("exit")] for one in sessions] == [[1], [1], [0]]
    assert len({record.run.run_id for one in sessions for record in one if record.HasField("run")}) == 1
    assert tracked.hyperparameters(out)[1] == 1
    assert cli.main(["finetune", "--resume", str(out), "--steps", "2"]) == 0
    assert list(rows(out)) == list(range(STEPS + 3))
    same_as_metrics(out)


@pytest.mark.slow
def test_each_run_of_a_sweep_has_its_own(home, tmp_path):
    assert cli.main(["sweep", *arguments(home, tmp_path / "sweep")[1:], "--seed", "0", "3"]) == 0
    ids = set()
    for seed, number in ((0, "1"), (3, "2")):
        directory = tmp_path / "sweep" / number
        same_as_metrics(directory)
        assert tracked.hyperparameters(directory) == (tracked.hyperparameters(directory)[0] | {"seed": seed}, 1)
        ids.add((directory / "wandb" / "id").read_text())
    assert len(ids) == 2
    assert lasting(tmp_path / "sweep" / "1") != lasting(tmp_path / "sweep" / "2")
    assert not {"tensorboard", "wandb"} & {entry.name for entry in (tmp_path / "sweep").iterdir()}


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [
    (["tensorbord"], "track must be one or several of tensorboard, wandb, not 'tensorbord'; do you mean tensorboard?"),
    (["wandb", "wandb"], "track names a tracker twice: wandb wandb; name it once"),
])  # fmt: skip
def test_bad_names(home, tmp_path, capsys, given, message):
    assert cli.main(arguments(home, tmp_path / "run", track=given)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
@pytest.mark.parametrize("command", ["finetune", "sweep"])
def test_a_missing_package_is_said_before_any_work(home, tmp_path, capsys, monkeypatch, name, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    line = arguments(home, tmp_path / "run", track=[name])
    assert cli.main([command, *line[1:], *(["--seed", "0", "1"] if command == "sweep" else [])]) == 2
    assert f"the package {package} is missing: pip install 'lora-jax[{name}]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def broken(*_):
    raise OSError("no space left")


def test_a_tracker_that_fails_does_not_lose_the_run(home, reference, tmp_path, capsys, monkeypatch):
    write = trackers.TensorBoard.write
    monkeypatch.setattr(trackers.TensorBoard, "write", lambda self, step, *a: (broken if step == 3 else write)(self, step, *a))
    out = tmp_path / "run"
    assert cli.main(arguments(home, out)) == 0
    error = capsys.readouterr().err
    said = "tensorboard failed at step 3 and is left out from here on; metrics.jsonl goes on (OSError: no space left)"
    assert error.count(f"lora-jax: {said}") == 1
    assert lasting(out) == lasting(reference)
    assert [row["_step"] for row in history(out)] == list(range(STEPS + 1))
    assert [step for step, _ in tracked.scalars(out)["skipped"]] == [0, 1, 2]


def test_tensorboard_gets_what_it_missed(home, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trackers.TensorBoard, "write", broken)
        interrupting.at_step(patch, 4)
        assert cli.main(arguments(home, out, track=["tensorboard"])) == 130
    assert "tensorboard failed at step 0" in capsys.readouterr().err and not tracked.scalars(out)
    assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert shown_by_tensorboard(out)["final/steps"] == STEPS


def test_wandb_gets_what_its_server_lacks(tmp_path, monkeypatch):
    sent = []
    run = types.SimpleNamespace(offline=False, starting_step=2, log=lambda values, step, commit: sent.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Settings=dict, init=lambda **given: run))
    with metrics.Log(tmp_path, 0, metrics.ACCURACY) as log:
        for step in range(4):
            log.append(step, float(step), None, {})
        trackers.begin(RunConfig(track=["wandb"]), tmp_path, log, "").write({"step": 4, "loss": None})
    assert sent == [(2, {"loss": 2.0}), (3, {"loss": 3.0}), (4, {})]


def noting_ends(monkeypatch):
    """The summaries with which TensorBoard's files are closed from here on."""
    closed, close = [], trackers.TensorBoard.close
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda self, summary: (closed.append(summary), close(self, summary))[1])
    return closed


def test_where_one_can_not_begin_the_others_are_closed(home, tmp_path, capsys, monkeypatch):
    closed = noting_ends(monkeypatch)
    monkeypatch.setattr(trackers, "_wandb_id", broken)
    out = tmp_path / "sweep"
    assert cli.main(["sweep", *arguments(home, out)[1:], "--seed", "0", "1"]) == 2
    said = f"--track wandb can't begin: mend that and start again, once {out} is removed (no space left)"
    assert said in capsys.readouterr().err and closed == [None]


def test_a_tracker_that_can_not_begin(home, reference, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "_wandb_id", broken)
        assert cli.main(arguments(home, out, track=["wandb"])) == 2
        assert f"--track wandb can't begin: mend that and go on with --resume {out}, or" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 4)
        assert cli.main(["finetune", "--resume", str(out)]) == 130
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "_wandb_id", broken)
        assert cli.main(["finetune", "--resume", str(out)]) == 0
    assert "lora-jax: wandb failed to begin and is left out from here on" in capsys.readouterr().err
    assert lasting(out) == lasting(reference) and [row["_step"] for row in history(out)] == [0, 1, 2, 3, 4]


def test_only_the_first_process_has_trackers(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    config = RunConfig(track=["tensorboard", "wandb"])
    with metrics.Log(tmp_path, 0, metrics.ACCURACY, write=False) as log, trackers.begin(config, tmp_path, log, "") as found:
        found.write({"step": 0, "loss": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stop", "rate", "code"), [(3, 0.005, 130), (None, 1e30, 3), (None, 0.005, 0)])
def test_all_processes_wait_for_the_end_of_the_trackers(home, tmp_path, monkeypatch, stop, rate, code):
    """Of a run that was stopped, of one that diverged, and of one that ended."""
    closed, waited, first = noting_ends(monkeypatch), [], processes.first
    monkeypatch.setattr(processes, "first", lambda fn: (first(fn), waited.append(len(closed))))
    if stop is not None:
        interrupting.at_step(monkeypatch, stop)
    given = arguments(home, tmp_path / "run", track=["tensorboard"])
    given[given.index("--learning-rate") + 1] = str(rate)
    assert cli.main(given) == code
    assert [summary is not None for summary in closed] == [code == 0] and 1 in waited


def test_the_names_are_those_of_the_option():
    assert sorted(trackers.KINDS) == sorted(TRACKERS)


# --- what is measured -------------------------------------------------------------------------------------------------


def chip(kind, stats):
    return types.SimpleNamespace(device_kind=kind, process_index=0, memory_stats=lambda: stats)


def test_speed_memory_and_use_of_the_chips():
    chips = [chip("NVIDIA H100 80GB HBM3", {"peak_bytes_in_use": peak}) for peak in (5, 7)]
    flops = iter([int(989e12), int(2 * 989e12)])
    meter = Meter(chips, 100, "tokens", lambda: next(flops))
    assert meter.measured(2.0) == {"tokens_per_second": 50.0, "memory_bytes": 7, "mfu": pytest.approx(0.25)}
    assert meter.measured(2.0)["mfu"] == pytest.approx(0.5) and meter.idle == {"tokens_per_second": None}


@pytest.mark.parametrize(("kind", "flops"), [("cpu", 10), ("NVIDIA H200", None)])
def test_nothing_is_made_up(kind, flops):
    meter = Meter([chip(kind, None)], 4, "pairs", lambda: flops)
    assert meter.measured(2.0) == {"pairs_per_second": 2.0}


def test_flops_need_no_second_trace():
    traced = []

    def loss(params, batch, key):
        traced.append(1)
        return jnp.mean(jax.checkpoint(lj.lora(lambda p, x: x @ p["w"]))(params, batch) ** 2)

    params, batch = {"w": jnp.ones((3, 5))}, jnp.ones((4, 3))
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), lambda p, x: x @ p["w"], params, batch)
    step, tx = lj.train.make_train_step(loss, optax.sgd(0.1)), optax.sgd(0.1)
    state, flops = lj.train.init_state(adapters, tx, key=jax.random.key(1)), StepFlops(step)
    for rows in (4, 6, 4):
        batch = np.ones((rows, 3), np.float32)
        flops.taken(batch)
        state, _ = step(state, params, batch)
        once = len(traced)
        # x W, x A and (x A) B, of which three have a gradient: B, A and x A; W and x have none. x A is computed again.
        assert flops.last(state, params) == 2 * rows * (3 * 5 + 3 * 1 + 1 * 5 + 1 * 5 + 3 * 1 + 1 * 5)
        assert len(traced) == once
    assert step._cache_size() == 2
    conv = StepFlops(jax.jit(lambda state, params, x: jax.lax.conv(x, x, (1, 1), "VALID")))
    conv.taken(jnp.ones((1, 1, 2, 2)))
    assert conv.last(state, params) is None


@pytest.mark.slow
def test_a_run_where_the_peak_is_known_says_its_use(home, tmp_path, monkeypatch, capsys):
    """Of steps of 8 and of 16 tokens a row."""
    monkeypatch.setattr(topology, "speed_of", lambda kind: topology.Speed(1e9, 1.0, 1.0))
    lengths, taken = [], StepFlops.taken
    monkeypatch.setattr(StepFlops, "taken", lambda self, b: (lengths.append(b["input_ids"].shape[-1]), taken(self, b))[1])
    small = ("--batch-size", "2")
    assert cli.main(arguments(home, tmp_path / "run", *small, track=())) == 0
    first, *lines = metrics.read(tmp_path / "run")
    assert "mfu" not in first and len(lines) == STEPS and set(lengths) == {8, 16}
    uses = {length: [x["mfu"] / x["examples_per_second"] for x, n in zip(lines, lengths) if n == length] for length in (8, 16)}
    assert all(min(own) > 0 and np.allclose(own, own[0], rtol=1e-6) for own in uses.values())
    assert 1.9 < uses[16][0] / uses[8][0] < 2.5
    assert "  MFU " in capsys.readouterr().out
    assert cli.main(["sweep", *arguments(home, tmp_path / "sweep", *small, track=())[1:], "--seed", "0", "1"]) == 0
    for line, length in zip(metrics.read(tmp_path / "sweep" / "1")[1:], lengths[STEPS:], strict=True):
        assert line["mfu"] / line["examples_per_second"] == pytest.approx(2 * uses[length][0], rel=1e-6)


EVERYTHING = {"loss": 12.345678, "balance_loss": 2.5, "grad_norm": 12345.6, "learning_rate": 1.9e-5, "skipped": 3}
EVERYTHING |= {"tokens_per_second": 1e5, "mfu": 0.412, "memory_bytes": 123.4e9}


@pytest.mark.parametrize(("width", "left_out"), [(None, ("GB", "MFU")), (80, ("GB", "MFU", "rate", "balance", "grad"))])
def test_lines_are_not_too_long(width, left_out):
    terminal = {} if width is None else {"force_terminal": True, "width": width}
    file = io.StringIO()
    with progress.Progress(rich.console.Console(file=file, **terminal), 20000, 0, 10**6, "tokens", metrics.PERPLEXITY) as shown:
        shown.tested(0, 31.4159)
        shown.step(20000, 0.5, EVERYTHING)
    if width is None:
        line = file.getvalue().splitlines()[-1]
        assert len(line) <= 110 and line.startswith("step 20000/20000  loss 12.346  ")
    assert "skipped 3" in file.getvalue() and "tokens/s" in file.getvalue()
    assert not [word for word in left_out if word in file.getvalue()]


def test_what_is_not_known_is_not_shown():
    file = io.StringIO()
    with progress.Progress(rich.console.Console(file=file), 10, 0, 16, "pairs", metrics.PREFERENCE) as shown:
        shown.step(10, 0.5, {"loss": None, "grad_norm": None, "learning_rate": 0.01, "skipped": 0, "pairs_per_second": 32.0})
    assert file.getvalue() == "step 10/10  loss not finite  grad not finite  rate 0.01  32 pairs/s  0:00 left\n"

"""Several processes as one run, meshes of the command, and checkpoints from one mesh on another."""

import functools
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax import sharding
from lora_jax.command import cli, finetune, metrics
from lora_jax.data import labelled
from lora_jax.training import checkpoint, train
from tests.support import tiny, tiny_lm
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion")
STEPS = 16
OPTIONS = {"batch_size": 8, "steps": STEPS, "max_length": 24, "targets": "q_proj"}
# The command, where a process that is silent for 10 seconds counts as dead, not for 30.
START = (
    "import sys; from lora_jax.command import cli, hosts; assert hosts._HEARTBEAT > 10; "
    "hosts._HEARTBEAT = 10; sys.exit(cli.main())"
)
LONG = 180  # seconds: far more than a process takes, so that one that hangs fails the test


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    directory = tmp_path_factory.mktemp("home")
    tiny_lm.model(directory / "model", num_hidden_layers=1)
    tiny_lm.texts(directory / "texts.jsonl")
    return directory


@pytest.fixture(scope="module")
def reference(home):
    """A run of one process on one device."""
    assert cli.main(tiny_lm.options(home, home / "reference", **OPTIONS)) == 0
    return home / "reference"


def same(directory, reference):
    """Assert that two runs ended alike, to rounding."""
    ours, theirs = (checkpoint.restore(d / "adapters") for d in (directory, reference))
    assert ours.step == theirs.step
    for one, other in zip(jax.tree.leaves(ours.adapters), jax.tree.leaves(theirs.adapters), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    lines = [lasting(d) for d in (directory, reference)]
    for one, other in zip(*lines, strict=True):
        assert {k: v is None for k, v in one.items()} == {k: v is None for k, v in other.items()}
        assert one["loss"] is None or one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert (directory / "config.json").read_bytes() == (reference / "config.json").read_bytes()
    assert (directory / "curve.png").exists() and (directory / "report.html").exists()


class Processes:
    """The command in several processes, with two devices each; whatever is left of them ends with the block.

    An argument that is a list has one for each process.
    """

    def __init__(self, count, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(tiny.ROOT)}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        own = ["--coordinator", place, "--processes", count, "--process-id", list(range(count))]
        given = lambda i: [str(text[i] if isinstance(text, list) else text) for text in (*arguments, *own)]
        command = [sys.executable, "-u", "-c", START]
        self.all = [subprocess.Popen([*command, *given(i)], env=environment, **streams) for i in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()

    def wait_for(self, directory, lines):
        """Until the run has so many lines of metrics."""
        end = time.monotonic() + LONG
        while len(metrics.read(directory)) < lines:
            assert all(process.poll() is None for process in self.all), self.finish()
            assert time.monotonic() < end
            time.sleep(0.02)

    def finish(self):
        """The exit codes and outputs of all."""
        outputs = [process.communicate(timeout=LONG)[0] for process in self.all]
        return [process.returncode for process in self.all], outputs


def killed(directory, number, processes):
    """Kill a process in the middle of the run; the others end by themselves and say why."""
    with processes:
        processes.wait_for(directory, len(metrics.read(directory)) + 4)
        processes.all[number].kill()
        codes, outputs = processes.finish()
    assert codes[number] == -signal.SIGKILL and len(metrics.read(directory)) < STEPS + 1
    for i, (code, output) in enumerate(zip(codes, outputs)):
        assert code != 0, output
        # The last: Gloo ends a survivor whose next collective meets the one that broke off at another's, before it can say more.
        said = "ends, since another one is gone|JAX distributed service detected fatal errors|gloo::EnforceNotMet"
        assert i == number or re.search(said, output), output


@pytest.mark.slow
def test_two_processes(home, reference, tmp_path):
    """The `model` axis spans both processes, so that both hold every row."""
    directory = tmp_path / "run"
    options, resume = tiny_lm.options(home, directory, **OPTIONS), ["finetune", "--resume", directory]
    killed(directory, 1, Processes(2, *options, "--mesh", "model=2,data=2"))
    killed(directory, 0, Processes(2, *resume, "--mesh", "data=2,fsdp=2"))
    assert cli.main([*map(str, resume), "--mesh", "data=2,model=4"]) == 0
    same(directory, reference)


@pytest.mark.slow
def test_four_processes(home, reference, tmp_path):
    directory = tmp_path / "run"
    options, mesh = tiny_lm.options(home, directory, **OPTIONS), ["--mesh", "data=8"]
    killed(directory, 2, Processes(4, *options, *mesh))
    with Processes(4, "finetune", "--resume", directory, *mesh) as processes:
        codes, outputs = processes.finish()
    assert codes == [0] * 4, outputs
    assert "held-out perplexity on" in outputs[0] and not any("perplexity" in output for output in outputs[1:])
    same(directory, reference)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(home, tmp_path):
    directory = tmp_path / "run"
    options = tiny_lm.options(home, directory, **OPTIONS | {"steps": 200})
    with Processes(2, *options, "--mesh", "data=4") as processes:
        processes.wait_for(directory, 3)
        processes.all[1].send_signal(signal.SIGTERM)
        codes, outputs = processes.finish()
    assert codes == [143, 143], outputs
    assert "stopped by SIGTERM; go on with: " in outputs[0] and "stopped" not in outputs[1]
    assert checkpoint.restore(directory / "adapters").step == metrics.read(directory)[-1]["step"] < 200
    with Processes(2, "finetune", "--resume", directory, "--mesh", ["data=4", "fsdp=4"]) as processes:
        codes, outputs = processes.finish()
    assert codes == [2, 2] and "lora-jax: process 1 of 2 can't go on, and says why" in outputs[0], outputs
    assert "this process differs from the first in mesh ('fsdp=4', not 'data=4'): start all with the same" in outputs[1]


@pytest.mark.slow
def test_classifier_on_a_mesh(tmp_path):
    tiny.model(tmp_path / "model")
    tiny.reviews(tmp_path / "reviews.csv", count=60)
    for out, mesh in (("one", []), ("mesh", ["--mesh", "data=2,fsdp=2,model=2"])):
        options = tiny.options(tmp_path, tmp_path / out, steps=3)
        assert cli.main([*options, "--max-length", "8", "--targets", "query", "down/kernel", *mesh]) == 0
    same(tmp_path / "mesh", tmp_path / "one")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_on_another_mesh(tmp_path):
    draw = functools.partial(np.random.default_rng(0).normal, scale=0.3)
    variables = {name: jnp.asarray(draw(size=shape), jnp.float32) for name, shape in {"up": (8, 16), "down": (16, 8)}.items()}
    model = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    loss = lambda params, batch, key: jnp.mean((lj.lora(model)(params, batch) - 1.0) ** 2)
    x, tx, rules = (
        jnp.asarray(draw(size=(8, 8)), jnp.float32),
        optax.adam(0.1),
        {"up": jax.P(None, "model"), "down": jax.P("model")},
    )

    def placed(axes, count):
        mesh = sharding.make_mesh(axes, jax.devices()[:count])
        return jax.device_put(variables, sharding.parameter_shardings(mesh, variables, rules, fsdp="data"))

    base = placed({"data": 4, "model": 2}, 8)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model, base, x)
    step, losses, unbroken = train.make_train_step(loss, tx), [], []
    state = train.init_state(adapters, tx, key=jax.random.key(1))
    for _ in range(4):
        state, found = step(state, base, x)
        unbroken.append(float(found["loss"]))
    state = train.init_state(adapters, tx, key=jax.random.key(1))
    for _ in range(2):
        state, found = step(state, base, x)
        losses.append(float(found["loss"]))
    for number, (axes, count) in enumerate([({"data": 2, "model": 1}, 2), ({"data": 4, "model": 2}, 8)], 2):
        checkpoint.save(tmp_path, state.adapters, state=state)
        other = placed(axes, count)
        found = checkpoint.restore(tmp_path, tx=tx, variables=other)
        assert found.step == number and found.state is not None and found.state.adapters is found.adapters
        wanted = sharding.adapter_shardings(other, found.adapters)
        assert jax.tree.map(lambda leaf: leaf.sharding, jax.tree.leaves(found.adapters)) == jax.tree.leaves(wanted)
        new = train.init_state(found.adapters, tx, key=jax.random.key(1))
        for one, like, saved in zip(*map(jax.tree.leaves, (found.state, new, state)), strict=True):
            assert one.sharding == like.sharding and one.dtype == saved.dtype
            numbers = jax.random.key_data if jnp.issubdtype(one.dtype, jax.dtypes.prng_key) else np.asarray
            np.testing.assert_array_equal(numbers(one), numbers(saved))
        state, after = step(found.state, other, x)
        losses.append(float(after["loss"]))
    np.testing.assert_allclose(losses, unbroken, rtol=0, atol=1e-6)


def test_rows_of_a_batch():
    """Each place of a batch is made alone as in the whole, and a mesh holds what there is without one."""
    tokens = tuple(np.full(n, n, np.int32) for n in (3, 5, 2, 9, 4))
    some = labelled.Examples(tokens, np.arange(5, dtype=np.int32))
    rows, places = np.array([2, 0, 4]), np.array([0, 2, 3])
    whole, part = (labelled.pad(some, rows, (4, 8), 4, where) for where in (None, places))
    assert all((whole[name][places] == part[name]).all() for name in whole)
    mesh = sharding.make_mesh({"fsdp": 2, "model": 2, "data": 2})
    with_mesh, without = (labelled.eval_batches(some, (4, 16), 4, mesh) for mesh in (mesh, None))
    for one, other in zip(with_mesh, without, strict=True):
        for name in other:
            assert one[name].sharding == sharding.batch_sharding(mesh)
            np.testing.assert_array_equal(one[name], other[name])


# --- errors -----------------------------------------------------------------------------------------------------------

ALL = {"--coordinator": "127.0.0.1:1", "--processes": 2, "--process-id": 1, "--mesh": "data=4"}
BAD = {
    "unknown axis": ({"--mesh": "tensor=8"}, "--mesh must have each of data, fsdp, model .*; 'tensor=8' in 'tensor=8' can't"),
    "no size": ({"--mesh": "data=2,model"}, "with a size, as in data=2,model=4; 'model' in 'data=2,model' can't be used"),
    "size 0": ({"--mesh": "data=0"}, "'data=0' in 'data=0' can't be used"),
    "twice": ({"--mesh": "data=2,data=4"}, "'data=4' in 'data=2,data=4' can't be used"),
    "devices": ({"--mesh": "data=2,model=2"}, r"--mesh data=2,model=2: axes: .* needs 4 devices, and there are 8"),
    "batch": ({"--mesh": "data=2,fsdp=4", "--batch-size": 12}, "batch_size 12 can't be cut into the 8 .* data and fsdp"),
    "kernel": ({"--mesh": "model=8"}, r"params/embed_tokens/embedding of the shape \(300, 32\) .* 8 equal"),
    "no processes": ({"--coordinator": "a:1", "--mesh": "data=8"}, "belong together: give --processes and --process-id, too"),
    "no coordinator": ({**ALL, "--coordinator": None}, "belong together: give --coordinator, too"),
    "no number": ({**ALL, "--process-id": None}, "belong together: give --process-id, too"),
    "no port": ({**ALL, "--coordinator": "localhost"}, "--coordinator must be HOST:PORT, with a port from 1 to 65535"),
    "no such port": ({**ALL, "--coordinator": "localhost:99999"}, "from 1 to 65535, not 'localhost:99999'"),
    "no host": ({**ALL, "--coordinator": "nowhere.invalid:1234"}, "the host nowhere.invalid is not known"),
    "no process": ({**ALL, "--processes": 0}, "--processes must be at least 1, not 0"),
    "number": ({**ALL, "--process-id": 2}, "--process-id must be from 0 to 1 with --processes 2, not 2"),
    "negative number": ({**ALL, "--process-id": -1}, "--process-id must be from 0 to 1 with --processes 2, not -1"),
    "no mesh": ({**ALL, "--mesh": None}, "--processes needs --mesh"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(home, tmp_path, capsys, monkeypatch, case):
    changes, message = BAD[case]
    monkeypatch.setattr(finetune, "_train", None)
    added = [str(text) for pair in changes.items() if pair[1] is not None for text in pair]
    assert cli.main([*tiny_lm.options(home, tmp_path / "run", **OPTIONS), *added]) == 2
    printed = capsys.readouterr()
    assert re.search(message, printed.err), printed.err
    assert "Traceback" not in printed.err and not (tmp_path / "run").exists()

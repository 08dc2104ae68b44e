"""Checkpoints: everything comes back bit for bit, and a crash at any moment loses no complete step."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import LoraConfig, lora
from lora_jax.core.adapter import Full, Layout, LowRank
from lora_jax.training import checkpoint, train

KERNEL = Layout((), (0,), (1,))


def pair(key, n_in, n_out, rank=2, dtype=jnp.float32, **options):
    a, b = jax.random.split(jax.random.key(key))
    a, b = jax.random.normal(a, (n_in, rank), dtype), jax.random.normal(b, (rank, n_out), dtype)
    return LowRank(a, b, KERNEL, **{"scale": 2.0, **options})


def assert_same(got, want):
    """Equal in structure (static fields and all), dtype and every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert isinstance(x, jax.Array)
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def bytes_on_disk(directory):
    return sum(path.stat().st_size for path in pathlib.Path(directory).rglob("*") if path.is_file())


def stack(**options):
    """Three stacked matrices of true ranks 2, 0 and 1."""
    return LowRank(jnp.ones((3, 4, 2)), jnp.ones((3, 2, 5)), Layout((0,), (1,), (2,)), ranks=(2, 0, 1), **options)


KINDS = {
    "pair": pair(0, 4, 5),
    "other scale and dropout": pair(1, 4, 5, scale=0.1 + 0.2, dropout=0.05),
    "frozen a": pair(2, 4, 5, frozen=("a",)),
    "stack": stack(scale=0.5),
    "scale per layer": stack(scale=jnp.asarray([1.0, 0.0, 0.25])),
    "axes out of order": LowRank(jnp.ones((5, 2)), jnp.ones((2, 3, 4)), Layout((), (2,), (0, 1)), scale=1.0),
    "full": Full(jnp.arange(6.0).reshape(2, 3)),
    "frozen full": Full(jnp.float32(3.0), frozen=("value",)),
    "not a number": Full(jnp.asarray([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(tmp_path, kind):
    adapters = {"params/w": KINDS[kind]}
    checkpoint.save(tmp_path, adapters)
    assert_same(checkpoint.load(tmp_path), adapters)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_every_dtype_comes_back(tmp_path, dtype):
    adapters = {"w": pair(0, 7, 3, dtype=jnp.float32), "v": Full(jnp.linspace(-3, 3, 11).astype(dtype))}
    checkpoint.save(tmp_path, adapters)
    assert_same(checkpoint.load(tmp_path), adapters)


def test_64_bits_are_read_as_they_are_or_not_at_all(tmp_path):
    with jax.enable_x64(True):
        adapters = {"w": Full(jnp.asarray([1 / 3], dtype="float64"))}
        checkpoint.save(tmp_path, adapters)
        assert_same(checkpoint.load(tmp_path), adapters)
    with pytest.raises(ValueError, match="there are float64 arrays: set jax_enable_x64 to read them as they are"):
        checkpoint.load(tmp_path)


def test_any_key_comes_back(tmp_path):
    names = [
        "a%2Eb",
        "a/b",
        "a",
        "a%2Fb",
        "0000",
        "adapters",
        "..",
        "x y",
        "ключ",
        "k" * 300,
        "p/" * 60 + "w",
        "%",
        "'",
        '"',
    ]
    adapters = {name: Full(jnp.full(2, i, jnp.float32)) for i, name in enumerate(names)}
    checkpoint.save(tmp_path, adapters)
    loaded = checkpoint.load(tmp_path)
    assert list(loaded) == names
    assert_same(loaded, adapters)


def test_config_and_data_position_come_back(tmp_path):
    config = LoraConfig(rank=3, alpha=7, targets=["re:.*query.*", "mlp/up"], layers=[0, 2], rank_pattern={"up": 2})
    data = {"epoch": 3, "rest": [1, None, 2.5, "seed"], "done": False}
    checkpoint.save(tmp_path, {"w": pair(0, 3, 3)}, config=config, step=12, data=data)
    got = checkpoint.restore(tmp_path)
    assert (got.config, got.step, got.data, got.state) == (config, 12, data, None)


@pytest.mark.parametrize("data", [(1, 2), {1: 2}, {"x": np.zeros(2)}, float("nan"), {"x": {1, 2}}])
def test_data_that_json_would_change_is_an_error(tmp_path, data):
    with pytest.raises(ValueError, match="data must come back from JSON as it is"):
        checkpoint.save(tmp_path, {"w": pair(0, 3, 3)}, data=data)
    assert not list(tmp_path.iterdir())


VARIABLES = {"a.b": {"w": jnp.ones((4, 5))}, "head": jnp.ones((5, 2)), "w": jnp.ones((4, 5))}


def make_state(tx, generator="threefry2x32"):
    frozen = pair(1, 4, 5, frozen=("a",))
    adapters = {"a%2Eb/w": pair(0, 4, 5, dropout=0.25), "head": Full(jnp.ones((5, 2))), "w": frozen}
    return train.init_state(adapters, tx, key=jax.random.key(3, impl=generator))


def make_step(tx):
    def model(params, x):
        return (x @ params["a.b"]["w"] + x @ params["w"]) @ params["head"]

    return train.make_train_step(lambda p, batch, key: jnp.mean(lora(model, key=key)(p, batch) ** 2), tx)


@pytest.mark.parametrize("generator", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("optimiser", ["adamw", "schedule", "noise", "sgd"])
def test_training_state_comes_back(tmp_path, optimiser, generator):
    tx = {
        "adamw": optax.adamw(1e-3),
        "schedule": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-3, 0, 10))),
        "noise": optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(1)), optax.sgd(1e-2, momentum=0.9)),
        "sgd": optax.sgd(1e-2),
    }[optimiser]
    state = make_state(tx, generator)
    checkpoint.save(tmp_path, state.adapters, state=state)
    got = checkpoint.restore(tmp_path, tx=tx)
    assert_same(got.state, state)
    assert_same(got.state.adapters, got.adapters)
    assert checkpoint.restore(tmp_path).state is None


def test_step_is_the_states_own_by_default(tmp_path):
    tx = optax.sgd(1e-2)
    state = make_state(tx)
    checkpoint.save(tmp_path, state.adapters, state=state.__class__(**{**vars(state), "step": jnp.int32(7)}))
    assert checkpoint.restore(tmp_path, tx=tx).step == 7


def test_state_of_another_optimiser_is_an_error(tmp_path):
    state = make_state(optax.adamw(1e-3))
    checkpoint.save(tmp_path, state.adapters, state=state)
    with pytest.raises(ValueError, match=r"another optimiser than `tx`.*\n.*count: int32\[\], `tx` has nothing"):
        checkpoint.restore(tmp_path, tx=optax.sgd(1e-2))


def test_tx_without_a_saved_state_is_an_error(tmp_path):
    checkpoint.save(tmp_path, {"w": pair(0, 3, 3)})
    with pytest.raises(ValueError, match="saved without a training state, so there is none to restore with `tx`"):
        checkpoint.restore(tmp_path, tx=optax.sgd(1e-2))


def test_state_of_other_adapters_is_an_error(tmp_path):
    state = make_state(optax.sgd(1e-2))
    others = jax.tree.map(lambda x: x + 1, state.adapters)
    with pytest.raises(ValueError, match=r"not those of the state: pass state\.adapters"):
        checkpoint.save(tmp_path, others, state=state)


@pytest.mark.parametrize(("adapters", "message"), [
    ({}, "the adapter set is empty"),
    ({"x/w": Full(jax.ShapeDtypeStruct((2,), jnp.float32))}, r"these are abstract: x/w \(value\)"),
])  # fmt: skip
def test_nothing_to_save_is_an_error(tmp_path, adapters, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, adapters)


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_step_must_be_a_whole_number(tmp_path, step):
    with pytest.raises(ValueError, match="step must be a whole number of at least 0"):
        checkpoint.save(tmp_path, {"w": pair(0, 3, 3)}, step=step)


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_keep_must_be_a_positive_whole_number(tmp_path, keep):
    with pytest.raises(ValueError, match=r"keep must be None .* or a whole number of at least 1"):
        checkpoint.Manager(tmp_path, keep=keep)


def test_misfit_with_the_base_names_every_path(tmp_path):
    adapters = {"x/w": pair(0, 3, 4), "x/v": pair(1, 3, 4), "y/w": pair(2, 3, 4), "z": Full(jnp.ones(2))}
    checkpoint.save(tmp_path, adapters)
    fitting = {"x": {"w": shape(3, 4), "v": shape(3, 4)}, "y": {"w": shape(3, 4)}, "z": shape(2)}
    other = {"x": {"w": shape(3, 5), "v": shape(3, 4)}, "q": {"w": shape(3, 4)}, "z": shape(3)}
    assert_same(checkpoint.load(tmp_path, variables=fitting), adapters)
    with pytest.raises(ValueError, match="3 of 4 adapters do not fit") as error:
        checkpoint.load(tmp_path, variables=other)
    lines = str(error.value).splitlines()[1:]
    assert lines[0].startswith("  x/w: the adapter's b has the shape (2, 4)")
    assert lines[1] == "  y/w: there is no such parameter; the nearest is q/w"
    assert lines[2].startswith("  z: the adapter's value has the shape (2,)")


@pytest.mark.parametrize(("count", "size"), [(36, 900), (72, 13_000), (300, 8), (1, 1)])
def test_bytes_on_disk(tmp_path, count, size):
    """1.1 times the leaves and 64 KiB, for 1 MB, 30 MB, and many tiny adapters."""
    adapters = {f"params/encoder/layer_{i}/attention/self/query/kernel": pair(i, size, size, rank=4) for i in range(count)}
    leaves = sum(leaf.nbytes for leaf in jax.tree.leaves(adapters))
    checkpoint.save(tmp_path, adapters, config=LoraConfig(rank=4, targets=["query"]))
    assert bytes_on_disk(tmp_path) <= 1.1 * leaves + 2**16


def test_no_base_leaf_is_in_it(tmp_path):
    """A directory of the adapters alone: adding a state adds the state's arrays, and nothing of the base's size."""
    import orbax.checkpoint as ocp

    adapters = {"w": pair(0, 30, 50), "head": Full(jnp.ones(3, jnp.bfloat16))}
    checkpoint.save(tmp_path, adapters)
    assert sorted(path.name for path in (tmp_path / "0").iterdir() if path.is_dir()) == ["adapters", "meta"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        vectors = reader.restore(tmp_path / "0" / "adapters")
    assert {name: vector.shape for name, vector in vectors.items()} == {"float32": (160,), "bfloat16": (3,)}


def test_no_checkpoint_is_an_error(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        with checkpoint.Manager(directory) as manager:
            assert manager.latest_step() is None
            with pytest.raises(FileNotFoundError, match="has no complete checkpoint: check the path"):
                manager.restore()
        with pytest.raises(FileNotFoundError, match="has no complete checkpoint: check the path"):
            checkpoint.load(directory)
    assert not (tmp_path / "missing").exists()


def test_steps_are_chosen_and_must_grow(tmp_path):
    for step in (3, 10):
        checkpoint.save(tmp_path, {"w": Full(jnp.float32(step))}, step=step)
    assert checkpoint.load(tmp_path)["w"].value == 10
    assert checkpoint.load(tmp_path, step=3)["w"].value == 3
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint of step 4, only of \[3, 10\]"):
        checkpoint.load(tmp_path, step=4)
    for step in (10, 7):
        with pytest.raises(ValueError, match=f"a checkpoint of step 10 already, so one of step {step} can't be added"):
            checkpoint.save(tmp_path, {"w": Full(jnp.float32(0))}, step=step)
    assert checkpoint.load(tmp_path)["w"].value == 10


def test_manager_saves_in_the_background_and_keeps_the_newest(tmp_path):
    """The arrays are donated as soon as `save` returns, as a train step would."""
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    value = jnp.zeros(200_000)
    with checkpoint.Manager(tmp_path / "run", keep=2) as manager:
        for step in range(5):
            manager.save({"w": Full(value)}, step=step, data=step)
            value = bump(value)
        manager.wait()
        assert manager.latest_step() == 4
        got = manager.restore(step=3)
        assert got.data == 3
        assert_same(got.adapters, {"w": Full(jnp.full(200_000, 3.0))})
        with pytest.raises(ValueError, match="a checkpoint of step 4 already"):
            manager.save({"w": Full(value)}, step=4)
    assert sorted(os.listdir(tmp_path / "run")) == ["3", "4"]
    assert np.all(checkpoint.load(tmp_path / "run")["w"].value == 4)


def test_an_error_in_the_background_is_raised(tmp_path):
    """The array store has no unsigned 4-bit integers; the failed step does not count."""
    with checkpoint.Manager(tmp_path) as manager:
        manager.save({"w": Full(jnp.zeros(4, jnp.uint4))}, step=1)
        with pytest.raises(ValueError, match="Unsupported data type"):
            manager.wait()
        assert manager.latest_step() is None
        manager.save({"w": Full(jnp.zeros(4))}, step=1)
        manager.wait()
        assert manager.latest_step() == 1


def test_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save("run", {"w": pair(0, 3, 3)})
    assert_same(checkpoint.load("run"), {"w": pair(0, 3, 3)})


def test_sharded_adapters(tmp_path):
    """They come back on one device."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plain = pair(0, 8, 6)
    a = jax.device_put(plain.a, jax.NamedSharding(mesh, jax.P("x", None)))
    b = jax.device_put(plain.b, jax.NamedSharding(mesh, jax.P(None, "y")))
    adapters = {"w": LowRank(a, b, KERNEL, scale=2.0)}
    checkpoint.save(tmp_path, adapters)
    loaded = checkpoint.load(tmp_path)
    assert_same(loaded, {"w": plain})
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(loaded))


def plant_broken_steps(directory):
    """Half of a checkpoint under names that a scan for steps would take, all but one newer than any real one."""
    good = directory / "1"
    (directory / "90").mkdir()
    (directory / "91").write_text("a file")
    shutil.copytree(good / "meta", directory / "92" / "meta")
    shutil.copytree(good, directory / "93", ignore=shutil.ignore_patterns("manifest.ocdbt"))
    shutil.copytree(good, directory / "94", ignore=shutil.ignore_patterns("_CHECKPOINT_METADATA"))
    shutil.copytree(good, directory / "95", ignore=shutil.ignore_patterns("meta"))
    shutil.copytree(good / "adapters", directory / "0" / "adapters")  # as a deletion that was killed leaves it
    shutil.copytree(good, directory / "96.orbax-checkpoint-tmp")
    shutil.copytree(good, directory / "97")
    (directory / "97" / "meta" / "metadata").write_text('{"format_version": 1, "ite')
    (directory / "notes").mkdir()


def test_broken_steps_are_ignored_and_set_aside(tmp_path):
    checkpoint.save(tmp_path, {"w": pair(0, 3, 3)}, step=1)
    plant_broken_steps(tmp_path)
    planted = sorted(os.listdir(tmp_path))
    with checkpoint.Manager(tmp_path, keep=2) as manager:
        assert manager.latest_step() == 1
        assert_same(manager.restore().adapters, {"w": pair(0, 3, 3)})
        assert sorted(os.listdir(tmp_path)) == planted  # a reader changes nothing
        for step in (2, 92):
            manager.save({"w": pair(step, 3, 3)}, step=step)
    assert_same(checkpoint.load(tmp_path), {"w": pair(92, 3, 3)})
    assert_same(checkpoint.load(tmp_path, step=2), {"w": pair(2, 3, 3)})
    aside = [f"{step}.incomplete" for step in (90, 92, 93, 94, 95, 97)]
    assert sorted(os.listdir(tmp_path)) == sorted(["2", "91", "92", "notes", *aside])


def test_damaged_arrays_are_an_error(tmp_path):
    checkpoint.save(tmp_path, {"w": pair(0, 30, 30)}, step=1)
    for path in (tmp_path / "1" / "adapters").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"the arrays in .*1/adapters can't be read; `step` takes another checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(("place", "value", "message"), [
    ("adapters/kinds/0/kind", "Rotation", "x/w is an adapter of the kind 'Rotation'; this lora_jax knows LowRank, Full"),
    ("adapters/kinds/0/fields/twist", 1, "x/w has fields that this lora_jax does not know: twist"),
    ("adapters/kinds/0/arrays/b", ["float32", [2, 400]], r"float32 and the shape \(2, 400\) is missing"),
    ("adapters/kinds/0/arrays/b", ["float16", [0]], r"float16 and the shape \(0,\) is missing"),
    ("format_version", 2, "has the format version 2, but this lora_jax reads 1: use the lora_jax that wrote it"),
])  # fmt: skip
def test_another_format_is_an_error(tmp_path, place, value, message):
    checkpoint.save(tmp_path, {"x/w": pair(0, 3, 4)})
    path = tmp_path / "0" / "meta" / "metadata"
    node = meta = json.loads(path.read_text())
    *outer, last = place.split("/")
    for key in outer:
        node = node[int(key) if key.isdecimal() else key]
    node[last] = value
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)


def test_orbax_is_quiet(tmp_path):
    program = (
        "import sys, jax.numpy as jnp; from lora_jax import checkpoint; from lora_jax.core.adapter import Full\n"
        "for step in range(3): checkpoint.save(sys.argv[1], {'w': Full(jnp.ones(3))}, step=step)\n"
        "checkpoint.load(sys.argv[1])\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


SAVE_FOREVER = """
import sys
import jax.numpy as jnp
from lora_jax import checkpoint
from lora_jax.core.adapter import Full

with checkpoint.Manager(sys.argv[1], keep=2) as manager:
    first = manager.latest_step()
    if first is not None:
        assert jnp.all(manager.restore().adapters["w"].value == first)
    for step in range(0 if first is None else first + 1, 10**6):
        manager.save({"w": Full(jnp.full(1_000_000, step, jnp.float32))}, step=step, data=step)
        print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
    """SIGKILL at moments spread over a save: the newest complete step is whole, and the next run goes on from it."""
    newest = -1
    for moment in range(4):
        with subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, tmp_path], stdout=subprocess.PIPE, text=True) as child:
            try:
                for _ in range(3 + moment):  # that many saves have begun
                    assert child.stdout.readline()
                while not any("tmp" in name for name in os.listdir(tmp_path)):
                    assert child.poll() is None
                time.sleep(0.004 * moment)
            finally:
                child.send_signal(signal.SIGKILL)
        got = checkpoint.restore(tmp_path)
        assert got.step > newest
        assert got.data == got.step
        assert_same(got.adapters, {"w": Full(jnp.full(1_000_000, got.step, jnp.float32))})
        newest = got.step


def test_resumed_training_is_bit_identical(tmp_path, lenient):
    tx = optax.adamw(1e-2)
    batches = [jax.random.normal(jax.random.key(i), (6, 4)) for i in range(6)]
    state, step = make_state(tx), make_step(tx)
    for batch in batches[:3]:
        state, _ = step(state, VARIABLES, batch)
    checkpoint.save(tmp_path, state.adapters, state=state, data=3)
    resumed = checkpoint.restore(tmp_path, tx=tx)
    other = resumed.state
    for batch in batches[resumed.data :]:
        state, _ = step(state, VARIABLES, batch)
        other, _ = step(other, VARIABLES, batch)
    assert int(other.step) == 6
    assert_same(other, state)
    assert step._cache_size() == 1

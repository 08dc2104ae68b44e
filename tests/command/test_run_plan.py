"""`lora-jax finetune --plan`, and what the device of a run decides."""

import dataclasses

import jax
import pytest

from lora_jax.command import cli, device_options, options, run_plan
from lora_jax.command.hosts import Hosts
from lora_jax.planning import plan, topology
from tests.support import tiny_lm

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lm.home(tmp_path_factory.mktemp("home"))


def call(home, capsys, *more, code=0):
    line = tiny_lm.options(home, None)
    assert cli.main([*line, *map(str, more)]) == code
    printed = capsys.readouterr()
    return printed.out if code == 0 else printed.err


def test_here(home, capsys):
    """The program of this machine's run: float32, its layers one by one."""
    printed = call(home, capsys, "--plan", "--remat", "products")
    assert "float32" in printed and "rank 4 on all-linear; 4 x 48 tokens" in printed
    assert "layers one by one, remat products, attention of 48 queries at a time" in printed
    assert f"here:1: 1 x {jax.devices()[0].device_kind}" in printed and "compiler" in printed
    assert not any(home.glob("runs*"))


def test_other_chips(home, capsys, monkeypatch):
    """What a run would be there: in bfloat16, scanned, all kept."""
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    printed = call(home, capsys, "--plan", "--topology", "v5e:2x2", "--mesh", "fsdp=2,model=2")
    assert "bfloat16" in printed and "layers scanned, remat none" in printed and "v5e:2x2: 4 x TPU v5 lite" in printed
    printed = call(home, capsys, "--plan", "--topology", "v5e:1x1", "--dtype", "float32", "--accumulate", 4)
    assert "float32" in printed and "4 microbatches" in printed


def test_it_is_that_of_the_run(home, monkeypatch):
    """With the run's own method and optimiser."""
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    given = {"task": "lm", "model": str(home / "model"), "data": "texts", "batch_size": 4, "max_length": 48, "rank": 4}
    made = lambda **more: run_plan.make({**given, **more}, Hosts(), "v5e:1x1").steps[0]
    plain, dora, half = made(), made(dora=True), made(method="lora_fa")
    assert dora.trainable > plain.trainable > half.trainable and plain.optimizer_bytes == 8 * plain.trainable
    assert half.flops < plain.flops


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--topology", "v5e:1x1"], "--topology says for which chips to --plan: give that, too"),
        (["--plan", "--out", "run"], "--plan makes no run, and is for a new one: leave --resume and --out out"),
        (
            ["--plan", "--topology", "v5e:2x2"],
            "v5e:2x2 has 4 chips, and the run is on 1: say how it uses them, as --mesh fsdp=4",
        ),
        (["--plan", "--topology", "v9"], "topology must be a TPU and its shape"),
        (["--plan", "--mesh", "data=999"], "topology: here:999 asks for 999 devices"),
        (["--plan", "--adapter", "somewhere", "--targets", "q_proj"], "--plan does not read --adapter"),
        (["--plan", "--max-length", "65"], "max_length 65 is above the 64 positions of the model"),
        (["--plan", "--task", "classify"], "--plan is for --task lm"),
    ],
)
def test_what_is_refused(home, capsys, more, message):
    assert message in call(home, capsys, *more, code=2)


# --- the device -------------------------------------------------------------------------------------------------------


def settled(home, target, given=None, axes=None, **changes):
    config = options.new_run("lm", {"model": str(home / "model"), "data": "texts", "rank": 4, **(given or {})})
    return device_options.settled(dataclasses.replace(config, **changes), given or (), axes or {}, target)


def chip(platform, hbm):
    return topology.Topology("h100", platform, "a chip", 1, hbm)


def test_a_cpu_decides_nothing(home):
    found = settled(home, chip("cpu", 2**40))
    assert (found.dtype, found.scan_layers, found.remat, found.attention_block) == ("float32", False, "none", None)


def test_memory_decides(home):
    """The less there is, the less is kept."""
    sizes = [settled(home, chip("gpu", hbm), max_length=64, batch_size=64).remat for hbm in (2**30, 22 * 2**20, 2**20)]
    assert sizes == ["none", "products", "full"]
    found = settled(home, chip("tpu", None))
    assert (found.dtype, found.scan_layers, found.remat, found.attention_block) == ("bfloat16", True, "full", 256)
    assert settled(home, chip("gpu", 22 * 2**20), max_length=64, batch_size=64, accumulate=64).remat == "none"


def test_what_is_given_stays(home):
    given = {"dtype": "float32", "scan_layers": False, "remat": "products"}
    found = settled(home, chip("tpu", 2**20), given)
    assert (found.dtype, found.scan_layers, found.remat, found.attention_block) == ("float32", False, "products", 256)


@pytest.mark.slow
def test_a_run_says_what_was_decided(home, tmp_path, capsys, monkeypatch):
    """On a device that says it is a GPU."""
    monkeypatch.setattr(topology, "_here", lambda name, count: chip("gpu", 2**30))
    assert cli.main(tiny_lm.options(home, tmp_path / "run", steps=1)) == 0
    assert "for a a chip: dtype bfloat16, scan_layers True\n" in capsys.readouterr().out
    assert plan.read_json_object(tmp_path / "run" / "config.json")["scan_layers"] is True

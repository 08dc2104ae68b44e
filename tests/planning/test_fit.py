"""`lora-jax plan --fit`: what it chooses from, how it searches, and that its command line is the step that it chose."""

import dataclasses
import json
import shlex

import jax
import pytest

from lora_jax.command import cli, config_files, options
from lora_jax.command.tasks import lm
from lora_jax.core.errors import InputError
from lora_jax.planning import compile_cache, fit, plan, table, topology, train_steps
from lora_jax.planning.topology import Compiled, Speed, Topology
from tests.planning.test_plan import TINY

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 1024}))
    return str(file)


@pytest.fixture
def estimated(monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)


def request(config, **changes):
    return plan.Request(**{"model": config, "rank": 4, "batch": 8, "sequence": 512, "topology": "v5e:1x1", **changes})


def test_what_fits_easily_keeps_everything(config, estimated):
    """The kernels as they are, nothing computed again, one batch: the fastest."""
    found = fit.search(request(config), {"topology"})
    best = found.best.request
    assert (best.quantize, best.remat, best.accumulate) == ("none", "none", 1)
    assert found.compiled == 0 and found.count > 50 and found.best.fits


def test_what_is_given_stays(config, estimated):
    asked = request(
        config, quantize="nf4", block=16, remat="full", accumulate=2, mesh={"fsdp": 2, "model": 2}, topology="v5e:2x2"
    )
    found = fit.search(asked, {"topology", "quantize", "remat", "accumulate", "mesh"})
    for one in found.tried:
        own = one.request
        assert (own.quantize, own.remat, own.accumulate, own.mesh) == ("nf4", "full", 2, {"fsdp": 2, "model": 2})
    assert {one.request.attention_block for one in found.tried} == {512, 256}


@pytest.mark.parametrize(("model", "name"), [("smollm2-135m", "v5e:1x1"), ("llama-3-70b", "v5p:1x1x1")])
def test_the_smallest_chips(estimated, model, name):
    """A 70B in 4 bits takes 40 GB, and what it keeps of 8 rows of 2,048 tokens comes on top."""
    found = fit.search(plan.Request(model=model), ())
    assert found.best is not None and found.target.name == name


def known(hbm):
    return Topology("here:1", "tpu", "a chip", 1, hbm, Speed(1e12, 1e11, 1e10, 1e9))


def searched(config, monkeypatch, says, hbm=64 * 2**20):
    """A search whose compiler says what `says(request)` does: seconds and bytes."""
    asked = []

    def compile_for(target, traced):
        seconds, size = says(asked[-1])
        return Compiled(argument_bytes=1, temporary_bytes=1, peak_bytes=size, step_seconds=seconds)

    def prepare(step, own, *rest, real=plan.prepare):
        asked.append(own)
        return real(step, own, *rest)

    monkeypatch.setattr(compile_cache, "compile_for", compile_for)
    monkeypatch.setattr(plan, "prepare", prepare)
    monkeypatch.setattr(topology, "read", lambda name: known(hbm))
    monkeypatch.setattr(topology, "devices", lambda target: jax.devices()[:1])
    return fit.search(request(config, topology="here:1"), {"topology", "attention_block"}), asked


def test_the_compiler_decides(config, monkeypatch):
    """Of three that fit, the fastest by its figures, whatever the estimate says; and no more are compiled."""
    found, asked = searched(config, monkeypatch, lambda own: (1.0 if own.quantize == "none" else 0.5, 2**20), 2**40)
    assert found.compiled == len(asked) == len(found.tried) == 3 and all(one.fits for one in found.tried)
    best = min(found.tried, key=lambda one: one.step.step_seconds)
    assert found.best.step.step_seconds == best.step.step_seconds
    assert found.best.bytes == 2**20
    printed = table.fit_table(found)
    assert printed.count("\n*") == 1 and "compiler" in printed


def test_it_gives_up(config, monkeypatch):
    """Where nothing fits, after a few programs, none of which is larger than one that did not fit."""
    found, asked = searched(config, monkeypatch, lambda own: (1.0, 2**41), 2**30)
    assert found.best is None and 1 <= len(asked) <= fit.MOST
    assert "None fits here:1." in table.fit_table(found)
    sizes = [one.guess.bytes for one in found.tried if one.request.quantize == "none"]
    assert sizes == sorted(sizes, reverse=True)


def test_its_command_line_is_its_step(config, estimated):
    """The step of the run that the command line begins, with the sizes of the model, is the step that was planned."""
    asked = request(config, topology="v5e:2x2", sequence=64, quantize="nf4", block=16, remat="products")
    best = fit.search(asked, {"topology", "quantize", "remat"}).best.request
    words = shlex.split(fit.command(best))
    assert words[:2] == ["lora-jax", "finetune"]
    given = config_files.given_run(cli.parser().parse_args(words[1:]))
    run = options.new_run(given.pop("task"), given)
    mesh = best.make_mesh(None)
    steps = lm.train_step(run, mesh), best.step(mesh)
    assert steps[0].model == dataclasses.replace(steps[1].model, attention_block=run.attention_block)
    sizes = plan.read_sizes(config)
    jaxprs = []
    for step in steps:
        planned = train_steps.low_rank(train_steps.prepare(step, sizes))
        jaxprs.append(str(planned.jitted.trace(*planned.args).jaxpr))
    assert jaxprs[0] == jaxprs[1]


def test_what_a_compiler_said_is_kept(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = request(config, topology="cpu", sequence=16, batch=2)
    target = topology.read("cpu")
    sizes = plan.read_sizes(config)
    setup = plan.prepare(own.for_model(sizes).step, own, sizes, topology.devices(target))
    step = train_steps.low_rank(setup)
    first = compile_cache.compile_for(target, step.jitted.trace(*step.args))
    monkeypatch.setattr(topology, "compile_for", lambda *_: pytest.fail("compiled again"))
    assert compile_cache.compile_for(target, step.jitted.trace(*step.args)) == first
    assert first.peak_bytes > 0 and first.traffic is not None
    [file] = (tmp_path / "lora_jax" / "plans").iterdir()
    assert json.loads(file.read_text())["peak_bytes"] == first.peak_bytes


def test_the_command(config, capsys, estimated):
    assert cli.main(["plan", config, "--fit", "--topology", "v6e:1x1", "--sequence", "512", "--rank", "4"]) == 0
    printed = capsys.readouterr().out
    assert "v6e:1x1: 1 x TPU v6 lite with 31.24 GiB each" in printed and "estimate" in printed
    assert f"lora-jax finetune --task lm --model {config} --dtype bfloat16 --scan-layers --remat none" in printed
    assert cli.main(["plan", "llama-3-70b", "--fit", "--topology", "v5e:1x1"]) == 2
    assert "None fits v5e:1x1." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json"], "--fit prints a table of its own"),
        (["--compare", "full"], "--fit prints a table of its own"),
        (["--topology", "cpu"], "the memory or speed of cpu is not known"),
        (["--topology", "v5e:2x2", "--mesh", "data=4", "--batch", "4", "--accumulate", "2"], "batch: 4 rows can't be cut"),
    ],
)
def test_what_is_refused(config, capsys, estimated, arguments, message):
    assert cli.main(["plan", config, "--fit", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_chips(config):
    with pytest.raises(InputError, match="topology must be a TPU and its shape"):
        request(config, topology="v9")

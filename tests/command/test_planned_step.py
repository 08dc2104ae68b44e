"""What `lora-jax plan` compiles is what `lora-jax finetune --task lm` runs: the same jaxpr, to the letter."""

import jax
import pytest

import lora_jax as lj
from lora_jax import sharding
from lora_jax.command import options
from lora_jax.command.finetune import _Program
from lora_jax.command.tasks import registry
from lora_jax.planning import plan, train_steps
from lora_jax.planning.decoder_step import projections
from lora_jax.training import checkpoint
from tests.command.test_family_runs import home_of
from tests.support import tiny_lm
from tests.support.marks import slow_unless

pytestmark = pytest.mark.usefixtures("usual_promotion")
ROWS, LENGTH, RANK = 4, 48, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lm.home(tmp_path_factory.mktemp("home"))


def run_of(home, mesh, **given):
    """The program of a run, and a batch of its data."""
    shared = {
        "model": str(home / "model"),
        "data": str(home / "texts.jsonl"),
        "rank": RANK,
        "targets": list(projections(tiny_lm.sizes())),
    }
    config = options.new_run("lm", {**shared, "batch_size": ROWS, "max_length": LENGTH, **given})
    session = registry.prepare(config, mesh)
    return session, session.init(session.config)


def jaxpr_of_run(home, tmp_path, mesh, **given):
    """Of the step that the run takes, on its weights and its first batch."""
    session, adapters = run_of(home, mesh, **given)
    with checkpoint.Manager(tmp_path / "adapters") as manager, checkpoint.Manager(tmp_path / "best") as best:
        program = _Program(session, adapters, manager, best)
    return program._train_step.trace(program.state, session.task.variables, next(program._batches)).jaxpr


def jaxpr_of_plan(home, mesh, **given):
    """Of the step that is planned, on shapes alone."""
    request = plan.Request(
        model=str(home / "model"),
        rank=RANK,
        batch=ROWS,
        sequence=LENGTH,
        topology="cpu" if mesh is None else f"cpu:{mesh.size}",
        mesh=None if mesh is None else dict(mesh.shape),
        **given,
    )
    devices = jax.devices()[: 1 if mesh is None else mesh.size]
    request = request.for_model(plan.read_sizes(request.model))
    step = request.step(request.make_mesh(devices))
    step = train_steps.low_rank(train_steps.prepare(step, plan.read_sizes(request.model), device=devices[0]))
    return step.jitted.trace(*step.args).jaxpr


CASES = [
    dict(dtype="float32", scan_layers=False, remat="none", attention_block=LENGTH),
    dict(dtype="bfloat16", scan_layers=True, remat="full", attention_block=16),
    dict(dtype="bfloat16", scan_layers=True, remat="products", attention_block=16, accumulate=2),
    dict(dtype="bfloat16", scan_layers=True, remat="none", attention_block=16, quantize="nf4", block=16),
    dict(dtype="float32", scan_layers=False, remat="full", attention_block=32, quantize="int8", block=16, accumulate=4),
]


@pytest.mark.parametrize("given", slow_unless(lambda given: given in CASES[1:4], CASES))
def test_jaxprs(home, tmp_path, given):
    assert str(jaxpr_of_run(home, tmp_path, None, **given)) == str(jaxpr_of_plan(home, None, **given))


def test_jaxprs_of_experts(tmp_path):
    home = home_of("mixtral", tmp_path)
    given = CASES[0] | {"targets": ["q_proj", "down_proj"]}
    assert str(jaxpr_of_run(home, tmp_path, None, **given)) == str(jaxpr_of_plan(home, None, **given))


@pytest.mark.parametrize("axes", slow_unless(lambda axes: "fsdp" in axes, [{"data": 2}, {"fsdp": 2, "model": 2}]))
def test_jaxprs_on_a_mesh(home, tmp_path, axes):
    mesh = sharding.make_mesh(axes, jax.devices()[: 2 ** len(axes)])
    given = CASES[2]
    assert str(jaxpr_of_run(home, tmp_path, mesh, **given)) == str(jaxpr_of_plan(home, mesh, **given))


def test_other_options_are_other_programs(home):
    """So that equal texts say something."""
    texts = [str(jaxpr_of_plan(home, None, **given)) for given in CASES]
    assert len(set(texts)) == len(texts)


def test_losses_are_the_same_however_a_step_is_computed(home):
    """In float32 scanning, computing again, blocks and microbatches change nothing but the order of sums."""
    found = {}
    for given in (
        {},
        dict(scan_layers=True, remat="products", attention_block=16),
        dict(scan_layers=True, remat="full", accumulate=2),
    ):
        session, _ = run_of(home, None, **given)
        task = session.task
        loss = task.loss(
            lj.attach(task.variables, session.init(session.config)), next(task.train_batches(0)), jax.random.key(0)
        )
        found[str(given)] = float(loss.mean())
    first, *others = found.values()
    assert others == pytest.approx([first] * len(others), rel=1e-5)

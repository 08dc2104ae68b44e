"""`lora-jax plan`: what a train step needs, by the compiler of this machine, or estimated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import sharding
from lora_jax.command import cli
from lora_jax.models import llama, presets
from lora_jax.planning import plan, topology, train_steps
from lora_jax.planning import table as plan_table
from lora_jax.planning.flops import dot_flops
from tests.support import tiny_lm

pytestmark = pytest.mark.usefixtures("lenient")  # JAX's own attention promotes bfloat16
TINY = {"model_type": "llama", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def request(config, **changes):
    return plan.Request(**{"model": config, "rank": 4, "batch": 2, "sequence": 24, "topology": "cpu", **changes})


def setup(asked, sizes):
    """The step's shapes, for no devices."""
    return train_steps.prepare(asked.for_model(sizes).step(asked.make_mesh(None)), sizes)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-3-8b", 8.030), ("llama-3-70b", 70.554), ("llama-3.2-1b", 1.236), ("llama-3.2-3b", 3.213), ("qwen2.5-7b", 7.616),
        ("qwen3-0.6b", 0.596), ("qwen3-4b", 4.022), ("qwen3-8b", 8.191), ("qwen3-32b", 32.762), ("qwen3-30b-a3b", 30.532),
        ("mistral-7b", 7.242), ("mistral-nemo-12b", 12.248), ("mixtral-8x7b", 46.703), ("gemma-3-1b", 1.000), ("phi-4", 14.660),
        ("gemma-3-4b", 3.880), ("gemma-3-12b", 11.766), ("gemma-3-27b", 27.009), ("gpt-oss-20b", 20.915), ("gpt-oss-120b", 116.829),
        ("smollm2-135m", 0.1345),
    ],
)  # fmt: skip
def test_named_shapes(name, billions):
    """As the models' cards and checkpoints count them."""
    table = llama.parameters(presets.named(name), scan_layers=True)
    assert sum(np.prod(shape) for shape, _ in table.values()) / 1e9 == pytest.approx(billions, abs=6e-4)


@pytest.mark.slow
def test_compiled_for_this_machine(config):
    found = plan.make(request(config, compare=("full", "naive")))
    low_rank, full, naive = found.steps
    assert [step.source for step in found.steps] == ["compiler"] * 3
    assert found.hbm_bytes_per_chip is None and low_rank.fits is None
    assert full.trainable == found.parameters and naive.trainable == low_rank.trainable
    # q, k, v, o: 32 x (32, 16, 16, 32); gate, up, down: 32 x 48; rank 4, 3 layers; float32 moments.
    assert low_rank.trainable == 3 * 4 * (64 + 48 + 48 + 64 + 3 * 80)
    assert low_rank.optimizer_bytes == 8 * low_rank.trainable
    assert low_rank.flops < min(full.flops, naive.flops)
    for step in found.steps:
        assert step.peak_bytes_per_chip >= step.argument_bytes > 0 and step.compiler_flops > 0


def test_estimated_without_the_compiler(config, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    found = plan.make(request(config, topology="v5e:1x1", compare=("full", "naive")))
    assert {step.source for step in found.steps} == {"analytic estimate"}
    assert "ANALYTIC ESTIMATE" in plan_table.table(found)
    low_rank, full, naive = found.steps
    assert low_rank.peak_bytes_per_chip < naive.peak_bytes_per_chip < 15.75 * 2**30
    assert low_rank.peak_bytes_per_chip < full.peak_bytes_per_chip
    assert low_rank.fits and low_rank.compiler_flops is None
    small = plan.make(request(config, topology="v5e:1x1", quantize="nf4", block=16)).steps[0]
    assert small.argument_bytes < low_rank.argument_bytes
    assert small.trainable == low_rank.trainable


def test_an_estimate_for_llama_8b(monkeypatch):
    """The TPU compiler says: 15.43 GiB of arguments, a peak 1.1 GiB above them, and that it reserves 1.6 GiB."""
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    found = plan.make(plan.Request(model="llama-3-8b"))
    assert found.mesh == {"fsdp": 1} and found.batch == 1
    assert found.parameters == 8_030_261_248
    assert found.steps[0].trainable == 41_943_040
    assert found.steps[0].argument_bytes / 2**30 == pytest.approx(15.43, abs=0.005)
    assert 1.0 < found.steps[0].temporary_bytes / 2**30 < 1.7


@pytest.mark.slow
def test_arguments_on_a_mesh(config):
    """What is counted without a compiler is what the compiler says; a chip holds less than half of a step on one chip."""
    asked = request(config, topology="cpu:8", mesh={"fsdp": 4, "model": 2}, batch=4, compare=("full",))
    sizes = plan.read_sizes(config)
    count = lambda asked, name: train_steps.chip_bytes(train_steps.STEPS[name](setup(asked, sizes)).args)
    for step in plan.make(asked).steps:
        assert step.argument_bytes == pytest.approx(count(asked, step.step), abs=64)  # a compiler may align
        assert step.argument_bytes < count(request(config, batch=4), step.step) / 2
        assert step.collectives["all-gather"].bytes > 0 and step.unknown_loops == 0


def test_a_pod_of_tpus(config):
    """Compiled where the TPU compiler is installed; arguments are the same without."""
    asked = request(config, topology="v6e:4x4", mesh={"data": 2, "fsdp": 4, "model": 2}, batch=None)
    found = plan.make(asked)
    assert (found.chips, found.batch, found.hbm_bytes_per_chip) == (16, 8, int(31.24 * 2**30))
    (step,) = found.steps
    assert step.source == (plan.COMPILER if topology.has_libtpu() else plan.ESTIMATE)
    assert step.fits and (step.collectives is not None) == topology.has_libtpu()


def test_gpus(config):
    """Both the estimate and what the CPU's compiler says, for as many devices."""
    found = plan.make(request(config, topology="h100:2"))
    assert found.hbm_bytes_per_chip == 80_000_000_000 and found.mesh == {"fsdp": 2}
    assert [step.source for step in found.steps] == ["analytic estimate", "compiler, for CPUs"]
    estimate, compiled = found.steps
    assert estimate.fits and compiled.fits is None
    assert compiled.peak_bytes_per_chip >= compiled.argument_bytes + compiled.temporary_bytes
    assert "for CPUs" in plan_table.table(found)


def test_estimates_on_a_mesh():
    """Along data each chip holds all of the base, along the others a part."""
    config = presets.named("llama-3-8b")
    make = lambda **axes: setup(plan.Request(model="llama-3-8b", topology="h100:4", mesh=axes), config)
    count = lambda setup: train_steps.chip_bytes(setup.model.variables) / 2**30
    assert count(make(data=4)) == pytest.approx(14.96, abs=0.01)
    assert count(make(fsdp=4)) == pytest.approx(14.96 / 4, abs=0.01)
    assert count(make(fsdp=2, model=2)) == pytest.approx(14.96 / 4, abs=0.01)


def test_a_picture(config, tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    file = tmp_path / "plan.png"
    assert cli.main(["plan", config, "--sequence", "16", "--topology", "v5e:1x1", "--plot", str(file)]) == 0
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_json_and_text(config, capsys, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    arguments = ["plan", config, "--rank", "4", "--sequence", "16", "--topology", "v6e:2x2", "--mesh", "fsdp=2,model=2"]
    assert cli.main([*arguments, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["peak_bytes_per_chip"] == fields["steps"][0]["peak_bytes_per_chip"] > 0
    assert fields["request"]["rank"] == 4 and fields["chip"] == "TPU v6 lite"
    assert fields["steps"][0]["step"] == "lora" and fields["steps"][0]["collectives"] is None
    assert fields["mesh"] == {"fsdp": 2, "model": 2} and fields["batch"] == 2 and fields["chips"] == 4
    assert cli.main(arguments) == 0
    assert "v6e:2x2: 4 x TPU v6 lite with 31.24 GiB each; mesh fsdp=2, model=2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "model: nothing is neither a config.json, nor owner/name of the hub, nor one of llama-3-8b"),
        (["llama-3-8b", "--batch", "0"], "batch must be at least 1, not 0"),
        (["llama-3-8b", "--sequence", "0"], "sequence must be at least 1, not 0"),
        (["llama-3-8b", "--quantize", "int3"], "quantize must be one of none, nf4, int4, int8, fp8, not 'int3'"),
        (["llama-3-8b", "--block", "32"], "block is for a quantised base: leave it out"),
        (["llama-3-8b", "--quantize", "nf4", "--block", "0"], "block must be None or a whole number of at least 1, not 0"),
        (["llama-3-8b", "--topology", "v9:2x2"], "topology must be a TPU and its shape, such as v5e:2x2"),
        (["llama-3-8b", "--topology", "v5e:0x2"], "topology must be a TPU and its shape, such as v5e:2x2"),
        (["llama-3-8b", "--topology", "h100:0"], "or one of h200, h100, a100-80, a100-40, l4, rtx4090, cpu"),
        (["llama-3-8b", "--topology", "v5e:2x2", "--mesh", "data=3"], "mesh: data=3 has 3 places, but v5e:2x2 has 4 chips"),
        (["llama-3-8b", "--mesh", "tensor=1"], "at most once and with a size, as in data=2,model=4; 'tensor=1' in 'tensor=1'"),
        (
            ["llama-3-8b", "--mesh", "data"],
            "--mesh must have each of data, fsdp, model at most once and with a size, as in data=2,model=4; 'data' in 'data'",
        ),
        (["llama-3-8b", "--mesh", "data=1,data=1"], "at most once"),
        (["llama-3-8b", "--topology", "v5e:2x2", "--batch", "6"], "batch: the 6 rows are cut along data and fsdp into 4 parts"),
        (["smollm2-135m", "--topology", "cpu:5", "--mesh", "model=5"], "embed_tokens/embedding of the shape (49152, 576)"),
        (["smollm2-135m", "--topology", "cpu:9"], "topology: 9 CPU devices are needed and JAX has 8"),
        (["smollm2-135m", "--plot", "plan.pdf"], "plot: plan.pdf must be the name of a .png file"),
        (["smollm2-135m", "--plot", "nowhere/plan.png"], "plot: nowhere/plan.png can't be written: is nowhere a directory"),
        (["llama-3-8b", "--topology", "v5e:1000x1000"], "topology: v5e:1000x1000 is not within v5e:16x16"),
        (["llama-3-8b", "--topology", "v5e:2x2x2"], "topology: v5e:2x2x2 is not within v5e:16x16"),
        (["llama-3-8b", "--compare", "half"], "compare takes full, naive, not 'half'"),
        (["llama-3-8b", "--rank", "0"], "rank must be a whole number of at least 1"),
        (["smollm2-135m", "--topology", "cpu", "--targets", "nothing"], "nothing"),
    ],
)
def test_bad_requests(arguments, message, capsys):
    jax.devices()  # from now on there are eight
    assert cli.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object"), ("{}", "model_type is None")]
)
def test_bad_configurations(tmp_path, text, message, capsys):
    (tmp_path / "config.json").write_text(text)
    assert cli.main(["plan", str(tmp_path), "--topology", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit():
    class Traced:
        def lower(self):
            reason = (
                "RESOURCE_EXHAUSTED: the total memory required for temporaries (20.50G) exceeds available HBM (15.75G).\nMore"
            )
            raise jax.errors.JaxRuntimeError(reason)

    found = topology.compile_for(topology.read("v5e:1x1"), Traced())
    assert found.peak_bytes == 20.5 * 2**30 and found.error.endswith("(15.75G).")


# --- the model's parts ------------------------------------------------------------------------------------------------


def data(model, length=19):
    ids = jax.random.randint(jax.random.key(1), (2, length + 1), 0, model.config.vocab_size)
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_without_logits(tied):
    model = llama.init(tiny_lm.sizes(tie_word_embeddings=tied), jax.random.key(0), scan_layers=True)
    ids, labels = data(model)

    def whole(variables):
        logits = model.apply(variables, ids)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]

    np.testing.assert_allclose(model.losses(model.variables, ids, labels), whole(model.variables), atol=1e-5)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_losses_on_a_mesh(tied):
    """With rows kept apart and the head gathered: the losses and gradients of one device."""
    options = {"scan_layers": True, "remat": "full"}
    model = llama.init(tiny_lm.sizes(vocab_size=304, tie_word_embeddings=tied), jax.random.key(0), **options)
    mesh = sharding.make_mesh({"fsdp": 2, "data": 2, "model": 2})
    ids, labels = (jnp.concatenate([part, part + 1]) for part in data(model))
    run = lambda model: jax.jit(jax.value_and_grad(lambda v, ids, labels: model.losses(v, ids, labels).mean()))
    placed = jax.device_put(model.variables, llama.shardings(mesh, model.variables))
    rows = jax.device_put((ids, labels), sharding.batch_sharding(mesh))
    got, wanted = run(model.on_mesh(mesh))(placed, *rows), run(model)(model.variables, ids, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)


@pytest.mark.parametrize(
    ("options", "window"), [pytest.param({}, None, marks=pytest.mark.slow), ({"scan_layers": True, "remat": "full"}, 3)]
)
def test_attention_in_blocks(options, window):
    """The last block is shorter than the others; gradients too; packed rows and padding."""
    sizes = tiny_lm.sizes(sliding_window=window, sliding_layers=() if window is None else (1,))
    plain = llama.init(sizes, jax.random.key(0), **options)
    blocks = llama.init(sizes, jax.random.key(0), attention_block=8, **options)
    ids, labels = data(plain)
    segments = jnp.arange(19)[None] // jnp.array([[7], [11]])

    def loss(model):
        return jax.jit(jax.value_and_grad(lambda v: model.losses(v, ids, labels, segment_ids=segments).mean()))(plain.variables)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), loss(blocks), loss(plain))
    np.testing.assert_allclose(blocks.apply(plain.variables, ids), plain.apply(plain.variables, ids), atol=1e-4)


def test_a_block_reads_no_keys_after_it():
    """Of the products of scores and values, blocks of a quarter do 10 of 16 parts."""
    count = lambda block: dot_flops(
        jax.make_jaxpr(lambda v, ids: llama.abstract(tiny_lm.sizes(), attention_block=block).apply(v, ids))(
            llama.abstract(tiny_lm.sizes()).variables, jax.ShapeDtypeStruct((1, 32), jnp.int32)
        )
    )
    scores = 2 * 4 * 32 * 32 * 32  # two layers; two products of 2 x 32 x 32 x 32 each
    assert count(None) - count(8) == scores * 6 // 16

"""`lora-jax plan`: what a train step needs, by the compiler of this machine, or estimated."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import cli, plan, steps, topology
from lora_jax.flops import dot_flops
from lora_jax.models import llama, shapes
from tests import tiny_lm

pytestmark = pytest.mark.usefixtures("lenient")  # JAX's own attention promotes bfloat16
TINY = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY))
    return str(file)


def request(config, **changes):
    return plan.Request(**{"model": config, "rank": 4, "batch": 2, "sequence": 24, "topology": "cpu", **changes})


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3-8b", 8.030), ("llama-3-70b", 70.554), ("qwen2.5-7b", 7.616), ("mistral-7b", 7.242), ("smollm2-135m", 0.1345)],
)
def test_named_shapes(name, billions):
    """As the models' cards and checkpoints count them."""
    table = llama.parameters(shapes.named(name), scan_layers=True)
    assert sum(np.prod(shape) for shape, _ in table.values()) / 1e9 == pytest.approx(billions, abs=6e-4)


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
    found = plan.make(request(config, topology="v5e:2x2", compare=("full", "naive")))
    assert {step.source for step in found.steps} == {"analytic estimate"}
    assert "ANALYTIC ESTIMATE: libtpu is not installed" in str(found)
    low_rank, full, naive = found.steps
    assert low_rank.peak_bytes_per_chip < naive.peak_bytes_per_chip < 15.75 * 2**30
    assert low_rank.peak_bytes_per_chip < full.peak_bytes_per_chip
    assert low_rank.fits and low_rank.compiler_flops is None
    small = plan.make(request(config, topology="v5e:2x2", quantize="nf4", block=16)).steps[0]
    assert small.argument_bytes < low_rank.argument_bytes
    assert small.trainable == low_rank.trainable


def test_an_estimate_for_llama_8b(monkeypatch):
    """The TPU compiler says: 15.43 GiB of arguments, and 1.1 GiB beside them, or 1.6 with the results that replace arguments."""
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    found = plan.make(plan.Request(model="llama-3-8b"))
    assert found.parameters == 8_030_261_248
    assert found.steps[0].trainable == 41_943_040
    assert found.steps[0].argument_bytes / 2**30 == pytest.approx(15.43, abs=0.005)
    assert 1.0 < found.steps[0].temporary_bytes / 2**30 < 1.7


def test_json_and_text(config, capsys, monkeypatch):
    monkeypatch.setattr(topology, "has_libtpu", lambda: False)
    arguments = ["plan", config, "--rank", "4", "--sequence", "16", "--topology", "v6e:2x2"]
    assert cli.main([*arguments, "--json"]) == 0
    fields = json.loads(capsys.readouterr().out)
    assert fields["peak_bytes_per_chip"] == fields["steps"][0]["peak_bytes_per_chip"] > 0
    assert fields["request"]["rank"] == 4 and fields["chip"] == "TPU v6 lite"
    assert fields["steps"][0]["step"] == "lora"
    assert cli.main(arguments) == 0
    assert "one chip of v6e:2x2: TPU v6 lite with 31.24 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "model: nothing is neither a config.json nor one of llama-3-8b"),
        (["llama-3-8b", "--batch", "0"], "batch must be at least 1, not 0"),
        (["llama-3-8b", "--sequence", "0"], "sequence must be at least 1, not 0"),
        (["llama-3-8b", "--quantize", "int3"], "quantize must be one of none, nf4, int4, int8, fp8, not 'int3'"),
        (["llama-3-8b", "--block", "32"], "block is for a quantised base only"),
        (["llama-3-8b", "--topology", "v9:2x2"], "topology must be cpu, or a TPU and its shape such as v5e:2x2"),
        (["llama-3-8b", "--compare", "half"], "compare takes full, naive, not 'half'"),
        (["llama-3-8b", "--rank", "0"], "rank must be a whole number of at least 1"),
        (["smollm2-135m", "--topology", "cpu", "--targets", "nothing"], "nothing"),
    ],
)
def test_bad_requests(arguments, message, capsys):
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

    found = topology.compile_for(None, Traced())
    assert found.peak_bytes == 20.5 * 2**30 and found.error.endswith("(15.75G).")


# --- the model's parts ------------------------------------------------------------------------------------------------


def data(model, length=19):
    ids = jax.random.randint(jax.random.key(1), (2, length + 1), 0, model.config.vocab_size)
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("tied", [True, False])
def test_losses_without_logits(tied):
    model = llama.init(tiny_lm.sizes(tie_word_embeddings=tied), jax.random.key(0), scan_layers=True)
    ids, labels = data(model)

    def whole(variables):
        logits = model.apply(variables, ids)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]

    np.testing.assert_allclose(model.losses(model.variables, ids, labels), whole(model.variables), atol=1e-5)


@pytest.mark.parametrize(("options", "window"), [({}, None), ({"scan_layers": True, "remat": "full"}, 3)])
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


def test_the_step_is_that_of_training():
    """A step on real arrays: the planned program trains."""
    sizes = tiny_lm.sizes()
    setup = steps.prepare(sizes, lj.LoraConfig(rank=2, targets=steps.PROJECTIONS), 2, 16, "int8", 16)
    step = steps.low_rank(setup)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), step.args[1:])
    fresh = llama.init(sizes, jax.random.key(0), dtype=jnp.bfloat16, scan_layers=True).variables
    variables = lj.quantize(fresh, steps.PROJECTIONS, "int8", block=16)
    adapters = lj.init(
        jax.random.key(0),
        lj.LoraConfig(rank=2, targets=steps.PROJECTIONS),
        setup.model.apply,
        fresh,
        jnp.zeros((2, 16), jnp.int32),
    )
    state = lj.train.init_state(adapters, steps.OPTIMIZER, key=jax.random.key(0))
    state, metrics = step.jitted(state, variables, zeros[1])
    assert int(state.step) == 1 and float(metrics["loss"]) == pytest.approx(np.log(300), rel=0.1)

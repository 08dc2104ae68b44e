"""What compiled programs move between devices, where it is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import lora_jax as lj
from lora_jax import sharding
from lora_jax.planning import collectives, train_steps
from lora_jax.planning.decoder_step import DecoderStep, ModelOptions, projections
from tests.support import tiny_lm

P = jax.P
LAYERS, WIDTH, ROWS = 5, 16, 8


def traffic(fn, *args):
    return collectives.read(jax.jit(fn).lower(*args).compile().as_text())


def on(mesh, shape, *spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))


def test_gathers_and_reductions_in_a_scan():
    """Kernels cut along fsdp: each layer's is gathered in both passes, and its gradient is summed in the second."""
    mesh = sharding.make_mesh({"data": 8})
    rows = NamedSharding(mesh, P("data"))

    def loss(kernels, x):
        layer = lambda x, kernel: (jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), rows), None)
        return jnp.sum(jax.lax.scan(layer, x, kernels)[0] ** 2)

    found = traffic(jax.grad(loss), on(mesh, (LAYERS, WIDTH, WIDTH), None, "data"), on(mesh, (ROWS, WIDTH), "data"))
    assert found.unknown_loops == 0 and set(found.kinds) == {"all-gather", "all-reduce"}
    gathers, sums = found.kinds["all-gather"], found.kinds["all-reduce"]
    assert (gathers.count, gathers.bytes) == (2 * LAYERS, 2 * LAYERS * 4 * WIDTH**2)
    assert (sums.count, sums.bytes) == (LAYERS, LAYERS * 4 * WIDTH**2)
    assert (gathers.largest, gathers.largest_bytes) == (f"f32[{WIDTH},{WIDTH}]", 4 * WIDTH**2)


def test_each_kind():
    """Bytes of what a device gets; of a reduce-scatter, of what it gives."""
    mesh = sharding.make_mesh({"data": 8})

    def fn(x):
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        scattered = jax.lax.psum_scatter(gathered, "data", tiled=True)
        moved = jax.lax.ppermute(scattered, "data", [(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.all_to_all(jax.lax.psum(moved, "data") + moved, "data", 0, 1, tiled=True)

    fn = jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P(None, "data"))
    kinds = traffic(fn, on(mesh, (64, 4), "data")).kinds
    part = 8 * 4 * 4
    assert {kind: moved.bytes for kind, moved in kinds.items()} == {
        "all-gather": 8 * part, "reduce-scatter": 8 * part, "collective-permute": part, "all-reduce": part, "all-to-all": part,
    }  # fmt: skip


def test_the_dearest_branch():
    mesh = sharding.make_mesh({"data": 8})

    def fn(x, yes):
        total = lambda x: jax.lax.psum(x, "data")
        return jax.lax.cond(yes[0] > 0, lambda x: total(x * total(x)), lambda x: total(x[:1]) + 0 * x, x)

    fn = jax.shard_map(fn, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
    sums = traffic(fn, on(mesh, (16, 4), "data"), on(mesh, (1,))).kinds["all-reduce"]
    assert (sums.count, sums.bytes) == (2, 2 * 2 * 4 * 4)


LOOP = """HloModule step

%body (state: (u32[], bf16[2,8], u32[])) -> (u32[], bf16[2,8], u32[]) {{
  %state = (u32[]{{:T(128)}}, bf16[2,8]{{1,0:T(8,128)(2,1)}}, u32[]) parameter(0)
  %index = u32[]{{:T(128)}} get-tuple-element(%state), index=0
  %x = bf16[2,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%state), index=1
  %by = u32[] get-tuple-element(%state), index=2
  %copied = u32[] copy(%index)
  %next = u32[] {step}(%copied, %by)
  %begun = (bf16[2,8], bf16[2,8], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}
  %ended = bf16[2,8]{{1,0:T(8,128)(2,1)}} collective-permute-done(%begun)
  ROOT %out = (u32[], bf16[2,8], /*index=2*/u32[]) tuple(%next, %ended, %by)
}}

%until (state.1: (u32[], bf16[2,8], u32[])) -> pred[] {{
  %limit = u32[]{{:T(128)}} constant(7)
  %state.1 = (u32[], bf16[2,8], u32[]) parameter(0)
  %index.1 = u32[]{{:T(128)}} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{{:T(512)}} compare(%index.1, %limit), direction=LT
}}

ENTRY %main (x.1: bf16[2,8]) -> bf16[2,8] {{
  %x.1 = bf16[2,8]{{1,0}} parameter(0)
  %zero = u32[] constant(0)
  %two = u32[] constant(2)
  %first = (u32[], bf16[2,8], u32[]) tuple(%zero, %x.1, /*index=2*/%two)
  %loop = (u32[], bf16[2,8], u32[]) while(%first), condition=%until, body=%body, metadata={{op_name="jit(f)/while"}}
  ROOT %result = bf16[2,8] get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(("step", "count", "unknown"), [("add", 4, 0), ("multiply", 1, 1)])
def test_loops_as_a_tpu_compiler_writes_them(step, count, unknown):
    """From 0 up to 7 in steps of 2, which the loop carries along; where that is not to be read, one iteration, and it is said."""
    found = collectives.read(LOOP.format(step=step))
    moved = found.kinds["collective-permute"]
    assert (moved.count, moved.bytes, found.unknown_loops) == (count, count * 32, unknown)


SCATTERED = """HloModule step
%sum (x: f32[], y: f32[]) -> f32[] {
  ROOT %xy = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (given: f32[8,4]) -> f32[2,4] {
  %given = f32[8,4]{1,0} parameter(0)
  %all = f32[8,4]{1,0} all-reduce(%given), to_apply=%sum
  ROOT %own = f32[2,4]{1,0} dynamic-slice(%all, %given, %given), dynamic_slice_sizes={2,4}
}

ENTRY %main (g: f32[8,4]) -> f32[2,4] {
  %g = f32[8,4]{1,0} parameter(0)
  ROOT %fused = f32[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_reduce_scatters_as_a_tpu_compiler_writes_them():
    assert collectives.read(SCATTERED).kinds == {"reduce-scatter": collectives.Collective(1, 128, "f32[8,4]", 128)}


CHAINED = """HloModule step
%start (x: f32[2,4]) -> (f32[8,4], u32[]) {
  %x = f32[2,4]{1,0} parameter(0)
  %begun = f32[8,4]{1,0} all-gather(%x), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %started = (f32[8,4], u32[]) custom-call(%begun), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (y: f32[2,4], so_far: f32[8,4], z: f32[9]) -> (f32[9], f32[8,4]) {
  %y = f32[2,4]{1,0} parameter(0)
  %so_far = f32[8,4]{1,0} parameter(1)
  %z = f32[9]{0} parameter(2)
  %other = f32[9]{0} all-reduce(%z), channel_id=8, to_apply=%sum
  %further = f32[8,4]{1,0} all-gather(%y), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %both = (f32[9], f32[8,4]) tuple(%other, %further)
}

%end (v: f32[2,4], w: f32[8,4]) -> f32[8,4] {
  %v = f32[2,4]{1,0} parameter(0)
  %w = f32[8,4]{1,0} parameter(1)
  %last = f32[8,4]{1,0} all-gather(%v), channel_id=7, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %ended = f32[8,4]{1,0} custom-call(%v, %w, %last), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (g: f32[2,4], n: f32[9]) -> f32[8,4] {
  %g = f32[2,4]{1,0} parameter(0)
  %n = f32[9]{0} parameter(1)
  %one = (f32[8,4], u32[]) fusion(%g), kind=kCustom, calls=%start
  %whole = f32[8,4] get-tuple-element(%one), index=0
  %two = (f32[9], f32[8,4]) fusion(%g, %whole, %n), kind=kOutput, calls=%async_collective_fusion.1
  %more = f32[8,4] get-tuple-element(%two), index=1
  ROOT %three = f32[8,4]{1,0} fusion(%g, %more), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_a_tpu_compiler_spreads_over_fusions():
    """It begins in one, goes on beside what others compute, and ends in one: it is one."""
    assert collectives.read(CHAINED).kinds == {
        "all-gather": collectives.Collective(1, 128, "f32[8,4]", 128),
        "all-reduce": collectives.Collective(1, 36, "f32[9]", 36),
    }


# --- the step that trains adapters ------------------------------------------------------------------------------------


def step_traffic(axes, **changes):
    """Of one step of a Llama whose vocabulary and width the mesh divides."""
    config = tiny_lm.sizes(vocab_size=304, **changes)
    model = ModelOptions(dtype="bfloat16", scan_layers=True, remat="full")
    adapters = lj.LoraConfig(rank=3, targets=projections(config))
    step = DecoderStep(model=model, lora=adapters, rows=8, length=20, mesh=sharding.make_mesh(axes))
    setup = train_steps.prepare(step, config)
    step = train_steps.low_rank(setup)
    return collectives.read(step.jitted.trace(*step.args).lower().compile().as_text()), setup


def test_data_parallel_steps_move_adapter_bytes_only(lenient):
    found, setup = step_traffic({"data": 8})
    assert found.unknown_loops == 0
    assert set(found.kinds) == {"all-reduce"}
    # The gradients, in float32, and a few numbers: the loss and its norm.
    adapters = 4 * setup.summary.trainable
    assert adapters <= found.kinds["all-reduce"].bytes <= adapters + 256


def test_fsdp_steps_gather_kernels_and_not_activations(lenient):
    """In both passes each layer's kernels, in bfloat16 or as float32 where a CPU multiplies so, and nothing of all layers."""
    found, setup = step_traffic({"fsdp": 8})
    config = setup.model.config
    layer = max(np.prod(row.shape[1:]) for row in setup.summary.rows)
    head = config.vocab_size * config.hidden_size
    assert found.kinds["all-gather"].largest_bytes <= 4 * max(layer, head)
    kernels = sum(row.parameters for row in setup.summary.rows)
    assert found.kinds["all-gather"].bytes <= 4 * (3 * kernels + 3 * head + 6 * setup.summary.trainable)
    assert found.kinds["all-reduce"].bytes <= 4 * setup.summary.trainable + 4 * head

"""What a step sends between devices: quantised kernels as codes and scales, and each activation's cotangents once."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, reshard

import lora_jax as lj
from lora_jax import sharding
from lora_jax.core import jax_compat
from lora_jax.models import llama
from lora_jax.planning.decoder_step import projections
from tests.support import tiny_lm
from tests.support.frontends import normal
from tests.support.identity import distance
from tests.support.marks import slow_unless

P = jax.P
BLOCK = 4
KINDS = slow_unless("nf4".__eq__, ["nf4", "int8"])


def gathered(program):
    """The dtype and shape of each array that a compiled program gathers."""
    lines = re.findall(r"= (.*?) all-gather(?:-start)?\(", program.as_text())
    arrays = [array for line in lines for array in re.findall(r"(\w+)\[([\d,]*)\]", line)]
    return {(dtype, tuple(int(n) for n in shape.split(",") if n not in ("", "1"))) for dtype, shape in arrays}


def assert_moved_as_codes(program, shapes):
    """Of kernels of these shapes that are whole after it, and of no other dtype than that of codes."""
    found = gathered(program)
    for shape in shapes:
        dtypes = {dtype for dtype, other in found if other == shape}
        assert dtypes and dtypes <= {"u8", "u4", "s8"}, f"{shape} is gathered as {dtypes}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"scan_layers": True, "remat": "full"}, pytest.param({}, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("lenient")
def test_a_quantised_decoder(kind, options):
    """In both passes; with the losses and gradients of one device."""
    sizes = tiny_lm.sizes(vocab_size=304, hidden_size=64, intermediate_size=96, head_dim=16)
    model = llama.init(sizes, jax.random.key(0), **options)
    mesh = sharding.make_mesh({"fsdp": 4, "model": 2})
    variables = lj.quantize(model.variables, [f"{name}/kernel" for name in projections(sizes)], kind, block=BLOCK)
    model = llama.Loaded(model.model, variables, model.names, model.config)
    ids = jax.random.randint(jax.random.key(1), (8, 11), 0, 304)
    adapters = lj.init(jax.random.key(2), lj.LoraConfig(rank=2, targets="all-linear"), model.apply, variables, ids)
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, adapters)
    placed = jax.device_put(variables, llama.shardings(mesh, variables))
    on_mesh = jax.device_put(adapters, sharding.adapter_shardings(placed, adapters))

    def run(model, variables, adapters):
        loss = lambda adapters, variables, ids: lj.lora(model.losses)(lj.attach(variables, adapters), ids, ids).mean()
        step = jax.jit(jax.value_and_grad(loss))
        return step.lower(adapters, variables, ids), step(adapters, variables, ids)

    ids = jax.device_put(ids, sharding.batch_sharding(mesh))
    lowered, got = run(model.on_mesh(mesh), placed, on_mesh)
    # Of each kernel the part along `model`: q, o, k and v, gate and up, down.
    assert_moved_as_codes(lowered.compile(), [(64, 32), (32, 64), (64, 16), (64, 48), (48, 64)])
    wanted = run(model, variables, adapters)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, wanted)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_kernel_that_a_function_moves(kind, explicit):
    """By a sharding constraint, or a reshard on a mesh with explicit axes; with the merged weights' value and gradient."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    at = lambda *spec: NamedSharding(mesh, P(*spec))
    move = reshard if explicit else jax.lax.with_sharding_constraint

    def fn(params, x):
        return jnp.tanh(x @ move(params["w"], at(None, None)))

    pair = lj.LowRank(normal(0, 32, 2), normal(1, 2, 48), lj.Layout((), (0,), (1,)), 0.5)
    variables, x = lj.quantize({"w": normal(2, 32, 48)}, ["w"], kind, block=BLOCK), normal(3, 8, 32)
    placed, rows = jax.device_put(variables, sharding.parameter_shardings(mesh, variables, {"w": P("d")})), at("d", None)
    loss = lambda pair, variables, x: jnp.sum(lj.lora(fn)(lj.attach(variables, {"w": pair}), x) ** 2)
    merged = lambda pair, variables, x: jnp.sum(jnp.tanh(x @ lj.merge(variables, {"w": pair}, quantized="dense")["w"]) ** 2)
    with jax.set_mesh(mesh):
        pair_on_mesh = jax.device_put(pair, at())
        step, arguments = jax.jit(jax.value_and_grad(loss)), (pair_on_mesh, placed, jax.device_put(x, rows))
        program, got = step.lower(*arguments).compile(), step(*arguments)
    assert_moved_as_codes(program, [(32, 48)])
    wanted = jax.value_and_grad(merged)(pair, variables, x)
    assert max(jax.tree.leaves(jax.tree.map(distance, got, wanted))) < 1e-5


def test_a_stack_that_a_function_moves():
    """Whole, before it is scanned: with the merged weights' values."""
    mesh = sharding.make_mesh({"data": 8})
    whole, layer = NamedSharding(mesh, P()), lambda x, w: (jnp.tanh(x @ w), None)
    fn = lambda params, x: jax.lax.scan(layer, x, jax.lax.with_sharding_constraint(params["w"], whole))[0]
    pair = lj.LowRank(normal(0, 3, 16, 2), normal(1, 3, 2, 16), lj.Layout((0,), (1,), (2,)), 0.5)
    variables, x = lj.quantize({"w": normal(2, 3, 16, 16)}, ["w"], "nf4", block=BLOCK), normal(3, 8, 16)
    placed = jax.device_put(variables, sharding.parameter_shardings(mesh, variables, fsdp="data"))
    got = jax.jit(lj.lora(fn))(lj.attach(placed, {"w": pair}), x)
    assert distance(got, fn(lj.merge(variables, {"w": pair}, quantized="dense"), x)) < 1e-5


def cotangent_sums(jaxpr, kernels):
    """How many sums of cotangents add what comes from a kernel alone to what does not.

    A mesh sums the products with kernels that it cuts; only products that meet each other first are summed together.
    """
    base, mixed = set(), 0
    for eqn in jaxpr.eqns:
        values = [v for v in eqn.invars if not isinstance(v, jax_compat.Literal)]
        if eqn.primitive.name in ("transpose", "copy", "stop_gradient"):
            kernels |= {eqn.outvars[0]} if values[0] in kernels else set()
            base |= {eqn.outvars[0]} if values[0] in base else set()
        elif eqn.primitive.name == "dot_general":
            base |= {eqn.outvars[0]} if kernels & set(values) else set()
        elif eqn.primitive.name == "add_any":
            base |= {eqn.outvars[0]} if set(values) <= base else set()
            mixed += len(base & set(values)) == 1
    return mixed


@pytest.mark.parametrize("dora", [False, True])
def test_the_cotangents_of_an_activation_meet_before_the_branches(dora):
    """Of the products with q, k and v: a compiler sums over the mesh what was added, once."""
    params = {name: normal(i, 8, 8) for i, name in enumerate("qkv")}

    def fn(params, x):
        h = jnp.tanh(x)
        return (h @ params["q"]) * jnp.sin(h @ params["k"]) * (h @ params["v"])

    config = lj.LoraConfig(rank=2, targets=["q", "k", "v"], dora=dora)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, lj.init(jax.random.key(0), config, fn, params, normal(4, 4, 8)))

    def grad(params, adapters, x):
        return jax.grad(lambda x: jnp.sum(lj.lora(fn)(lj.attach(params, adapters), x)))(x)

    jaxpr = jax.make_jaxpr(grad)(params, adapters, normal(4, 4, 8)).jaxpr
    assert cotangent_sums(jaxpr, set(jaxpr.invars[:3])) == 1
    wanted = jax.grad(lambda x: jnp.sum(fn(lj.merge(params, adapters), x)))(normal(4, 4, 8))
    np.testing.assert_allclose(jax.jit(grad)(params, adapters, normal(4, 4, 8)), wanted, atol=1e-5)


def test_rows_stay_where_codes_move():
    """What each product of a layer reads or makes has its rows as the batch has them; compilers for TPUs move them otherwise."""
    sizes = tiny_lm.sizes(vocab_size=304, hidden_size=64, intermediate_size=96, head_dim=16)
    model, mesh = llama.init(sizes, jax.random.key(0)), sharding.make_mesh({"fsdp": 8})
    variables = lj.quantize(model.variables, [f"{name}/kernel" for name in projections(sizes)], "int8", block=BLOCK)
    quantised = llama.Loaded(model.model, variables, model.names, model.config)

    def kept(model, way=lambda fn: fn):
        jaxpr = jax.make_jaxpr(way(model.on_mesh(mesh).apply))(model.variables, jnp.zeros((8, 4), jnp.int32))
        found = [eqn.params for eqn in jaxpr.eqns if eqn.primitive.name == "sharding_constraint"]
        return [params["sharding"].spec[0] for params in found if params["unconstrained_dims"]]

    assert kept(quantised, lj.lora) == 7 * sizes.num_hidden_layers * ["fsdp"]
    assert kept(model) == []

"""Adapters on meshes of 8 devices: where they are, what the compiled step moves, and that the losses stay the same."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

import lora_jax as lj
from lora_jax import sharding
from lora_jax.training import train
from tests.benchmarks import decoder
from tests.support.frontends import normal

P = jax.P
# A rank, a length and a width that no other axis and no shard of a kernel has: shapes in the program tell what they are.
SIZES = decoder.Sizes(width=32, heads=4, layers=2, hidden=96, vocabulary=80, length=20, batch=8, rank=3)
MESHES = {"data": {"data": 8}, "fsdp": {"data": 8}, "tensor": {"data": 2, "model": 4}}
CASES = [
    pytest.param("data", "unrolled", False, marks=pytest.mark.slow),
    pytest.param("data", "scan", True, marks=pytest.mark.slow),
    pytest.param("fsdp", "unrolled", True, marks=pytest.mark.slow),
    pytest.param("fsdp", "scan", False, marks=pytest.mark.slow),
    pytest.param("tensor", "unrolled", False, marks=pytest.mark.slow),
    ("tensor", "scan", True),
]
TX = optax.adam(1e-2)


def tensor_rules(flavour):
    stack = (None,) if flavour == "scan" else ()
    columns = {name: P(*stack, None, "model") for name in ("query", "key", "value", "up")}
    return columns | {name: P(*stack, "model") for name in ("out", "down")} | {"head": P(None, "model")}


def placed(variables, mesh_name, flavour):
    """The mesh, and the variables on it."""
    mesh = sharding.make_mesh(MESHES[mesh_name])
    rules = tensor_rules(flavour) if mesh_name == "tensor" else None
    fsdp = None if mesh_name == "data" else "data"
    return mesh, jax.device_put(variables, sharding.parameter_shardings(mesh, variables, rules, fsdp=fsdp))


def collectives(program):
    """How often each (operation, shape) of an array is moved between devices."""
    found = collections.Counter()
    for line in program.as_text().splitlines():
        operation = (
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|collective-broadcast)(-start)?\("
        )
        if match := re.search(operation, line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.update((match[2], tuple(int(n) for n in shape.split(",") if n)) for shape in shapes)
    return found


def base_program(model, variables, tokens):
    """The base's forward and backward pass through all layers, down to the first norm: nothing but norms has a gradient."""
    norms = {path: leaf for path, leaf in lj.paths.flatten(variables)[0].items() if "norm" in path}

    def loss(norms, variables, tokens):
        leaves, treedef = lj.paths.flatten(variables)
        return decoder.loss(model.apply, jax.tree.unflatten(treedef, list((leaves | norms).values())), tokens)

    return jax.jit(jax.value_and_grad(loss)).lower(norms, variables, tokens).compile()


def losses(state, step, variables, tokens):
    for _ in range(10):
        state, metrics = step(state, variables, tokens)
        yield float(metrics["loss"])


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("mesh_name", "flavour", "dora"), CASES)
def test_training_on_a_mesh(mesh_name, flavour, dora):
    sizes = dataclasses.replace(SIZES, layers=2 if flavour == "scan" else 1)
    model, tokens = decoder.plain(sizes, flavour), decoder.batch(sizes)
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, :-1])
    mesh, on_mesh = placed(variables, mesh_name, flavour)
    tokens_on_mesh = jax.device_put(tokens, NamedSharding(mesh, P("data")))
    config = lj.LoraConfig(rank=SIZES.rank, targets=decoder.TARGETS, dora=dora)
    states = [
        train.init_state(lj.init(jax.random.key(1), config, model.apply, some, tokens[:, :-1]), TX, key=jax.random.key(2))
        for some in (variables, on_mesh)
    ]
    adapters = states[1].adapters
    wanted = sharding.adapter_shardings(on_mesh, adapters)
    assert jax.tree.map(lambda leaf: leaf.sharding, jax.tree.leaves(adapters)) == jax.tree.leaves(wanted)
    for one, other in zip(jax.tree.leaves(states[0].adapters), jax.tree.leaves(adapters)):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=0)

    step = train.make_train_step(lambda params, batch, key: decoder.loss(lj.lora(model.apply), params, batch), TX)
    program = step.lower(states[1], on_mesh, tokens_on_mesh).compile()
    moved = collectives(program)
    more = moved - collectives(base_program(model, on_mesh, tokens_on_mesh))
    activations = lambda shape: SIZES.length in shape
    of_adapters = lambda shape: (
        not activations(shape) and (SIZES.rank in shape or (dora and len(shape) < 3 and SIZES.hidden >= np.prod(shape)))
    )
    assert [key for key in more if not (key[1] == () or activations(key[1]) or of_adapters(key[1]))] == []
    gradients = {shape: n for (kind, shape), n in moved.items() if kind == "all-reduce" and SIZES.rank in shape}
    gradients = sum(n * np.prod(shape) for shape, n in gradients.items() if not activations(shape))
    held = sum(leaf.size for pair in adapters.values() for leaf in (pair.a, pair.b))
    if not dora:
        assert 0 < gradients <= held
        assert mesh_name != "data" or gradients == held

    alone = list(losses(states[0], step, variables, tokens))
    together = list(losses(states[1], program, on_mesh, tokens_on_mesh))  # an error if the state's shardings changed
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert alone[-1] < alone[0] - 0.1


@pytest.mark.usefixtures("lenient")
def test_a_state_stays_where_it_is():
    """Left to itself the compiler cuts the queries' B further."""
    mesh = sharding.make_mesh({"fsdp": 2, "model": 4})
    shapes = {"query": (4, 16, 4, 8), "bias": (4, 4, 8), "out": (4, 4, 8, 16)}
    params = {name: jax.random.normal(jax.random.key(len(name)), shape) / 4 for name, shape in shapes.items()}
    params = {"layers": params, "embedding": jnp.ones((48, 16)), "head": jnp.ones((16, 48))}
    rules = {"query": P(None, None, "model"), "bias": P(None, "model"), "out": P(None, "model"), "head": P(None, "model")}
    params = jax.device_put(params, sharding.parameter_shardings(mesh, params, rules, fsdp="fsdp"))
    tokens = jax.device_put(np.arange(48).reshape(8, 6), sharding.batch_sharding(mesh))

    def layer(x, kernels):
        query = jnp.tanh(jnp.einsum("btd,dnh->btnh", x, kernels["query"]) + kernels["bias"])
        return x + jnp.einsum("btnh,nhd->btd", query, kernels["out"]), None

    def model(params, tokens):
        return jax.lax.scan(layer, params["embedding"][tokens], params["layers"])[0] @ params["head"]

    adapters = lj.init(jax.random.key(1), lj.LoraConfig(rank=2, targets=["query"]), model, params, tokens)
    state = train.init_state(adapters, TX, key=jax.random.key(2))
    loss = lambda params, tokens, key: decoder.loss(lj.lora(model), params, tokens)
    step = train.make_train_step(loss, TX, like=state)
    where = [leaf.sharding for leaf in jax.tree.leaves(state)]
    for _ in range(2):
        state, _ = step(state, params, tokens)
    assert step._cache_size() == 1
    assert [leaf.sharding for leaf in jax.tree.leaves(state)] == where


# --- explicit meshes --------------------------------------------------------------------------------------------------


def explicit_model(specs, params, x):
    h = jnp.tanh(jnp.einsum("bi,ih->bh", x, params["up"], out_sharding=specs and P("data", specs["up"][1])))
    return jnp.einsum("bh,ho->bo", h, params["down"], out_sharding=specs and P("data"))


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("dora", [False, True])
def test_training_on_an_explicit_mesh(dora):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"up": jax.random.normal(keys[0], (16, 32)) / 4, "down": jax.random.normal(keys[1], (32, 8)) / 4}
    x = jax.random.normal(keys[2], (8, 16))
    config = lj.LoraConfig(rank=2, targets=["up", "down"], dora=dora)

    def run(model, params, x):
        adapters = lj.init(jax.random.key(1), config, model, params, x)
        step = train.make_train_step(lambda params, x, key: jnp.mean((lj.lora(model)(params, x) - 1) ** 2), TX)
        return adapters, list(losses(train.init_state(adapters, TX, key=jax.random.key(2)), step, params, x))

    specs = {"up": P(None, "model"), "down": P("model", None)}
    _, alone = run(functools.partial(explicit_model, None), params, x)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params, specs)
        on_mesh = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        adapters, together = run(functools.partial(explicit_model, specs), placed, on_mesh)
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    assert adapters["up"].b.sharding.spec == P(None, "model")
    assert adapters["down"].a.sharding.spec in (P("model"), P("model", None))


# --- shardings --------------------------------------------------------------------------------------------------------


MESH = {"x": 2, "y": 2, "z": 2}


def specs(adapter):
    return {name: getattr(adapter, name).spec for name in adapter.children()}


def test_every_array_follows_the_axes_it_shares():
    mesh = sharding.make_mesh(MESH)
    layout = lj.Layout(batch=(1,), inputs=(0,), outputs=(2, 3))
    ones = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    vectors = {"magnitude": ones(2, 6, 8), "bias": ones(2, 6, 8), "lambda_d": ones(2, 3), "lambda_b": ones(2, 6, 8)}
    pair = lj.LowRank(ones(2, 4, 3), ones(2, 3, 6, 8), layout, scale=ones(2), **vectors)
    adapters = {"w": pair, "head": lj.Full(ones(4, 6)), "table": lj.Rows(ones(3, 8), (1, 5, 7), lj.Layout((), (0,), (1,)))}
    on = lambda *entries: NamedSharding(mesh, P(*entries))
    variables = {"w": on("x", "z", None, "y"), "head": on(("x", "z"), "y"), "table": on("x", ("y", "z")), "other": None}
    got = sharding.adapter_shardings(variables, adapters)
    out = P("z", None, "y")
    assert specs(got["w"]) == {
        "a": P("z", "x"), "b": P("z", None, None, "y"), "magnitude": out, "bias": out, "lambda_d": P("z"), "lambda_b": out,
        "scale": P("z"),
    }  # fmt: skip
    assert specs(got["head"]) == {"value": P(("x", "z"), "y")}
    assert specs(got["table"]) == {"values": P(None, ("y", "z"))}


def test_init_gathers_nothing():
    """DoRA's norms and trained rows read the base where it is."""
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    params = {"table": jnp.ones((80, 32)), "w": jnp.ones((32, 24)), "head": jnp.ones((24, 16))}
    rules = {"table": P("model", "data"), "w": P("data", "model"), "head": P("model", "data")}
    params = jax.device_put(params, sharding.parameter_shardings(mesh, params, rules))
    model = lambda params, ids: params["table"][ids] @ params["w"] @ params["head"]
    config = lj.LoraConfig(rank=3, targets=["w"], train=["head"], dora=True, trainable_token_indices={"table": [1, 70]})
    init = functools.partial(lj.init, jax.random.key(0), config, model)
    adapters, ids = init(params, jnp.zeros((2, 5), jnp.int32)), jnp.zeros((2, 5), jnp.int32)
    assert specs(sharding.adapter_shardings(params, adapters)["table"]) == {"values": P(None, "data")}
    where = sharding.adapter_shardings(params, adapters)
    program = jax.jit(lambda params: init(params, ids), out_shardings=where).lower(params).compile()
    sizes = {
        kind: max(np.prod(shape) for k, shape in moved if k == kind) for moved in [collectives(program)] for kind, _ in moved
    }
    assert set(sizes) <= {"all-reduce", "collective-permute"}
    assert max(sizes.values()) <= 3 * 32  # partial norms, rows from those who hold them, and what was drawn elsewhere


@pytest.mark.usefixtures("lenient")
def test_shapes_get_shardings_too():
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    spec = NamedSharding(mesh, P("data", "model"))
    params = {"w": jax.ShapeDtypeStruct((32, 24), jnp.float32, sharding=spec)}
    model = lambda params, x: x @ params["w"]
    config = lj.LoraConfig(rank=3, targets=["w"], dora=True)
    adapters = lj.init(jax.random.key(0), config, model, params, jnp.ones((4, 32)))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(adapters))
    concrete = {"w": jax.device_put(jnp.ones((32, 24)), spec)}
    made = lj.init(jax.random.key(0), config, model, concrete, jnp.ones((4, 32)))
    states = [train.init_state(some, optax.adafactor(1e-2), key=jax.random.key(1)) for some in (adapters, made)]
    like = lambda tree: [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]
    assert like(states[0]) == like(states[1])
    adam = train.init_state(adapters, TX, key=jax.random.key(1))
    moments = [leaf.sharding.spec for leaf in jax.tree.leaves(adam.opt_state) if leaf.shape]
    assert moments == [P("data"), P(None, "model"), P("model")] * 2


def test_quantised_kernels_keep_their_sharding():
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    place = lambda tree: jax.device_put(tree, sharding.parameter_shardings(mesh, tree, {"w": P("model", "data")}))
    dense = {"w": normal(0, 64, 32)}
    before = lj.quantize(dense, ["w"], "int8", block=32)
    after = place(before)
    assert after["w"].qvalue.sharding.spec == P("model", "data")
    assert after["w"].scale.sharding.spec == P(None, "data")  # two blocks can't be cut into four
    adapters = lj.init(
        jax.random.key(0), lj.LoraConfig(rank=2, targets=["w"]), lambda p, x: x @ p["w"], after, jnp.ones((4, 64))
    )
    assert (adapters["w"].a.sharding.spec, adapters["w"].b.sharding.spec) == (P("model"), P(None, "data"))
    model = lj.lora(lambda p, x: x @ p["w"])
    results = [jax.jit(model)(lj.attach(tree, adapters), jnp.ones((4, 64))) for tree in (after, place(dense))]
    np.testing.assert_allclose(results[0], model(before, jnp.ones((4, 64))), rtol=1e-5, atol=1e-5)


def test_rules():
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    shapes = {"layers": {"up": (3, 16, 24), "bias": (3, 5)}, "head": (16, 6), "tiny": (4,), "scalar": ()}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))
    rules = {"up": P(None, None, "model"), "re:.*/bias": P()}
    spec = lambda **options: jax.tree.map(lambda s: s.spec, sharding.parameter_shardings(mesh, params, rules, **options))
    whole = {"head": P(), "tiny": P(), "scalar": P()}
    assert spec() == {"layers": {"up": P(None, None, "model"), "bias": P()}, **whole}
    cut = {"head": P("data"), "tiny": P("data"), "scalar": P()}
    assert spec(fsdp="data") == {"layers": {"up": P(None, "data", "model"), "bias": P()}, **cut}
    assert spec(fsdp="model")["head"] == P("model")
    assert spec(fsdp="model")["layers"]["up"] == P(None, None, "model")


@pytest.mark.parametrize(
    ("rules", "fsdp", "message"),
    [
        ({"v": P("data")}, None, "rules: the pattern 'v' matches no parameter"),
        ({"w": P("rows")}, None, "w of the shape (6, 8) can't have the sharding P('rows',): the mesh has no axis rows"),
        ({"w": P("data", "data")}, None, "the mesh axis 'data' is in it twice"),
        ({"w": P("model")}, None, "the axis 0 can't be cut into 4 equal parts"),
        ({"w": P(None, None, "data")}, None, "there are 3 entries for 2 axes"),
        ({}, "rows", "fsdp: the mesh has no axis 'rows'"),
    ],
)
def test_rules_that_are_refused(rules, fsdp, message):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.parameter_shardings(mesh, {"w": jnp.ones((6, 8))}, rules, fsdp=fsdp)


def test_what_has_no_sharding_is_refused():
    pair = lj.LowRank(jnp.ones((6, 2)), jnp.ones((2, 8)), lj.Layout((), (0,), (1,)))
    with pytest.raises(ValueError, match="w: the parameter has no NamedSharding"):
        sharding.adapter_shardings({"w": jnp.ones((6, 8))}, {"w": pair})
    with pytest.raises(ValueError, match="the adapter 'v' has no parameter in this tree"):
        sharding.adapter_shardings({"w": jnp.ones((6, 8))}, {"v": pair})
    uneven = NamedSharding(sharding.make_mesh({"x": 8}), P("x"))
    with pytest.raises(ValueError, match=r"w of the shape \(6, 2\) .*the axis 0 can't be cut into 8 equal parts"):
        sharding.adapter_shardings({"w": uneven}, {"w": pair})
    with pytest.raises(ValueError, match="needs 6 devices, and there are 8"):
        sharding.make_mesh({"x": 6})


def test_a_state_beside_adapters_without_a_mesh():
    pair = lambda: lj.LowRank(jnp.ones((4, 1)), jnp.ones((1, 8)), lj.Layout((), (0,), (1,)))
    mesh = sharding.make_mesh({"model": 8})
    wanted = NamedSharding(mesh, P(None, "model"))
    adapters = {"first": pair(), "w": dataclasses.replace(pair(), b=jax.device_put(jnp.ones((1, 8)), wanted))}
    made = train.init_state(adapters, TX, key=jax.random.key(0))
    assert made.adapters["w"].b.sharding == wanted and made.adapters["first"].b.sharding == NamedSharding(mesh, P())

"""Several devices: shard_map in its usual forms, meshes of both axis types, jit with shardings, pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import lora_jax as lj
from tests.support.frontends import normal, params
from tests.support.identity import distance, equal_to_merged, random_adapters

P = jax.P
X = normal(9, 8, 16)
PAIR = {"w": (16, 16), "u": (16, 8)}
STACKS = {"w": (3, 16, 16), "u": (3, 16, 16)}


def mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


DATA, BOTH = ((8,), ("d",)), ((2, 4), ("d", "t"))


def mlp(w, u, x):
    return jnp.tanh(x @ w) @ u


def gathered(axis, w, u, x):
    w, u = (lax.all_gather(v, "d", axis=axis, tiled=True) for v in (w, u))
    return jax.checkpoint(mlp)(w, u, x)


def parallel_layers(w, u, x):
    layer = jax.checkpoint(lambda x, wu: (x + lax.psum(mlp(*wu, x), "t"), None))
    return lax.scan(layer, x, (w, u))[0]


def averaged(w, u, x):
    return lax.pmean(mlp(w, u, x).sum(0), "d")


def branching(w, u, x):
    return lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ w), lambda: x @ w) @ u


FORMS = {
    "data_parallel": (mlp, DATA, PAIR, (P(), P(), P("d")), P("d"), {}),
    "averaged": (averaged, DATA, PAIR, (P(), P(), P("d")), P(), {}),
    "branching": (branching, DATA, PAIR, (P(), P(), P("d")), P("d"), {}),
    "gathered_rows": (functools.partial(gathered, 0), DATA, PAIR, (P("d"), P("d"), P("d")), P("d"), {}),
    "gathered_columns": (functools.partial(gathered, 1), DATA, PAIR, (P(None, "d"), P(None, "d"), P("d")), P("d"), {}),
    "tensor_parallel_layers": (parallel_layers, BOTH, STACKS, (P(None, None, "t"), P(None, "t"), P("d")), P("d"), {}),
    "one_manual_axis": (mlp, BOTH, PAIR, (P(), P(), P("d")), P("d"), {"axis_names": {"d"}}),
}


# Without its check JAX makes the same jaxprs but for what sums gradients over shards: one form of each stands for the rest.
UNCHECKED = ("averaged", "gathered_rows", "tensor_parallel_layers")
CASES = [(name, True) for name in FORMS] + [
    pytest.param(name, False, marks=[] if name in UNCHECKED else pytest.mark.slow) for name in FORMS
]


@pytest.mark.parametrize(("name", "check_vma"), CASES)
def test_shard_map(name, check_vma):
    body, devices, shapes, in_specs, out_specs, options = FORMS[name]
    options = {"mesh": mesh(*devices), "in_specs": in_specs, "out_specs": out_specs, "check_vma": check_vma, **options}
    equal_to_merged(lambda p, x: jax.shard_map(body, **options)(p["w"], p["u"], x), params(jnp.float32, **shapes), (X,))


def test_a_vocabulary_in_shards():
    def body(table, ids):
        local = ids - lax.axis_index("t") * table.shape[0]
        here = (local >= 0) & (local < table.shape[0])
        return lax.psum(jnp.where(here[:, None], table[jnp.where(here, local, 0)], 0.0), "t")

    mapped = jax.shard_map(body, mesh=mesh((4,), ("t",)), in_specs=(P("t"), P()), out_specs=P())
    ids = jnp.array([0, 5, 11, 11])
    equal_to_merged(lambda p, ids: mapped(p["table"], ids), {"table": normal(1, 12, 6)}, (ids,))


def test_experts_in_shards():
    def body(w, x):
        swap = lambda x: lax.all_to_all(x, "e", 0, 0, tiled=True)
        return swap(jnp.einsum("eti,eio->eto", swap(x), w))

    mapped = jax.shard_map(body, mesh=mesh((4,), ("e",)), in_specs=(P("e"), P("e")), out_specs=P("e"))
    equal_to_merged(lambda p, x: mapped(p["w"], x), {"w": normal(1, 4, 6, 5)}, (normal(2, 16, 3, 6),))


@pytest.mark.parametrize("check_vma,masks", [(True, 8), (False, 1)])
def test_dropout_masks_of_the_shards(check_vma, masks):
    """Each shard draws its own mask where JAX knows that the input varies over the shards."""
    options = {"mesh": mesh(*DATA), "in_specs": (P(), P("d")), "out_specs": P("d"), "check_vma": check_vma}
    fn = lambda p, x: jax.shard_map(lambda w, x: x @ w, **options)(p["w"], x)
    variables, same = {"w": normal(1, 64, 4)}, jnp.ones((8, 64))
    adapters = random_adapters(lj.init(jax.random.key(0), lj.LoraConfig(dropout=0.5, rank=2), fn, variables, same), jnp.float32)
    rows = jax.jit(lj.lora(fn, key=jax.random.key(1)))(lj.attach(variables, adapters), same)
    assert len(np.unique(np.asarray(rows), axis=0)) == masks


@pytest.mark.parametrize("collective,reason", [
    (lambda w: lax.ppermute(w, "t", [(i, (i + 1) % 4) for i in range(4)]), "`ppermute`"),
    (lambda w: lax.all_gather(w, "t", axis=0)[0], "an untiled all_gather adds an axis"),
])  # fmt: skip
def test_other_collectives_are_errors(collective, reason):
    options = {"mesh": mesh((4,), ("t",)), "in_specs": (P(None, "t"), P()), "out_specs": P(None, "t"), "check_vma": False}
    fn = lambda p, x: jax.shard_map(lambda w, x: x @ collective(w), **options)(p["w"], x)
    pair = lj.LowRank(normal(1, 16, 2), normal(2, 2, 16), lj.Layout((), (0,), (1,)))
    with pytest.raises(lj.NotLowRankError, match=reason):
        lj.lora(fn)(lj.attach({"w": normal(3, 16, 16)}, {"w": pair}), X)


@pytest.mark.parametrize("kernels", [(P(), P()), (P(None, "t"), P("t", None))])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_kernels(kind, kernels):
    devices = mesh(*BOTH, kind)
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(devices, spec))
    local, plain = params(jnp.float32, **PAIR), X

    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        if kind == AxisType.Explicit:
            return jnp.einsum("bi,io->bo", h, p["u"], out_sharding=P("d", None))
        return lax.with_sharding_constraint(h @ lax.with_sharding_constraint(p["u"], NamedSharding(devices, kernels[1])),
                                            NamedSharding(devices, P("d")))  # fmt: skip

    variables, x = {key: place(local[key], spec) for key, spec in zip(("w", "u"), kernels)}, place(plain, P("d"))
    with jax.set_mesh(devices):
        adapters = random_adapters(lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, variables, x), jnp.float32)
        loss = lambda a, v, x: jnp.sum(jnp.sin(lj.lora(fn)(lj.attach(v, a), x)) ** 2)
        ours = jax.jit(jax.value_and_grad(loss))(adapters, variables, x)
    oracle = lambda a: jnp.sum(jnp.sin((lambda p: mlp(p["w"], p["u"], plain))(lj.merge(local, a))) ** 2)
    host = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (ours, adapters))
    assert distance(host[0], jax.value_and_grad(oracle)(host[1])) < 1e-5


def test_jit_with_shardings_inside_and_outside():
    devices = mesh(*BOTH)
    at = lambda *spec: NamedSharding(devices, P(*spec))
    inner = jax.jit(lambda w, x: x @ w, in_shardings=(at(None, "t"), at("d")), out_shardings=at("d", "t"))
    fn = lambda p, x: jnp.tanh(inner(p["w"], x)) @ lax.with_sharding_constraint(p["u"], at("t", None))
    variables = params(jnp.float32, **PAIR)
    adapters = equal_to_merged(fn, variables, (X,))
    outer = jax.jit(lj.lora(fn), in_shardings=(at(), at("d")), out_shardings=at("d"))
    out = outer(lj.attach(variables, adapters), X)
    assert out.sharding.is_equivalent_to(at("d"), 2)
    assert distance(out, fn(lj.merge(variables, adapters), X)) < 1e-5


def test_pmap():
    variables = params(jnp.float32, **PAIR)
    fn = lambda p, x: mlp(p["w"], p["u"], x)
    adapters = random_adapters(lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, variables, X), jnp.float32)
    out = jax.pmap(lambda x: lj.lora(fn)(lj.attach(variables, adapters), x))(X[:, None])[:, 0]
    assert distance(out, fn(lj.merge(variables, adapters), X)) < 1e-5

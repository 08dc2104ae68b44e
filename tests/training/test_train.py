"""Train steps: what they compute, what they leave alone, and that both flows and all devices agree."""

import dataclasses
import functools
from typing import Any

import flax.training.train_state
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from jax.sharding import NamedSharding

import lora_jax as lj
from tests.support.frontends import normal, params
from tests.support.identity import distance
from tests.support.marks import every_other

pytestmark = pytest.mark.usefixtures("lenient")  # optax promotes dtypes
X, VARIABLES = normal(9, 16, 8), params(jnp.float32, w=(8, 6), u=(6, 4))
ADAM = optax.adam(1e-2)


def model(p, x):
    return jnp.tanh(x @ p["w"]) @ p["u"]


def loss_fn(p, batch, key=None):
    return jnp.mean((lj.lora(model, key=key)(p, batch) - 1.0) ** 2)


def start(tx=ADAM, **options):
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, **options), model, VARIABLES, X)
    return adapters, lj.train.init_state(adapters, tx, key=jax.random.key(1))


def same(first, second):
    return all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def test_a_step_is_the_optimisers_step_on_merged_weights():
    adapters, state = start()
    state, metrics = lj.train.make_train_step(loss_fn, ADAM)(state, VARIABLES, X)
    merged = lambda a: jnp.mean((model(lj.merge(VARIABLES, a), X) - 1.0) ** 2)
    loss, grads = jax.value_and_grad(merged)(adapters)
    updates, _ = ADAM.update(grads, ADAM.init(adapters), adapters)
    assert distance(state.adapters, optax.apply_updates(adapters, updates)) < 1e-5
    assert distance((metrics["loss"], metrics["grad_norm"]), (loss, optax.tree.norm(grads))) < 1e-5
    assert int(state.step) == 1 and int(metrics["skipped"]) == 0 and set(metrics) == {"loss", "grad_norm", "skipped"}


@pytest.mark.parametrize("clip", ["none", "inside", "outside"])
def test_the_whole_tree_flow_equals_the_adapter_flow(clip):
    """Flax's TrainState over the attached tree: a global-norm clip, wherever it stands, sees the adapters only."""
    norm = optax.clip_by_global_norm(0.05)
    tx = {
        "none": lj.optimizer(ADAM),
        "inside": lj.optimizer(optax.chain(norm, ADAM)),
        "outside": optax.chain(norm, lj.optimizer(ADAM)),
    }[clip]
    adapters, state = start()
    step = lj.train.make_train_step(loss_fn, ADAM, max_grad_norm=None if clip == "none" else 0.05)
    create = flax.training.train_state.TrainState.create
    whole = create(apply_fn=lj.lora(model), params=lj.attach(VARIABLES, adapters), tx=tx)
    update = jax.jit(lambda whole, x: whole.apply_gradients(grads=jax.grad(lambda p: loss_fn(p, x))(whole.params)))
    for _ in range(5):
        state, _ = step(state, VARIABLES, X)
        whole = update(whole, X)
    variables, trained = lj.detach(whole.params)
    assert distance(trained, adapters) > 0.05
    assert distance(trained, state.adapters) < 1e-5
    assert same(variables, VARIABLES)


@pytest.mark.parametrize("dtype", every_other(["int8", "nf4"]))
def test_the_whole_tree_flow_on_a_quantised_base(dtype):
    """Integers have no gradient: `allow_int` leaves them without one, and they get no update."""
    base = lj.quantize(VARIABLES, ["w", "u"], dtype, block=2)
    adapters, state = start()
    step = lj.train.make_train_step(loss_fn, ADAM)
    create = flax.training.train_state.TrainState.create
    whole = create(apply_fn=lj.lora(model), params=lj.attach(base, adapters), tx=lj.optimizer(ADAM))

    def update(whole, x):
        return whole.apply_gradients(grads=jax.grad(lambda p: loss_fn(p, x), allow_int=True)(whole.params))

    for take in (update, jax.jit(update), jax.jit(update)):
        state, _ = step(state, base, X)
        whole = take(whole, X)
    variables, trained = lj.detach(whole.params)
    assert distance(trained, state.adapters) < 1e-5 and distance(trained, adapters) > 0.01
    assert same(variables, base) and [x.dtype for x in jax.tree.leaves(variables)] == [x.dtype for x in jax.tree.leaves(base)]


@pytest.mark.parametrize("is_like", [False, True])
def test_one_trace_and_one_compilation_over_ten_steps(is_like):
    """Of the step, and of a test between the steps."""
    traces = []

    def counted(p, x):
        traces.append(None)
        return model(p, x)

    _, state = start()
    loss = lambda p, batch, key: lj.lora(counted)(p, batch).mean()
    step = lj.train.make_train_step(loss, ADAM, like=state if is_like else None)
    evaluate = lj.train.make_eval_step(lambda p, batch: lj.lora(model)(p, batch).mean())
    for _ in range(10):
        evaluate(state.adapters, VARIABLES, X)
        state, _ = step(state, VARIABLES, X)
    assert len(traces) == 1 and step._cache_size() == evaluate._cache_size() == 1


def test_only_the_state_is_donated():
    adapters, state = start()
    lj.train.make_train_step(loss_fn, ADAM)(state, VARIABLES, X)
    assert state.adapters["w"].a.is_deleted()
    assert not adapters["w"].a.is_deleted() and not VARIABLES["w"].is_deleted()


def test_accumulation_is_the_mean_over_microbatches():
    tx = optax.sgd(0.1)
    with_aux = lambda p, batch, key: (loss_fn(p, batch), {"count": jnp.int32(3), "mean": batch.mean()})
    (_, state), (_, other) = start(tx), start(tx)
    whole, parts = lj.train.make_train_step(with_aux, tx), lj.train.make_train_step(with_aux, tx, accumulate=4)
    for _ in range(3):
        state, want = whole(state, VARIABLES, X)
        other, got = parts(other, VARIABLES, X)
    assert distance(other.adapters, state.adapters) < 1e-5
    assert distance((got["loss"], got["aux"]["mean"]), (want["loss"], want["aux"]["mean"])) < 1e-5
    assert float(got["aux"]["count"]) == 3.0
    with pytest.raises(ValueError, match=r"a leaf of the batch has the shape \(15, 8\); its leading axis can't be cut into 4"):
        parts(other, VARIABLES, X[:15])


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_keeps_every_dtype(accumulate):
    _, state = start(dtype="bfloat16")
    before = [leaf.dtype for leaf in jax.tree.leaves(state)]
    step = lj.train.make_train_step(loss_fn, ADAM, accumulate=accumulate)
    for _ in range(2):
        state, _ = step(state, VARIABLES, X)
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == before
    assert step._cache_size() == 1


def infinite_gradient(p, batch, key):
    return jnp.sqrt(jnp.sum(lj.lora(model)(p, batch) * 0.0))


BAD = {
    "nan_in_the_batch": (loss_fn, X.at[3, 0].set(jnp.nan), 1),
    "nan_in_one_microbatch": (loss_fn, X.at[15, 0].set(jnp.nan), 4),
    "gradient_alone": (infinite_gradient, X, 1),
}


@pytest.mark.parametrize("name", BAD)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(name):
    loss, batch, accumulate = BAD[name]
    _, state = start()
    state, _ = lj.train.make_train_step(loss_fn, ADAM)(state, VARIABLES, X)
    before = jax.tree.map(jnp.copy, (state.adapters, state.opt_state))
    state, metrics = lj.train.make_train_step(loss, ADAM, accumulate=accumulate, max_grad_norm=1.0)(state, VARIABLES, batch)
    assert same((state.adapters, state.opt_state), before)
    assert int(metrics["skipped"]) == int(state.skipped) == 1 and int(state.step) == 2
    state, metrics = lj.train.make_train_step(loss_fn, ADAM)(state, VARIABLES, X)
    assert int(metrics["skipped"]) == 1 and bool(jnp.isfinite(metrics["loss"])) and not same(state.adapters, before[0])


def test_each_step_has_its_own_dropout():
    tx = optax.sgd(0.0)
    _, state = start(tx, dropout=0.5)
    moved = jax.tree.map(lambda leaf: leaf + 1.0, state.adapters)
    state = lj.train.init_state(moved, tx, key=jax.random.key(1))
    step, losses = lj.train.make_train_step(loss_fn, tx), []
    for _ in range(3):
        state, metrics = step(state, VARIABLES, X)
        losses.append(float(metrics["loss"]))
    assert len(set(losses)) == 3
    again = lj.train.init_state(moved, tx, key=jax.random.key(1))
    assert float(step(again, VARIABLES, X)[1]["loss"]) == losses[0]


@pytest.mark.parametrize("accumulate", every_other([2, 1]))
def test_eight_devices_give_the_losses_of_one(accumulate):
    options = {"accumulate": accumulate, "max_grad_norm": 0.1}
    step, mapped = lj.train.make_train_step(loss_fn, ADAM, **options), lj.train.make_pmap_train_step(loss_fn, ADAM, **options)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, jax.P(*spec)))
    (_, state), (_, sharded), (_, replicated) = start(), start(), start()
    sharded, replicated = place(sharded), lj.train.replicate(replicated)
    everywhere, copies = place(VARIABLES), lj.train.replicate(VARIABLES)
    for i in range(10):
        batch = normal(20 + i, 16, 8)
        state, want = step(state, VARIABLES, batch)
        sharded, by_jit = step(sharded, everywhere, place(batch, "d"))
        replicated, by_pmap = mapped(replicated, copies, batch.reshape(8, 2, 8))
        assert float(by_jit["loss"]) == pytest.approx(float(want["loss"]), rel=5e-6)
        assert by_pmap["loss"].tolist() == [pytest.approx(float(want["loss"]), rel=5e-6)] * 8
    assert distance(lj.train.unreplicate(replicated).adapters, state.adapters) < 1e-5


def test_one_bad_device_skips_the_step_on_all():
    step, (_, state) = lj.train.make_pmap_train_step(loss_fn, ADAM), start()
    state, before = lj.train.replicate(state), state.adapters
    batch = X.at[3, 0].set(jnp.nan).reshape(8, 2, 8)
    state, metrics = step(state, lj.train.replicate(VARIABLES), batch)
    assert metrics["skipped"].tolist() == [1] * 8
    assert same(lj.train.unreplicate(state).adapters, before)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "activation", "rate", "name"], meta_fields=[])
@dataclasses.dataclass
class Module:
    """A module as Equinox has them, whose leaves are not all arrays."""

    w: jax.Array
    activation: Any
    rate: Any
    name: Any

    def __call__(self, x):
        assert self.name == "mlp" and isinstance(self.rate, int | float)
        return self.activation(x @ self.w) * self.rate


def call_module(tree, x):
    return (tree["module"](x) if tree["flag"] else x) @ tree["u"]


def test_leaves_that_are_no_arrays_are_part_of_a_step():
    plain = lambda activation, rate: lambda p, x: activation(x @ p["w"]) * rate @ p["u"]
    loss = lambda fn: lambda p, batch, key: jnp.mean((lj.lora(fn)(p, batch) - 1.0) ** 2)
    tree = lambda activation, rate: {
        "module": Module(VARIABLES["w"], activation, rate, "mlp"),
        "u": VARIABLES["u"],
        "flag": True,
    }
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), call_module, tree(jnp.tanh, 2.0), X)
    assert sorted(adapters) == ["module/w", "u"]
    own = {"w": adapters["module/w"], "u": adapters["u"]}
    fresh = lambda: (
        lj.train.init_state(adapters, ADAM, key=jax.random.key(1)),
        lj.train.init_state(own, ADAM, key=jax.random.key(1)),
    )
    rates = {"learning_rate": jnp.full(1, 1e-2)}
    step, mapped = lj.train.make_train_step(loss(call_module), ADAM), lj.train.make_pmap_train_step(loss(call_module), ADAM)
    many = lj.many.make_train_step(loss(call_module), optax.adam, rates)
    evaluate = lj.train.make_eval_step(lj.lora(call_module)), lj.many.make_eval_step(lj.lora(call_module))
    for activation, rate in ((jnp.tanh, 2.0), (jnp.sin, 1.0)):
        variables, fn = tree(activation, rate), plain(activation, rate)
        state, want = fresh()
        for _ in range(2):
            state, metrics = step(state, variables, X)
            want, wanted = lj.train.make_train_step(loss(fn), ADAM)(want, VARIABLES, X)
        assert distance([state.adapters["module/w"], metrics["loss"]], [want.adapters["w"], wanted["loss"]]) < 1e-6
        out = fn(lj.merge(VARIABLES, want.adapters), X)
        stacked = lj.many.stack([state.adapters])
        assert distance([evaluate[0](state.adapters, variables, X), evaluate[1](stacked, variables, X)[0]], [out, out]) < 1e-5
    evaluate[0](state.adapters, tree(jnp.sin, 1), X)
    assert (step._cache_size(), evaluate[0]._cache_size()) == (2, 3)  # `1` and `1.0` are two programs
    state, replicated = fresh()[0], lj.train.replicate((fresh()[0], variables))
    _, want = step(state, variables, X)
    _, by_pmap = mapped(*replicated, X.reshape(8, 2, 8))
    states = lj.many.init_states([adapters], optax.adam, rates, keys=jax.random.split(jax.random.key(0), 1))
    _, by_many = many(states, variables, X)
    assert distance([by_pmap["loss"][0], by_many["loss"][0]], [want["loss"]] * 2) < 1e-6
    assert lj.train.unreplicate(replicated[1])["module"].activation is jnp.sin


def test_a_step_traces_and_lowers_on_shapes():
    variables = VARIABLES | {"activation": jnp.tanh}
    fn = lambda p, x: p["activation"](x @ p["w"]) @ p["u"]
    step = lj.train.make_train_step(lambda p, batch, key: lj.lora(fn)(p, batch).mean(), ADAM)
    shapes = jax.eval_shape(lambda: (start()[1], VARIABLES, X))
    args = shapes[0], shapes[1] | {"activation": jnp.tanh}, shapes[2]
    assert step.trace(*args).lower().as_text() == step.lower(start()[1], variables, X).as_text()


def test_a_leaf_without_a_hash_is_refused():
    with pytest.raises(lj.InputError, match="names/0: a leaf of the type set is no array and has no hash"):
        lj.train.make_train_step(loss_fn, ADAM)(start()[1], VARIABLES | {"names": [{"a", "b"}]}, X)


def test_heads_trained_whole_and_an_evaluation_step():
    variables = VARIABLES | {"head": normal(5, 4, 2), "bias": jnp.zeros(2)}
    fn = lambda p, x: model(p, x) @ p["head"] + p["bias"]
    config = lj.LoraConfig(rank=2, targets=["w"], train=["head", "bias"])
    adapters = lj.init(jax.random.key(0), config, fn, variables, X)
    state = lj.train.init_state(adapters, ADAM, key=jax.random.key(1))
    step = lj.train.make_train_step(lambda p, batch, key: jnp.mean((lj.lora(fn)(p, batch) - 1.0) ** 2), ADAM)
    losses = []
    for _ in range(20):
        state, metrics = step(state, variables, X)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    evaluate = lj.train.make_eval_step(lambda p, batch: {"out": lj.lora(fn)(p, batch)})
    out = evaluate(state.adapters, variables, X)["out"]
    assert distance(out, fn(lj.merge(variables, state.adapters), X)) < 1e-5
    assert all(distance(state.adapters[name].value, variables[name] + 1e-9) > 1e-2 for name in ("head", "bias"))


def test_an_exported_step_serialises_loads_and_lowers_for_accelerators():
    """Over the leaves, since a serialised pytree may hold standard containers only."""
    _, state = start(dropout=0.2)
    step = lj.train.make_train_step(loss_fn, ADAM)
    leaves, structure = jax.tree.flatten((state, VARIABLES, X))
    flat = jax.jit(lambda *leaves: jax.tree.leaves(step(*jax.tree.unflatten(structure, leaves))))
    for platform in ("tpu", "cuda"):
        assert export.export(flat, platforms=[platform])(*leaves).platforms == (platform,)
    loaded = export.deserialize(export.export(flat)(*leaves).serialize())
    got = loaded.call(*leaves)
    want = jax.tree.leaves(step(state, VARIABLES, X))
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    assert distance([g for g in got if not is_key(g)], [w for w in want if not is_key(w)]) < 1e-6


@pytest.mark.parametrize("options,text", [
    ({"accumulate": 0}, "accumulate must be a whole number of at least 1, not 0"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, not 0.0"),
])  # fmt: skip
@pytest.mark.parametrize("make", [lj.train.make_train_step, lj.train.make_pmap_train_step])
def test_options(make, options, text):
    with pytest.raises(ValueError, match=text):
        make(loss_fn, ADAM, **options)

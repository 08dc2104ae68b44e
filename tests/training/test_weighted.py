"""Losses that are means over learnt tokens: however a batch is cut, loss and gradient are those of one big batch."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import lora_jax as lj
from lora_jax.adapters.initializers import gradients
from tests.support import tiny
from tests.support.frontends import params
from tests.support.identity import F32, distance, random_adapters
from tests.support.marks import slow_unless

pytestmark = pytest.mark.usefixtures("lenient")  # optax promotes dtypes
ROWS, LENGTH, WORDS = 8, 24, 11
VARIABLES = params(jnp.float32, embedding=(WORDS, 8), head=(8, WORDS))
IDS = jnp.asarray(np.random.default_rng(0).integers(0, WORDS, (ROWS, LENGTH)))
TX = optax.chain(optax.trace(0.0), optax.scale(-1.0))  # whose state is the gradient
LEARNT = {"uneven": (24, 20, 3, 2, 9, 0, 1, 14), "empty": (24, 20, 0, 0, 0, 0, 5, 1), "one row": (0, 0, 0, 7, 0, 0, 0, 0)}


def model(p, ids):
    return 3 * jnp.tanh(p["embedding"][ids]) @ p["head"]


def sums(p, batch, apply=model):
    losses = optax.softmax_cross_entropy_with_integer_labels(apply(p, batch["ids"]), batch["labels"])
    return (losses * batch["learnt"]).sum(), batch["learnt"].sum()


def weighted(p, batch, key):
    loss = lj.train.Weighted(*sums(p, batch, lj.lora(model)))
    return loss, {"again": loss, "rows": jnp.float32(len(batch["ids"]))}


def batch_of(name):
    learnt = np.arange(LENGTH)[None] < np.array(LEARNT[name])[:, None]
    return {"ids": IDS, "labels": 3 * IDS % WORDS, "learnt": jnp.asarray(learnt, jnp.float32)}


def start(seed=0, **options):
    config = lj.LoraConfig(rank=2, targets=["head"], **options)
    return random_adapters(lj.init(jax.random.key(seed), config, model, VARIABLES, IDS), F32)


def gradient_of(state):
    return optax.tree.get(state.opt_state, "trace")


def whole(adapters, batch):
    """Loss and gradient of one big batch, through merged weights."""

    def mean(adapters):
        total, weight = sums(lj.merge(VARIABLES, adapters), batch)
        return total / weight

    return jax.value_and_grad(mean)(adapters)


def state_of(adapters):
    return lj.train.init_state(adapters, TX, key=jax.random.key(1))


def on_one(adapters, batch, **options):
    return lj.train.make_train_step(weighted, TX, **options)(state_of(adapters), VARIABLES, batch)


def on_pmap(adapters, batch, **options):
    step = lj.train.make_pmap_train_step(weighted, TX, **options)
    place = lambda tree: lj.train.replicate(tree, jax.devices()[:4])
    parts = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), batch)
    return lj.train.unreplicate(step(place(state_of(adapters)), place(VARIABLES), parts))


def on_a_mesh(adapters, batch, **options):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, jax.P(*spec)))
    step = lj.train.make_train_step(weighted, TX, **options)
    return step(place(state_of(adapters)), place(VARIABLES), place(batch, "data"))


def on_many(adapters, batch, **options):
    """As the second of two members, of which the first has other learnt tokens."""
    sets, rates = [start(1), adapters], {"learning_rate": jnp.ones(2)}
    make_tx = lambda learning_rate: TX
    states = lj.many.init_states(sets, make_tx, rates, keys=jax.random.split(jax.random.key(0)))
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), batch_of("uneven"), batch)
    step = lj.many.make_train_step(weighted, make_tx, rates, batch_axis=0, **options)
    states, metrics = step(states, VARIABLES, both)
    return lj.many.unstack(states)[1], jax.tree.map(lambda leaf: leaf[1], metrics)


WAYS = {"jit": on_one, "pmap": on_pmap, "mesh": on_a_mesh, "many": on_many}
FAST = [("jit", "uneven", 8), ("jit", "empty", 4), ("pmap", "empty", 2), ("mesh", "uneven", 1), ("many", "one row", 4)]
SLOW = [("jit", "one row", 1), ("pmap", "uneven", 1), ("pmap", "one row", 2), ("mesh", "empty", 2), ("many", "empty", 8)]


@pytest.mark.parametrize(("way", "name", "accumulate"), slow_unless(lambda case: case in FAST, FAST + SLOW))
def test_parts_add_up_to_one_big_batch(way, name, accumulate):
    adapters, batch = start(), batch_of(name)
    loss, grads = whole(adapters, batch)
    state, metrics = WAYS[way](adapters, batch, accumulate=accumulate)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["aux"]["again"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["aux"]["rows"]) == ROWS / accumulate / (4 if way == "pmap" else 1)
    assert float(metrics["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-6)
    assert distance(gradient_of(state), grads) < 1e-6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_with_nothing_to_learn_changes_nothing(accumulate):
    adapters, batch = start(), batch_of("empty")
    batch["learnt"] = jnp.zeros_like(batch["learnt"])
    state, metrics = on_one(adapters, batch, accumulate=accumulate)
    assert jnp.isnan(metrics["loss"]) and int(metrics["skipped"]) == 1
    assert distance(state.adapters, adapters) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_plain_scalar_stands_for_equal_weights(accumulate):
    """The mean of the microbatches' means; an integer weight is as good as a float."""
    adapters, batch = start(), {"ids": IDS, "labels": 3 * IDS % WORDS, "learnt": jnp.ones((ROWS, LENGTH))}
    mean = lambda p, batch, key: sums(p, batch, lj.lora(model))[0] / batch["ids"].size
    total = lambda p, batch, key: lj.train.Weighted(sums(p, batch, lj.lora(model))[0], batch["ids"].size)
    results = [
        lj.train.make_train_step(loss, TX, accumulate=accumulate)(state_of(adapters), VARIABLES, batch)
        for loss in (mean, total)
    ]
    assert distance(gradient_of(results[0][0]), gradient_of(results[1][0])) < 1e-6
    assert float(results[0][1]["loss"]) == pytest.approx(float(results[1][1]["loss"]), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_and_sums_of_half_precision_are_in_float32(dtype):
    """The squares of the gradients are beyond float16, and bfloat16 does not see a 1 beside 256."""
    variables, x = {"w": jnp.zeros((4, 3), dtype)}, jnp.ones((8, 4), dtype)
    fn = lambda p, x: x @ p["w"]
    adapters = lj.init(
        jax.random.key(0), lj.LoraConfig(rank=1, alpha=1, dtype=dtype, train=["w"], targets=[]), fn, variables, x
    )
    scales = jnp.array([512.0, 2, 2, 2, 2, 2, 2, 2], dtype)[:, None]
    loss = lambda p, batch, key: (lj.lora(fn)(p, batch[0]).astype(jnp.float32) * batch[1].astype(jnp.float32)).sum()
    grad = (512 + 7 * 2) / 8
    norm = grad * np.sqrt(12)
    for limit, scale in ((None, 1.0), (1.0, 1 / norm)):
        step = lj.train.make_train_step(loss, TX, accumulate=8, max_grad_norm=limit)
        state, metrics = step(state_of(adapters), variables, (x, scales))
        assert int(metrics["skipped"]) == 0 and metrics["grad_norm"].dtype == jnp.float32
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-6)
        value = state.adapters["w"].value
        assert value.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(value, jnp.full((4, 3), -grad * scale, dtype))


def test_a_weighted_of_arrays_is_refused():
    loss = lambda p, batch, key: lj.train.Weighted(lj.lora(model)(p, batch["ids"]).sum(), batch["learnt"])
    with pytest.raises(lj.InputError, match=r"a Weighted whose weight has the shape \(8, 24\): it must be a scalar"):
        lj.train.make_train_step(loss, TX)(state_of(start()), VARIABLES, batch_of("empty"))


def test_gradients_for_initialisers_are_those_of_all_batches_together():
    batch, adapters = batch_of("empty"), start()
    loss = lambda variables, batch: lj.train.Weighted(*sums(variables, batch))
    halves = jax.tree.map(lambda leaf: leaf.reshape(4, 2, *leaf.shape[1:]), batch)
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], halves) for i in range(4)]
    mean = lambda variables: (lambda total, weight: total / weight)(*sums(variables, batch))
    assert distance(gradients(loss, VARIABLES, adapters, parts)["head"], jax.grad(mean)(VARIABLES)["head"]) < 1e-6
    with pytest.raises(lj.InputError, match="none with anything to learn, so there is no gradient"):
        gradients(loss, VARIABLES, adapters, parts[1:2])


# --- two processes ----------------------------------------------------------------------------------------------------


def process(number):
    """One of two processes, with two devices and half of the rows; prints how far it is from one big batch."""
    half = lambda leaf: np.asarray(leaf)[4 * number : 4 * number + 4]
    adapters, batch = start(), batch_of("empty")
    with jax.default_device(jax.local_devices()[0]):
        loss, grads = jax.device_get(whole(adapters, batch))
    adapters, variables = jax.device_get((adapters, VARIABLES))

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda leaf, *spec: jax.make_array_from_process_local_data(NamedSharding(mesh, jax.P(*spec)), np.asarray(leaf))
    everywhere = lambda tree: jax.tree.map(put, tree)
    rows = jax.tree.map(lambda leaf: put(half(leaf), "data"), batch)
    step = lj.train.make_train_step(weighted, TX)
    by_mesh = step(jax.jit(state_of)(everywhere(adapters)), everywhere(variables), rows)

    pmapped = lj.train.make_pmap_train_step(weighted, TX, accumulate=2)
    rows = jax.tree.map(lambda leaf: half(leaf).reshape(2, 2, *leaf.shape[1:]), batch)
    state, metrics = pmapped(lj.train.replicate(state_of(adapters)), lj.train.replicate(variables), rows)
    first = lambda leaf: np.asarray(leaf.addressable_data(0))[0]
    by_pmap = jax.tree.map(first, (gradient_of(state), metrics))

    for got, found in ((gradient_of(by_mesh[0]), by_mesh[1]), by_pmap):
        print(abs(float(found["loss"]) / float(loss) - 1) < 1e-6, distance(jax.device_get(got), grads) < 1e-6)
    jax.distributed.shutdown()


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"import jax; jax.distributed.initialize({place!r}, 2, %d); "
    code += "from tests.training import test_weighted; test_weighted.process(jax.process_index())"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    start = lambda number: subprocess.Popen(
        [sys.executable, "-c", code % number], cwd=tiny.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    outputs = [process.communicate(timeout=180)[0] for process in [start(0), start(1)]]
    assert [output.splitlines()[-2:] for output in outputs] == [["True True"] * 2] * 2, outputs

"""Schedules by their formulas, and the optimisers of a run on adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.errors import InputError
from lora_jax.training import recipe
from lora_jax.training.schedules import Schedule

NAMES = ["adamw", "adafactor", "lamb", "lion", "muon", "sgd"]


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("cosine", [0.2 + 0.8 * (1 + np.cos(np.pi * i / 10)) / 2 for i in range(10)]),
        ("linear", [1 - 0.8 * i / 10 for i in range(10)]),
        ("constant", [1.0] * 10),
        ("wsd", [*[1.0] * 9, 0.6]),
    ],
)
def test_schedules(kind, want):
    floor = {} if kind == "constant" else {"min_rate": 0.2}
    rates = Schedule(kind=kind, warmup=4, **floor).over(1.0, [14, 14])
    found = [float(rates(step)) for step in range(28)]
    np.testing.assert_allclose(found, [0.25, 0.5, 0.75, 1.0, *want] * 2, rtol=1e-6)


def test_no_warmup_and_one_longer_than_the_phase():
    assert [float(Schedule(kind="constant", warmup=0).over(1.0, [2])(step)) for step in range(2)] == [1.0, 1.0]
    assert [float(Schedule(warmup=9).over(1.0, [2])(step)) for step in range(2)] == [0.5, 1.0]


def test_a_schedule_that_is_not_known():
    with pytest.raises(InputError, match="kind must be 'cosine', 'linear', 'constant' or 'wsd', not 'step'"):
        Schedule(kind="step").over(1.0, [4])


def test_a_floor_for_a_rate_that_does_not_fall():
    with pytest.raises(InputError, match="min_rate is where a schedule ends that falls"):
        Schedule(kind="constant", min_rate=0.1)


def pair(seed, *batch, frozen=()):
    draw = np.random.default_rng(seed)
    a, b = (jnp.asarray(draw.normal(size=(*batch, *shape)), jnp.float32) for shape in ((6, 2), (2, 5)))
    layout = lj.Layout(tuple(range(len(batch))), (len(batch),), (len(batch) + 1,))
    return lj.LowRank(a, b, layout, scale=2.0, frozen=frozen)


def after(tx, adapters, gradients):
    """The adapters after two steps."""
    tx = lj.optimizer(tx)
    state = tx.init(adapters)
    for _ in range(2):
        updates, state = tx.update(gradients, state, adapters)
        adapters = jax.tree.map(jnp.add, adapters, updates)
    return adapters


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["lora", "lora_fa", "lora_plus"])
def test_an_optimiser_with_every_method(name, method):
    frozen = ("a",) if method == "lora_fa" else ()
    adapters = {"w": pair(0, frozen=frozen), "head/bias": lj.Full(jnp.ones(3))}
    gradients = {"w": pair(1, frozen=frozen), "head/bias": lj.Full(jnp.full(3, 0.5))}
    way = {"lora_plus": 4.0} if method == "lora_plus" else {"method": method}
    with jax.numpy_dtype_promotion("standard"):
        found = after(recipe.optimizer(0.1, [8], name=name, **way), adapters, gradients)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert (found["w"].b != adapters["w"].b).all() and (found["head/bias"].value < 1).all()
    assert (found["w"].a == adapters["w"].a).all() == (method == "lora_fa")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "lamb"])  # which scales the decay with its update
def test_decay_is_the_rate_times_the_value_and_not_of_vectors(name):
    adapters = {"w": pair(0), "head/bias": lj.Full(jnp.ones(3)), "head/kernel": lj.Full(jnp.ones((3, 2)))}
    gradients = {"w": pair(1), "head/bias": lj.Full(jnp.full(3, 0.5)), "head/kernel": lj.Full(jnp.full((3, 2), 0.5))}

    def first_step(decay):
        tx = lj.optimizer(recipe.optimizer(0.1, [16], name=name, weight_decay=decay))
        return tx.update(gradients, tx.init(adapters), adapters)[0]

    with jax.numpy_dtype_promotion("standard"):
        without, decayed = first_step(0.0), first_step(0.5)
    np.testing.assert_allclose(decayed["w"].a, without["w"].a - 0.1 * 0.5 * adapters["w"].a, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(decayed["head/bias"].value, without["head/bias"].value)
    np.testing.assert_allclose(decayed["head/kernel"].value, without["head/kernel"].value - 0.05, rtol=1e-4)


def test_muon_takes_each_matrix_of_a_stack_by_itself():
    stacked, gradient = pair(0, 3), pair(1, 3)
    one = lambda which, i: dataclasses.replace(which, a=which.a[i], b=which.b[i], layout=pair(0).layout)
    with jax.numpy_dtype_promotion("standard"):
        found = after(lj.optim.muon(0.1), {"w": stacked}, {"w": gradient})["w"]
        for i in range(3):
            alone = after(lj.optim.muon(0.1), {"w": one(stacked, i)}, {"w": one(gradient, i)})["w"]
            np.testing.assert_allclose(found.a[i], alone.a, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.b[i], alone.b, rtol=1e-4, atol=1e-6)
    update = np.asarray(found.a[0] - stacked.a[0])
    assert np.linalg.cond(update) < 3 < np.linalg.cond(np.asarray(gradient.a[0])) + 3  # nearly orthogonal

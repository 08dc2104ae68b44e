"""Optimisers that know A from B: which array gets which learning rate, decay and projection. PEFT's own steps: `test_variants_peft`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core.adapter import Rows
from lora_jax.training.optim import decay_mask, lora_fa, lora_plus, without_copies
from tests.support.frontends import normal

pytestmark = pytest.mark.usefixtures("lenient")  # optax promotes dtypes
FLAT = lj.Layout((), (0,), (1,))
LAYOUTS = {
    "dense": ((5, 4), FLAT),
    "transposed": ((4, 5), lj.Layout((), (1,), (0,))),
    "heads": ((5, 2, 3), lj.Layout((), (0,), (1, 2))),
    "heads in": ((2, 3, 4), lj.Layout((), (0, 1), (2,))),
    "stacked": ((3, 5, 4), lj.Layout((0,), (1,), (2,))),
    "experts of layers": ((2, 4, 3, 5), lj.Layout((0, 2), (1,), (3,))),
    "conv": ((3, 2, 4, 5), lj.Layout((), (0, 1, 2), (3,))),
}


def pair(layout=FLAT, shape=(5, 4), rank=2, **fields):
    a, b = layout.factor_shapes(shape, rank)
    keys = jax.random.split(jax.random.key(0), 2)
    return lj.LowRank(jax.random.normal(keys[0], a), jax.random.normal(keys[1], b), layout, **fields)


def everything():
    """An adapter of every kind that is trained whole or in parts, and of every part of a pair."""
    return {
        "params/dora/kernel": pair(magnitude=jnp.ones(4)),
        "params/biased/kernel": pair(bias=jnp.ones(4), bias_path="params/biased/bias"),
        "params/scaled/kernel": pair(lj.Layout((0,), (1,), (2,)), (3, 5, 4), scale=jnp.arange(3.0)),
        "params/embed/embedding": pair(),
        "params/last%2Elayer/kernel": pair(),  # of a module called last.layer
        "params/head/kernel": lj.Full(jnp.ones((4, 2))),
        "params/head/bias": lj.Full(jnp.ones(2)),
        "params/norms/scale": lj.Full(jnp.ones((3, 4))),  # stacked
        "params/tokens/embedding": Rows(jnp.ones((2, 4)), (1, 3), FLAT),
    }


def base(adapters):
    """A tree of parameters that these adapters fit, and one that is not adapted."""
    tree = {"params": {"norm": {"scale": jnp.ones(4)}}}
    for path, adapter in adapters.items():
        _, module, name = path.replace("%2E", ".").split("/")
        shape = adapter.delta().shape if isinstance(adapter, lj.LowRank) else jax.tree.leaves(adapter)[0].shape
        shape = (6, 4) if isinstance(adapter, Rows) else shape
        tree["params"].setdefault(module, {})[name] = jnp.ones(shape)
    return tree


def updates(tx, tree, steps=1):
    """The last update of some steps whose gradient is one everywhere."""
    tx = lj.optimizer(tx)
    state = tx.init(tree)
    for _ in range(steps):
        update, state = tx.update(jax.tree.map(jnp.ones_like, tree), state, tree)
    return update


def rates(tx, tree=None, steps=1):
    """{path: {array: learning rate}} of an optimiser that is plain descent."""
    update = updates(tx, everything() if tree is None else tree, steps)
    return {path: {n: -float(getattr(u, n).ravel()[0]) for n in u.children()} for path, u in update.items()}


LORA_PLUS = {
    "params/dora/kernel": {"a": 0.5, "b": 2.0, "magnitude": 2.0},
    "params/biased/kernel": {"a": 0.5, "b": 2.0, "bias": 2.0},
    "params/scaled/kernel": {"a": 0.5, "b": 2.0, "scale": 0.0},
    "params/embed/embedding": {"a": 0.5, "b": 2.0},
    "params/last%2Elayer/kernel": {"a": 0.5, "b": 2.0},
    "params/head/kernel": {"value": 0.5},
    "params/head/bias": {"value": 2.0},
    "params/norms/scale": {"value": 2.0},
    "params/tokens/embedding": {"values": 0.5},
}


def test_lora_plus_rates():
    assert rates(lora_plus(optax.sgd, 0.5, 4.0)) == LORA_PLUS


def test_lora_plus_rates_of_patterns():
    got = rates(lora_plus(optax.sgd, 0.5, 4.0, rates={"embed": 0.25, "re:.*/(dora|embed)/.*": 0.125, "last.layer": 0.25}))
    own = {
        "params/embed/embedding": {"a": 0.25, "b": 0.25},
        "params/dora/kernel": dict.fromkeys(("a", "b", "magnitude"), 0.125),
        "params/last%2Elayer/kernel": {"a": 0.25, "b": 0.25},
    }
    assert got == LORA_PLUS | own


def test_lora_plus_takes_schedules():
    schedule = optax.linear_schedule(0.0, 1.0, 4)
    got = rates(lora_plus(optax.sgd, schedule, 4.0, rates={"embed": optax.constant_schedule(0.25)}), steps=3)
    assert got["params/dora/kernel"] == {"a": 0.5, "b": 2.0, "magnitude": 2.0}
    assert got["params/embed/embedding"] == {"a": 0.25, "b": 0.25}


@pytest.mark.parametrize(
    ("tx", "adapters", "message"),
    [
        (
            functools.partial(lora_plus, optax.sgd, 0.1),
            {"w": pair(frozen=("a",))},
            r"w: A is frozen, and LoRA\+ is for pairs whose A is trained: make them with LoraConfig\(method='lora'\)",
        ),
        (functools.partial(lora_plus, optax.sgd, 0.1), {"w": pair(frozen=("b",))}, "w: B is frozen"),
        (functools.partial(lora_plus, optax.sgd, 0.1), {"w": lj.Full(jnp.ones(2))}, r"LoRA\+ is for low-rank pairs"),
        (
            functools.partial(lora_plus, optax.sgd, 0.1, rates={"embed": 1.0}),
            {"w": pair()},
            "rates: the pattern 'embed' matches",
        ),
        (functools.partial(lora_plus, optax.sgd, 0.1, 0.0), {"w": pair()}, "ratio must be a positive, finite number, not 0.0"),
        (
            lambda: lora_fa(optax.sgd(0.1)),
            {"w": pair()},
            r"w: A is trained, and LoRA-FA is for pairs whose A is frozen: make them with LoraConfig\(method='lora_fa'\)",
        ),
        (
            lambda: lora_fa(optax.sgd(0.1)),
            {"w": pair(frozen=("a", "b"))},
            "w: B is frozen, and LoRA-FA is for pairs whose B is",
        ),
        (lambda: lora_fa(optax.sgd(0.1)), {"w": lj.Full(jnp.ones(2))}, "LoRA-FA is for low-rank pairs"),
    ],
)
def test_misuse_is_refused(tx, adapters, message):
    for tree in (adapters, lj.attach(base_of(adapters), adapters)):
        with pytest.raises(ValueError, match=message):
            lj.optimizer(tx()).init(tree)


def base_of(adapters):
    return {"w": jnp.ones(2 if isinstance(adapters["w"], lj.Full) else (5, 4))}


def test_lora_fa_needs_the_frozen_a():
    adapters = {"w": pair(frozen=("a",))}
    tx = lora_fa(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"use it as lora_jax\.optimizer\(lora_fa\(tx\)\), and pass `params`"):
        tx.update(adapters, tx.init(adapters), adapters)


def matrices(array, layout):
    """An array of the parameter's shape as (*batch, in, out)."""
    order = (*layout.batch, *layout.inputs, *layout.outputs)
    batch = tuple(array.shape[axis] for axis in layout.batch)
    ins = int(np.prod([array.shape[axis] for axis in layout.inputs]))
    return np.asarray(array, np.float64).transpose(order).reshape(*batch, ins, -1)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("scaled", [False, True])
def test_lora_fa_moves_along_the_projected_gradient_of_the_kernel(name, scaled):
    shape, layout = LAYOUTS[name]
    batch = tuple(shape[axis] for axis in layout.batch)
    scale = 0.5 + jnp.arange(np.prod(batch)).reshape(batch) if scaled and batch else 1.5
    adapter = pair(layout, shape, scale=scale, frozen=("a",))
    target = jax.random.normal(jax.random.key(1), shape)
    loss = lambda adapters: jnp.sum(adapters["w"].delta() * target)
    tx = lj.optimizer(lora_fa(optax.sgd(1.0)))

    @jax.jit
    def step(adapters):
        update, _ = tx.update(jax.grad(loss)(adapters), tx.init(adapters), adapters)
        return optax.apply_updates(adapters, update)

    after = step({"w": adapter})["w"]
    np.testing.assert_array_equal(after.a, adapter.a)
    got = matrices(after.delta() - adapter.delta(), layout)
    a = np.asarray(adapter.a, np.float64).reshape(*batch, -1, 2)
    want = -a @ np.linalg.pinv(a) @ matrices(target, layout)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_lora_fa_leaves_what_pads_a_smaller_rank_at_zero():
    adapter = pair(lj.Layout((0,), (1,), (2,)), (3, 5, 4), ranks=(2, 1, 0), frozen=("a",))
    on = jnp.arange(2) < jnp.array([[2], [1], [0]])
    adapter = dataclasses.replace(adapter, a=adapter.a * on[:, None], b=adapter.b * on[..., None])
    gradient = {"w": dataclasses.replace(adapter, b=on[..., None] * jnp.ones((3, 2, 4)))}
    tx = lj.optimizer(lora_fa(optax.sgd(1.0)))
    update, _ = tx.update(gradient, tx.init({"w": adapter}), {"w": adapter})
    assert bool((update["w"].b[1, 1] == 0).all() and (update["w"].b[2] == 0).all())
    np.testing.assert_allclose(update["w"].b[1, 0], jnp.full(4, -1 / jnp.sum(adapter.a[1] ** 2)), rtol=1e-5)


def test_lora_fa_leaves_what_is_no_pair_to_the_optimiser():
    adapters = everything()
    adapters |= {path: dataclasses.replace(a, frozen=("a",)) for path, a in adapters.items() if isinstance(a, lj.LowRank)}
    del adapters["params/scaled/kernel"]  # its scale of 0 has no inverse
    got = rates(lora_fa(optax.sgd(0.5)), adapters)
    for path in ("params/head/kernel", "params/head/bias", "params/tokens/embedding"):
        assert set(got[path].values()) == {0.5}
    assert got["params/dora/kernel"]["magnitude"] == 0.5 and got["params/dora/kernel"]["a"] == 0


DECAYS = {
    "params/dora/kernel": {"a": True, "b": True, "magnitude": False},
    "params/biased/kernel": {"a": True, "b": True, "bias": False},
    "params/scaled/kernel": {"a": True, "b": True, "scale": False},
    "params/embed/embedding": {"a": True, "b": True},
    "params/last%2Elayer/kernel": {"a": True, "b": True},
    "params/head/kernel": {"value": True},
    "params/head/bias": {"value": False},
    "params/norms/scale": {"value": False},
    "params/tokens/embedding": {"values": True},
}


def test_decay_mask():
    masks = {path: {name: getattr(mask, name) for name in mask.children()} for path, mask in decay_mask(everything()).items()}
    assert masks == DECAYS
    adapters = everything()
    attached = decay_mask(lj.attach(base(adapters), adapters))
    assert attached["params"]["norm"]["scale"] is False
    assert attached["params"]["dora"]["kernel"].base is False and attached["params"]["dora"]["kernel"].adapter.b is True


def test_decay_goes_where_the_mask_says():
    adapters = everything()
    tx = lj.optimizer(lora_plus(functools.partial(optax.adamw, weight_decay=0.5, mask=decay_mask), 0.1))
    zero = jax.tree.map(jnp.zeros_like, adapters)
    update, _ = jax.jit(tx.update)(zero, tx.init(adapters), adapters)
    moved = {path: {name: bool(jnp.any(getattr(u, name) != 0)) for name in u.children()} for path, u in update.items()}
    assert moved == DECAYS


TRANSFORMS = {
    "lora_plus": (lambda: lora_plus(functools.partial(optax.adamw, mask=decay_mask), 1e-2, rates={"out": 1e-3}), {}),
    "lora_fa": (lambda: lora_fa(optax.adam(1e-2)), {"frozen": ("a",)}),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_both_flows_take_the_same_steps(name):
    make, fields = TRANSFORMS[name]
    variables = {"layers": {"w": jnp.ones((2, 4, 4))}, "out": {"kernel": jnp.ones((4, 3))}}
    adapters = {
        "layers/w": pair(lj.Layout((0,), (1,), (2,)), (2, 4, 4), **fields),
        "out/kernel": pair(shape=(4, 3), **fields),
    }

    def model(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["w"])
        return x @ params["out"]["kernel"]

    loss = lambda params, x, key=None: jnp.mean((lj.lora(model)(params, x) - 1.0) ** 2)
    x, tx = normal(2, 5, 4), lj.optimizer(make())
    step = lj.train.make_train_step(loss, make(), max_grad_norm=1.0)
    state = lj.train.init_state(adapters, make(), key=jax.random.key(0))
    params = lj.attach(variables, adapters)

    @jax.jit
    def whole(params, opt_state):
        gradient, _ = optax.clip_by_global_norm(1.0).update(jax.grad(loss)(params, x), optax.EmptyState())
        update, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, update), opt_state

    opt_state = tx.init(params)
    for _ in range(3):
        state, metrics = step(state, variables, x)
        params, opt_state = whole(params, opt_state)
    assert int(metrics["skipped"]) == 0
    for got, want in zip(jax.tree.leaves(lj.detach(params)[1]), jax.tree.leaves(state.adapters), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert not jnp.allclose(state.adapters["layers/w"].b, adapters["layers/w"].b)


@pytest.mark.parametrize("tx", [optax.sgd(1e-4), optax.adam(1e-4), lora_plus(optax.sgd, 1e-4)], ids=["sgd", "adam", "lora+"])
def test_small_updates_of_low_precision_are_not_lost(tx):
    """200 steps of 1e-4 move 1 to 0.98; bfloat16 has no number between 1 and 0.996, so alone it would stay at 1."""
    full = lj.optimizer(tx)

    def step(carry, _):
        adapters, state = carry
        updates, state = full.update(jax.tree.map(jnp.ones_like, adapters), state, adapters)
        return (optax.apply_updates(adapters, updates), state), None

    def end(dtype):
        shapes = {"w": pair(magnitude=jnp.ones(4)), "head": lj.Full(jnp.ones(2))}
        adapters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype), shapes)
        (adapters, _), _ = jax.lax.scan(step, (adapters, full.init(adapters)), length=200)
        return jax.tree.leaves(adapters)

    for low, wide in zip(end(jnp.bfloat16), end(jnp.float32), strict=True):
        assert low.dtype == jnp.bfloat16 and np.all(np.asarray(wide) < 0.981)
        np.testing.assert_array_equal(low, wide.astype(jnp.bfloat16))


def test_low_precision_needs_the_adapters():
    adapters = {"head": lj.Full(jnp.ones(2, jnp.bfloat16))}
    tx = lj.optimizer(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"a dtype below float32, .* pass update\(\.\.\., params\)"):
        tx.update(adapters, tx.init(adapters))


def test_a_state_of_before_goes_on_as_it_was():
    """Without float32 copies: 1 - 1e-4 is 1 in bfloat16."""
    adapters = {"head": lj.Full(jnp.ones(2, jnp.bfloat16))}
    tx = lj.optimizer(optax.sgd(1e-4))
    before = without_copies(tx.init(adapters))
    updates, after = tx.update(adapters, before, adapters)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert optax.apply_updates(adapters, updates)["head"].value.tolist() == [1.0, 1.0]


def test_multi_steps_are_one_step_with_the_mean_gradient():
    adapters = {"w": pair()}
    gradients = [jax.tree.map(lambda leaf, k=k: k * jnp.ones_like(leaf) + leaf, adapters) for k in (1.0, 3.0)]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *gradients)
    ends = []
    for tx, seen in ((optax.MultiSteps(optax.adam(0.1), 2), gradients), (optax.adam(0.1), [mean])):
        tx, end = lj.optimizer(tx), adapters
        state = tx.init(end)
        for gradient in seen:
            updates, state = tx.update(gradient, state, end)
            end = optax.apply_updates(end, updates)
        ends.append(end)
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)

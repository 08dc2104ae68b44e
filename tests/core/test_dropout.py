"""Dropout on the low-rank branch: only with a key, a mask for each use, and right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.identity import distance

RATE, WIDTH = 0.25, 64
ONES = jnp.ones((100, WIDTH))


def kept(fn, *, key=0, rate=RATE, shape=(WIDTH, WIDTH), paths=("w",), x=ONES):
    """`fn` of zero kernels with identity pairs: with ones as inputs, what comes out is the mask over (1 - rate)."""
    eye = jnp.broadcast_to(jnp.eye(WIDTH), shape)
    batch = tuple(range(len(shape) - 2))
    layout = lj.Layout(batch, (len(batch),), (len(batch) + 1,))
    adapters = {path: lj.LowRank(eye, eye, layout, dropout=rate) for path in paths}
    params = lj.attach({path: jnp.zeros(shape) for path in paths}, adapters)
    return jax.tree.map(np.asarray, jax.jit(lj.lora(fn, key=None if key is None else jax.random.key(key)))(params, x))


def agreement(first, second):
    """The share of equal entries: 1 for one mask, about rate^2 + (1 - rate)^2 for two independent ones."""
    return float((first == second).mean())


INDEPENDENT = pytest.approx(RATE**2 + (1 - RATE) ** 2, abs=0.03)
once = lambda p, x: x @ p["w"]


def test_rate_and_scale():
    mask = kept(once)
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / (1 - RATE))}
    assert (mask == 0).mean() == pytest.approx(RATE, abs=0.02)
    assert mask.mean() == pytest.approx(1.0, abs=0.03)


def test_same_key_same_mask_and_another_key_another():
    assert agreement(kept(once), kept(once)) == 1.0
    assert agreement(kept(once), kept(once, key=1)) == INDEPENDENT


@pytest.mark.parametrize("options", [{"key": None}, {"rate": 0.0}])
def test_no_dropout_without_a_key_or_a_rate(options):
    assert (kept(once, **options) == 1).all()


def twice(p, x):
    return x @ p["w"], x @ p["w"]


def two_paths(p, x):
    return x @ p["w"], x @ p["v"]


def scanned(p, x):
    return lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]


def closed_over_by_a_scan(p, x):
    return lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=2)[1]


def rematerialised(p, x):
    block = jax.checkpoint(lambda w: x @ w)
    return block(p["w"]), block(p["w"])


def in_a_while_loop(p, x):
    step = lambda i, ys: ys.at[i].set(x @ p["w"])
    return lax.fori_loop(0, jnp.int32(x.shape[0] // 50), step, jnp.zeros((2, *x.shape)))


def across_nested_scans(p, x):
    inner = lambda c, w: (c, x @ w)
    ys = lax.scan(lambda c, ws: (c, lax.scan(inner, 0, ws)[1]), 0, p["w"])[1]
    return ys[0, 0], ys[0, 1], ys[1, 0], ys[1, 1]


USES = {
    "twice": (twice, {}),
    "two_paths": (two_paths, {"paths": ("v", "w")}),
    "scanned": (scanned, {"shape": (2, WIDTH, WIDTH)}),
    "closed_over_by_a_scan": (closed_over_by_a_scan, {}),
    "rematerialised": (rematerialised, {}),
    "in_a_while_loop": (in_a_while_loop, {}),
    "across_nested_scans": (across_nested_scans, {"shape": (2, 2, WIDTH, WIDTH)}),
}


@pytest.mark.parametrize("name", USES)
def test_each_use_draws_its_own_mask(name):
    fn, options = USES[name]
    found = list(kept(fn, **options))
    for i, first in enumerate(found):
        assert (first == 0).mean() == pytest.approx(RATE, abs=0.03)
        assert all(agreement(first, second) == INDEPENDENT for second in found[:i])


def test_the_backward_pass_uses_the_forward_mask():
    """d(sum)/dx of the branch is the mask itself, also where remat computes it again."""
    pair = lj.LowRank(jnp.eye(8), jnp.eye(8), lj.Layout((), (0,), (1,)), dropout=0.5)
    params = lj.attach({"w": jnp.zeros((8, 8))}, {"w": pair})
    apply = lj.lora(jax.checkpoint(once), key=jax.random.key(3))
    x = jnp.ones((6, 8))
    assert (jax.grad(lambda x: apply(params, x).sum())(x) == apply(params, x)).all()


def test_convolutions_and_lookups():
    """A convolution drops entries of its input; a lookup has no input to drop from."""
    conv = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    pair = lj.LowRank(jnp.eye(WIDTH)[None], jnp.eye(WIDTH), lj.Layout((), (0, 1), (2,)), dropout=RATE)
    params = lj.attach({"w": jnp.zeros((1, WIDTH, WIDTH))}, {"w": pair})
    mask = lj.lora(conv, key=jax.random.key(0))(params, ONES[None])
    assert float((mask == 0).mean()) == pytest.approx(RATE, abs=0.03)
    rows = lambda p, ids: p["w"][ids] * 1.0
    assert (kept(rows, x=jnp.arange(4)) == np.eye(WIDTH)[:4]).all()


def test_the_mean_over_keys_is_the_branch_without_dropout():
    variables, x = {"w": normal(1, 8, 6)}, normal(2, 5, 8)
    pair = lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), lj.Layout((), (0,), (1,)), dropout=0.5)
    params = lj.attach(variables, {"w": pair})
    draws = jax.vmap(lambda key: lj.lora(once, key=key)(params, x))(jax.random.split(jax.random.key(0), 20_000))
    assert distance(draws.mean(0), lj.lora(once)(params, x)) < 0.02
    assert float(draws.std(0).min()) > 0.1

"""Weights that are scaled or masked elementwise: along in axes or along out axes they stay low-rank, whatever the method."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.identity import distance, value_and_grads

W, X = normal(1, 8, 6) / 3, normal(2, 5, 8)
LAYOUT = lj.Layout((), (0,), (1,))
PAIR = lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), LAYOUT, 0.5)
ADAPTERS = {
    "pair": PAIR,
    "magnitude": dataclasses.replace(PAIR, magnitude=1 + jnp.arange(6.0)),
    "vera": dataclasses.replace(PAIR, lambda_d=normal(5, 2), lambda_b=normal(6, 6)),
    "rows": lj.Rows(normal(7, 2, 6), (1, 4), LAYOUT),
    "columns": lj.Rows(normal(8, 2, 8), (1, 4), lj.Layout((), (1,), (0,))),
}
outs, ins = 2 + jnp.arange(6.0), 1 + jnp.arange(8.0)[:, None]
rows, columns = jnp.arange(8)[:, None] % 3 > 0, jnp.arange(6)[None] % 2 > 0


def scaled(p, x):
    one = jnp.tanh(x @ (p["w"] * outs[None])) + x @ (p["w"] / ins)
    two = x @ jnp.where(rows, p["w"], 0) + x @ jnp.where(columns, p["w"], 0.5) + x @ jnp.where(rows, 0.3, p["w"])
    looked_up = jnp.where(rows[:5], (p["w"] * outs[None])[jnp.array([4, 1, 1, 0, 7])], 0)
    return one + two + looked_up + x @ jnp.where(x.sum() > 0, -p["w"], 0) + x @ (p["w"].T * outs[:, None]).T


@pytest.mark.parametrize("name", ADAPTERS)
def test_equals_merged_weights(name):
    run = lambda f: jax.jit(lambda a: value_and_grads(f, a, X))({"w": ADAPTERS[name]})
    ours = run(lambda a, x: lj.lora(scaled)(lj.attach({"w": W}, a), x))
    assert distance(ours, run(lambda a, x: scaled(lj.merge({"w": W}, a), x))) < 1e-5


def test_a_scale_that_is_broadcast_outside_of_a_call_or_loop():
    variables, pair = (
        {"w": normal(1, 3, 8, 8)},
        {"w": lj.LowRank(normal(3, 3, 8, 2), normal(4, 3, 2, 8), lj.Layout((0,), (1,), (2,)))},
    )
    scaled = jax.jit(lambda w, scale, x: jnp.tanh(x @ (w * scale)))

    def fn(p, x):
        scale = jnp.broadcast_to(jnp.arange(8.0), (8, 8))
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ (w * scale)), None), x, p["w"])[0]
        return scaled(p["w"][0], jnp.broadcast_to(ins, (8, 8)), x) + scaled(p["w"][0], scale, x)

    assert not lj.explain(fn, variables, X).parameters["w"].obstacle
    want = fn(lj.merge(variables, pair), X)
    for apply in (lj.lora(fn), jax.jit(lj.lora(fn))):
        assert distance(apply(lj.attach(variables, pair), X), want) < 1e-5


def test_dropout_is_on_the_input_of_the_branch():
    pair, key = {"w": dataclasses.replace(PAIR, dropout=0.5)}, jax.random.key(0)
    alone = lj.lora(lambda p, x: x @ p["w"], key=key)(lj.attach({"w": W}, pair), X)
    together = lj.lora(lambda p, x: x @ (p["w"] * outs[None]), key=key)(lj.attach({"w": W}, pair), X)
    assert distance(together, alone * outs[None]) < 1e-6


def test_moments_are_those_of_the_scaled_inputs():
    pair, variables = {"w": PAIR}, {"w": W}
    seen = lambda fn: lj.moments(fn, variables, pair, X)
    got = seen(lambda p, x: x @ (p["w"] * ins * outs[None]))
    want = lj.moments(lambda p, x: (x * ins.T) @ p["w"], variables, pair, X)
    assert distance(got, want) < 1e-6


CROSSED = "it is multiplied elementwise with an array that varies along in and out axes at once"


def test_in_and_out_axes_at_once():
    variables = {"w": normal(1, 8, 2, 3), "scale": normal(2, 8, 2, 1)}
    fn = lambda p, x: jnp.einsum("ti,inh->tnh", x, p["w"] * p["scale"])
    pair = {"w": lj.LowRank(normal(3, 8, 2), normal(4, 2, 2, 3), lj.Layout((), (0,), (1, 2)))}
    with pytest.raises(lj.NotLowRankError, match=CROSSED):
        lj.lora(fn)(lj.attach(variables, pair), X)
    explained = lj.explain(fn, variables, X).parameters
    assert CROSSED in explained["w"].obstacle and "it scales another parameter" in explained["scale"].obstacle


def test_in_and_out_axes_of_a_table_at_once():
    """`explain` says what `lora` would."""
    fn = lambda p, ids: (p["w"] * normal(2, 8, 2, 1))[ids]
    assert CROSSED in lj.explain(fn, {"w": normal(1, 8, 2, 3)}, jnp.array([1])).parameters["w"].obstacle


@pytest.mark.parametrize("fn", [lambda p, x: x @ (p["w"] * outs[None]), lambda p, x: x @ jnp.where(rows, p["w"], 0)])
def test_a_bias_is_not_scaled(fn):
    with pytest.raises(lj.NotLowRankError, match="multiplied with something, and its adapter has a bias"):
        lj.lora(fn)(lj.attach({"w": W}, {"w": dataclasses.replace(PAIR, bias=normal(5, 6))}), X)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_the_kernel_of_a_weight_norm_is_refused_aloud(library):
    """Its norm is not linear in it."""
    if library == "linen":
        model = nn.WeightNorm(nn.Dense(6))
        fn, params = model.apply, model.init(jax.random.key(0), X)
    else:
        linear = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        fn, params = lj.nnx.functional(nnx.WeightNorm(linear, rngs=nnx.Rngs(1)))
    with pytest.raises(lj.InputError, match=r"kernel \(8, 6\): `mul` at .*: it is multiplied elementwise with itself"):
        lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, params, X)

"""`explain`: the use of each parameter, its layout, and why it takes no pair."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from tests.support.frontends import normal

X = normal(9, 5, 8)
layer = lambda x, w: (jnp.tanh(x @ w), None)

LAYOUTS = {
    "kernel": ((8, 6), (), (0,), (1,), lambda w, x: x @ w),
    "transposed": ((6, 8), (), (1,), (0,), lambda w, x: x @ w.T),
    "heads": ((2, 8, 3), (), (1,), (0, 2), lambda w, x: jnp.einsum("td,ndh->tnh", x, w)),
    "from_heads": ((2, 4, 6), (), (0, 1), (2,), lambda w, x: jnp.einsum("tnh,nhd->td", x.reshape(5, 2, 4), w)),
    "scanned": ((3, 8, 8), (0,), (1,), (2,), lambda w, x: lax.scan(layer, x, w)[0]),
    "indexed": ((3, 8, 8), (0,), (1,), (2,), lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x)),
    "experts": ((5, 8, 6), (0,), (1,), (2,), lambda w, x: jnp.einsum("ei,eio->eo", x, w)),
    "grouped": ((3, 6, 8), (0,), (2,), (1,), lambda w, x: lax.ragged_dot(x, w.swapaxes(1, 2), jnp.array([2, 0, 3]))),
    "convolution": ((3, 4, 6), (), (0, 1), (2,), lambda w, x: lax.conv_general_dilated(
        x.reshape(1, 10, 4), w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))),
    "table": ((9, 4), (), (0,), (1,), lambda w, x: w[jnp.array([1, 2])]),
    "window_of_a_table": ((9, 4), (), (0,), (1,), lambda w, x: w[jnp.array([1, 2]), 1:3]),
    "tied_table": ((9, 8), (), (0,), (1,), lambda w, x: (x + w[jnp.arange(5)]) @ w.T),
    "summed": ((3, 8, 6), (), (0, 1), (2,), lambda w, x: x @ w.sum(0)),
    "summed_rows_of_a_table": ((9, 2, 4), (), (0,), (1, 2), lambda w, x: w[jnp.array([1, 2])].sum(0)),
    "in_a_branch": ((8, 8), (), (0,), (1,), lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_by_use(name):
    shape, batch, inputs, outputs, fn = LAYOUTS[name]
    [parameter] = lj.explain(lambda p, x: fn(p["w"], x), {"w": normal(1, *shape)}, X).parameters.values()
    assert (parameter.obstacle, parameter.layout) == ("", lj.Layout(batch, inputs, outputs))
    assert parameter.kind == ("embedding" if "table" in name else "linear")


OBSTACLES = {
    "unused": ((8,), "unused", "the function does not use it", lambda w, x: x),
    "bias": ((8,), "other", "it is added to something, not multiplied with it", lambda w, x: x + w[None]),
    "scale": ((8,), "other", "it enters elementwise arithmetic with an array", lambda w, x: x * w[None]),
    "scalar": ((), "other", "it is a scalar", lambda w, x: x * w),
    "vector": ((8,), "linear", "it has no out axis, so a pair would save nothing", lambda w, x: x @ w),
    "outer": ((6, 2), "linear", "it has no in axis, so a pair would save nothing", lambda w, x: jnp.tensordot(x, w, 0)),
    "summed": ((8, 6), "linear", "it has no out axis, so a pair would save nothing", lambda w, x: x @ w.sum(1)),
    "returned": ((8, 8), "other", "the function returns it", lambda w, x: w),
    "power": ((8, 8), "other", "no rule keeps it low-rank", lambda w, x: x @ w**2),
    "own_rule": ((8, 8), "other", "the function has a derivative rule of its own", lambda w, x: jax.nn.relu(w) @ x.T),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles(name):
    shape, kind, reason, fn = OBSTACLES[name]
    [parameter] = lj.explain(lambda p, x: fn(p["w"], x), {"w": normal(1, *shape)}, X).parameters.values()
    assert parameter.kind == kind and reason in parameter.obstacle
    if kind == "other" and name not in ("scalar", "returned"):
        assert "test_explain.py" in parameter.obstacle


def test_every_distinct_use_once_with_its_place():
    def fn(p, x):
        x = lax.fori_loop(0, 3, lambda i, x: x @ p["w"], x)
        return x @ p["w"].T

    [parameter] = lj.explain(fn, {"w": normal(1, 8, 8)}, X).parameters.values()
    assert [(use.kind, use.primitive, use.roles) for use in parameter.uses] == [
        ("product", "dot_general", ("in", "out")), ("product", "dot_general", ("out", "in")),
    ]  # fmt: skip
    assert all("test_explain.py" in use.site for use in parameter.uses)


def test_integers_and_attached_trees_and_shapes():
    fn = lambda p, x: (x + p["ids"].astype(jnp.float32)[None]) @ p["w"]
    variables = {"w": normal(1, 8, 6), "ids": jnp.arange(8), "name": "a string"}
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, variables, X)
    plain, attached = lj.explain(fn, variables, X), lj.explain(fn, lj.attach(variables, adapters), X)
    shapes = jax.tree.map(lambda v: v if isinstance(v, str) else jax.ShapeDtypeStruct(v.shape, v.dtype), variables)
    assert str(plain) == str(attached) == str(lj.explain(fn, shapes, jax.ShapeDtypeStruct(X.shape, X.dtype)))
    assert list(plain.parameters) == ["ids", "w"]
    assert "its dtype is int32" in plain.parameters["ids"].obstacle


def test_the_table():
    def fn(p, x):
        return x @ p["layers"][0] + p["bias"][None]

    text = str(lj.explain(fn, {"layers": [normal(1, 8, 6)], "bias": jnp.ones(6)}, X))
    header, bias, kernel = text.splitlines()
    assert header.split() == ["parameter", "shape", "use", "batch", "in", "out", "low-rank"]
    assert kernel.split() == ["layers/0", "(8,", "6)", "linear", "(dot_general)", "0", "1", "yes"]
    assert bias.startswith("bias       (6,)    other (add)") and "no: `add` at " in bias


def test_rows_that_were_looked_up_beside_a_learned_prompt():
    def fn(p, ids):
        return jnp.tanh(jnp.concatenate([p["prompt"], p["table"][ids]])) @ p["w"]

    params, ids = {"prompt": normal(1, 2, 8), "table": normal(2, 9, 8), "w": normal(3, 8, 5)}, jnp.array([0, 3, 3])
    found = lj.explain(fn, params, ids).parameters
    assert {path: parameter.kind for path, parameter in found.items()} == {
        "prompt": "other",
        "table": "embedding",
        "w": "linear",
    }
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["table", "w"]), fn, params, ids)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    got, want = lj.lora(fn)(lj.attach(params, moved), ids), fn(lj.merge(params, moved), ids)
    assert jnp.allclose(got, want, atol=1e-5)

"""Attaching, detaching, labels, merging, summaries."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.support.frontends import normal

LAYOUT = lj.Layout((), (0,), (1,))


def pair(shape=(6, 4), rank=2, layout=LAYOUT, **fields):
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    return lj.LowRank(normal(1, *a_shape), normal(2, *b_shape), layout, **{"scale": 0.5} | fields)


VARIABLES = {"params": {"w": normal(0, 6, 4), "norm": jnp.ones(4)}, "count": jnp.int32(3)}


def test_attach_and_detach_are_inverses():
    adapters = {"params/w": pair(), "params/norm": lj.Full(jnp.zeros(4))}
    params = lj.attach(VARIABLES, adapters)
    assert params["params"]["w"].base is VARIABLES["params"]["w"]
    variables, again = lj.detach(params)
    assert again == adapters
    assert jax.tree.structure(variables) == jax.tree.structure(VARIABLES)
    jax.tree.map(np.testing.assert_array_equal, variables, VARIABLES)


def test_attach_reaches_into_boxes():
    boxed = {"w": nn.Partitioned(normal(0, 6, 4), names=("a", None))}
    params = lj.attach(boxed, {"w": pair()})
    assert isinstance(params["w"], nn.Partitioned)
    assert params["w"].value.adapter.rank == 2
    assert lj.detach(params)[0]["w"].names == ("a", None)


@pytest.mark.parametrize("adapters,message", [
    ({"params/W": pair()}, "the adapter 'params/W' has no parameter in this tree. The nearest paths are:\n  params/w"),
    ({"params/w": pair((6, 5))}, "params/w: the adapter's b has the shape (2, 5); a parameter of the shape (6, 4) needs (2, 4)"),
    ({"params/w": pair((6, 4, 3), layout=lj.Layout((), (0,), (1, 2)))}, "which the adapter's Layout(batch=(), inputs=(0,), outputs=(1, 2)) does not cover"),
    ({"params/norm": lj.Full(jnp.zeros(5))}, "params/norm: the adapter's value has the shape (5,)"),
    ({"params/w": pair(scale=jnp.ones(3))}, "params/w: the adapter's scale has the shape (3,); a parameter of the shape (6, 4) needs ()"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(adapters, message):
    for combine in (lj.attach, lj.merge, lj.unmerge):
        if combine is lj.unmerge and any(isinstance(a, lj.Full) for a in adapters.values()):
            continue
        with pytest.raises(ValueError, match=re.escape(message)):
            combine(VARIABLES, adapters)


def test_what_is_not_an_adapter_is_refused():
    with pytest.raises(TypeError, match="params/w: an adapter is a LowRank, a Full or Rows, not tuple"):
        lj.attach(VARIABLES, {"params/w": (1, 2)})


def test_attaching_twice_is_refused():
    params = lj.attach(VARIABLES, {"params/w": pair()})
    with pytest.raises(ValueError, match="params/w: the tree has adapters already"):
        lj.attach(params, {"params/norm": lj.Full(jnp.zeros(4))})


def test_labels_say_what_is_trained():
    adapters = {"params/w": pair(scale=jnp.float32(2), frozen=("a",)), "params/norm": lj.Full(jnp.zeros(4))}
    labels = lj.labels(lj.attach(VARIABLES, adapters))
    w = labels["params"]["w"]
    assert (w.base, w.adapter.a, w.adapter.b, w.adapter.scale) == ("frozen", "frozen", "adapter", "frozen")
    assert (labels["params"]["norm"].adapter.value, labels["count"]) == ("adapter", "frozen")
    assert lj.labels(adapters)["params/w"].b == "adapter"


@pytest.mark.parametrize("shape,layout,einsum", [
    ((6, 4), lj.Layout((), (0,), (1,)), "ir,ro->io"),
    ((6, 4), lj.Layout((), (1,), (0,)), "ir,ro->oi"),
    ((3, 6, 4), lj.Layout((0,), (1,), (2,)), "bir,bro->bio"),
    ((2, 6, 4), lj.Layout((), (1,), (0, 2)), "ir,rno->nio"),
    ((6, 5, 3, 4), lj.Layout((2,), (0, 3), (1,)), "biJr,bro->iobJ"),
])  # fmt: skip
def test_merge_adds_the_product_in_the_parameters_own_axes(shape, layout, einsum):
    w, adapter = normal(3, *shape), pair(shape, layout=layout)
    want = w + 0.5 * jnp.einsum(einsum, adapter.a, adapter.b)
    np.testing.assert_allclose(lj.merge({"w": w}, {"w": adapter})["w"], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lj.unmerge({"w": want}, {"w": adapter})["w"], w, rtol=1e-5, atol=1e-5)


def test_a_scale_for_each_matrix_of_a_stack():
    w, layout = normal(3, 3, 6, 4), lj.Layout((0,), (1,), (2,))
    adapter = pair((3, 6, 4), layout=layout, scale=jnp.array([0.0, 1.0, 2.0]))
    merged = lj.merge({"w": w}, {"w": adapter})["w"]
    for i in range(3):
        np.testing.assert_allclose(merged[i], w[i] + i * adapter.a[i] @ adapter.b[i], rtol=1e-5, atol=1e-5)


def test_merge_keeps_the_bases_dtype_and_the_base():
    base = {"w": normal(0, 6, 4).astype(jnp.bfloat16)}
    merged = lj.merge(base, {"w": pair()})
    assert merged["w"].dtype == jnp.bfloat16
    want = (base["w"].astype(jnp.float32) + pair().delta()).astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged["w"].astype(jnp.float32), want.astype(jnp.float32))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_merge_checks_on_request(bad):
    adapters = {"params/w": pair(), "params/norm": lj.Full(jnp.full(4, bad))}
    with pytest.raises(ValueError, match="merging makes NaN or infinite values in params/norm; the base is unchanged"):
        lj.merge(VARIABLES, adapters, check=True)
    del adapters["params/norm"]
    lj.merge(VARIABLES, adapters, check=True)


def test_a_full_adapter_can_not_be_unmerged():
    with pytest.raises(ValueError, match="params/norm: a Full adapter, Rows and one with a magnitude replace their parameter"):
        lj.unmerge(VARIABLES, {"params/norm": lj.Full(jnp.zeros(4))})


def test_summary_counts():
    adapters = {"params/w": pair(frozen=("a",)), "params/norm": lj.Full(jnp.zeros(4, jnp.bfloat16))}
    summary = lj.summary(VARIABLES, adapters)
    assert (summary.parameters, summary.parameter_bytes) == (29, 116)
    assert (summary.trainable, summary.adapter_bytes, summary.optimizer_bytes) == (8 + 4, (12 + 8) * 4 + 8, 2 * (32 + 8))
    assert "12 trainable of 29 parameters (41.38%)" in str(summary)


def test_summary_refuses_an_adapter_of_another_model():
    with pytest.raises(ValueError, match="the adapter 'other' has no parameter in this tree"):
        lj.summary(VARIABLES, {"other": pair()})


def test_an_exported_function_of_an_attached_tree_serialises_and_loads():
    fn = lambda params, x: x @ params["params"]["w"] + params["params"]["norm"][None]
    adapters = {"params/w": pair(ranks=(2,)), "params/norm": lj.Full(jnp.zeros(4))}
    params, x = lj.attach(VARIABLES, adapters), normal(5, 3, 6)
    exported = jax.export.export(jax.jit(lj.lora(fn)))(params, x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(params, x), jax.jit(lj.lora(fn))(params, x))

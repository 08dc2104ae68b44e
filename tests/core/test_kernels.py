"""Registered functions: kernels that JAX can't see into stay low-rank, by the product that they are said to be."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox import gmm

import lora_jax as lj
from lora_jax.core.rules import kernels
from tests.support.frontends import normal, params
from tests.support.identity import distance, equal_to_merged

SIZES = jnp.array([5, 3], jnp.int32)
EXPERTS = params(jnp.float32, w=(2, 8, 8))
X = normal(9, 8, 8)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(kernels, "_rules", {})
    lj.rules.register(gmm, lax.ragged_dot)


def experts(p, x, sizes=SIZES):
    return jnp.tanh(gmm(x, p["w"], sizes, tiling=(8, 8, 8), interpret=True)) * 2.0


def rounded(w):
    return lax.round(w * 16.0) / 16.0


@jax.custom_vjp
def quantized_product(x, w):
    """A training product that rounds the kernel, whose derivative is that of the rounded one."""
    return x @ rounded(w)


quantized_product.defvjp(lambda x, w: (quantized_product(x, w), (x, w)), lambda r, t: (t @ rounded(r[1]).T, r[0].T @ t))


def test_grouped_kernel(lenient):
    equal_to_merged(experts, EXPERTS, (X,), lj.LoraConfig(rank=2, alpha=5))


def test_grouped_kernel_with_magnitudes(lenient):
    equal_to_merged(experts, EXPERTS, (X,), lj.LoraConfig(rank=2, alpha=5, dora=True))


def test_the_base_goes_through_the_kernel(lenient):
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), experts, EXPERTS, X)
    jaxpr = str(jax.make_jaxpr(lj.lora(experts))(lj.attach(EXPERTS, adapters), X))
    assert jaxpr.count("pallas_call") == 1
    assert jaxpr.count("ragged_dot_general[") == 2


def test_explain(lenient):
    [use] = lj.explain(experts, EXPERTS, X).parameters["w"].uses
    assert (use.kind, use.primitive, use.roles) == ("product", "ragged_dot_general", ("batch", "in", "out"))
    assert "test_kernels.py" in use.site and "(experts)" in use.site


def test_many(lenient):
    """Rows with sets of their own: each is the kernel with its own set."""
    fn = lambda p, x: experts(p, x[0])[None]
    sets = [{"w": lj.LowRank(normal(s, 2, 8, 2), normal(s + 1, 2, 2, 8), lj.Layout((0,), (1,), (2,)), 0.5)} for s in (1, 3)]
    rows = jnp.stack([X, X * 0.5, -X])
    got = lj.many.lora(fn)(EXPERTS, lj.many.stack(sets), jnp.array([1, -1, 0]), rows)
    one = lambda number, x: fn(lj.merge(EXPERTS, sets[number]) if number >= 0 else EXPERTS, x)
    assert distance(got, jnp.concatenate([one(n, x[None]) for n, x in zip((1, -1, 0), rows)])) < 1e-5


def test_rounded_product():
    """What adapters add to a product that rounds its kernel is not rounded."""
    lj.rules.register(quantized_product, lax.dot)
    fn = lambda p, x: jnp.tanh(quantized_product(x, p["w"]))
    base, pair = params(jnp.float32, w=(8, 6)), lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), lj.Layout((), (0,), (1,)), 0.5)
    got = jax.jit(lambda pair: lj.lora(fn)(lj.attach(base, {"w": pair}), X))(pair)
    assert distance(got, jnp.tanh(X @ rounded(base["w"]) + 0.5 * (X @ pair.a) @ pair.b)) < 1e-6


@jax.jit
def jitted_product(x, w):
    return quantized_product(x, w)


def test_a_jitted_function_by_its_name():
    """What `jit` calls is found before what is inside it."""
    lj.rules.register("jitted_product", lax.dot)
    base, pair = params(jnp.float32, w=(8, 6)), lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), lj.Layout((), (0,), (1,)), 0.5)
    got = lj.lora(lambda p, x: jitted_product(x, p["w"]))(lj.attach(base, {"w": pair}), X)
    assert distance(got, X @ rounded(base["w"]) + 0.5 * (X @ pair.a) @ pair.b) < 1e-6


def test_bad_rules():
    weights = params(jnp.float32, w=(8, 8))
    pair = {"w": lj.LowRank(normal(3, 8, 2), normal(4, 2, 8), lj.Layout((), (0,), (1,)), 0.5)}
    run = lambda: lj.lora(lambda p, x: quantized_product(x, p["w"]))(lj.attach(weights, pair), X)
    for rule, reason in (
        (lambda x, w: lax.dot(x, w) * 2.0, "quantized_product must return one product, as it is"),
        (lambda x, w: lax.dot(x * 2.0, w), "quantized_product must give the product the activation as it is"),
        (lambda x, w: lax.dot(x, w)[:, :3], r"quantized_product gives results of the shapes \[\(8, 3\)\], and .* \[\(8, 8\)\]"),
    ):
        lj.rules.register("quantized_product", rule)
        with pytest.raises(lj.InputError, match=reason):
            run()
    for wrong in (3, len):
        with pytest.raises(lj.InputError, match="function"):
            lj.rules.register(wrong, lax.dot)

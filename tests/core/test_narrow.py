"""Narrow products are those of JAX, with gradients for which a CPU's compiler transposes nothing wide."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.core.narrow import narrow_dot_general
from tests.support.frontends import normal

# x, the factor, and what is contracted and batched
CASES = {
    "x A": ((3, 5, 4), (4, 2), (((2,), (0,)), ((), ()))),
    "z B": ((3, 5, 2), (2, 4), (((2,), (0,)), ((), ()))),
    "several axes": ((3, 4, 7, 6), (6, 2, 4), (((3, 1), (0, 2)), ((), ()))),
    "experts": ((3, 2, 5, 4), (2, 4, 2), (((3,), (1,)), ((1,), (0,)))),
    "one token": ((4,), (4, 2), (((0,), (0,)), ((), ()))),
}


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    """Of every order and direction that JAX's product has, with x, the factor or both differentiated, and batched."""
    x_shape, shape, numbers = CASES[case]
    x, factor = normal(0, *x_shape), normal(1, *shape)
    weight = normal(2, *lax.dot_general(x, factor, numbers).shape)

    def modes(dot_general):
        loss = lambda x, f: jnp.sum(weight * jnp.sin(dot_general(x, f, numbers)))
        yield loss(x, factor)
        for argnums in (0, 1, (0, 1)):
            yield jax.grad(loss, argnums)(x, factor)
        yield jax.jvp(loss, (x, factor), (x + 1, factor - 1))
        yield jax.jvp(jax.grad(loss, (0, 1)), (x, factor), (x + 1, factor - 1))
        yield jax.grad(lambda x, f: jax.jvp(loss, (x, f), (x + 1, f - 1))[1], (0, 1))(x, factor)
        several = {0: jnp.stack([x, 2 * x, x - 1]), 1: jnp.stack([factor, factor - 2, 3 * factor], 1)}
        for x_axis, f_axis in ((0, None), (None, 1), (0, 1)):
            batch = (x if x_axis is None else several[0], factor if f_axis is None else several[1])
            yield jax.vmap(jax.grad(loss, (0, 1)), (x_axis, f_axis))(*batch)
            several_losses = jax.vmap(loss, (x_axis, f_axis))
            yield jax.vjp(several_losses, *batch)[1](jnp.ones(3))
            yield jax.jvp(several_losses, batch, jax.tree.map(jnp.cos, batch))

    for mine, theirs in zip(modes(narrow_dot_general), modes(lax.dot_general), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), mine, theirs)


def test_what_is_not_trained_is_not_multiplied():
    x, a = normal(0, 3, 4), normal(1, 4, 2)
    loss = lambda a, x: narrow_dot_general(x, a, (((1,), (0,)), ((), ()))).sum()
    for argnums, most in ((0, 2), (1, 2), ((0, 1), 3)):
        lowered = jax.jit(jax.value_and_grad(loss, argnums)).lower(a, x)
        assert lowered.as_text().count("stablehlo.dot_general") == most


def test_other_platforms_have_the_gradients_of_jax():
    """With the cotangent first, and a transpose that XLA moves into it."""
    z, b = normal(0, 3, 2), normal(1, 2, 4)
    gradient = lambda dot_general: jax.jit(jax.grad(lambda b, z: dot_general(z, b, (((1,), (0,)), ((), ()))).sum()))
    products = {}
    for platform in ("cpu", "tpu", "cuda"):
        for dot_general in (narrow_dot_general, lax.dot_general):
            text = jax.export.export(gradient(dot_general), platforms=[platform])(b, z).mlir_module()
            products[platform, dot_general] = re.findall(r"stablehlo\.dot_general .*", text)
    shapes = {key: [re.findall(r"tensor<[^>]*>", line) for line in lines] for key, lines in products.items()}
    assert shapes["cpu", narrow_dot_general] != shapes["cpu", lax.dot_general]
    for platform in ("tpu", "cuda"):
        assert shapes[platform, narrow_dot_general] == shapes[platform, lax.dot_general]


def test_dtypes():
    """A factor's gradient has its dtype, whatever the product is summed in."""
    x, a = normal(0, 3, 4, dtype=jnp.bfloat16), normal(1, 4, 2, dtype=jnp.bfloat16)
    dot_general = lambda x, a: narrow_dot_general(x, a, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    assert dot_general(x, a).dtype == jnp.float32
    assert jax.grad(lambda a: dot_general(x, a).sum())(a).dtype == jnp.bfloat16


@pytest.mark.parametrize("tokens,wide", [((32,), 64), ((3, 32), 64), ((3, 32), 384)])
def test_nothing_wide_is_transposed(tokens, wide):
    """Not x for A, nor the derivative of GELU for B."""

    def model(p, x):
        return jax.nn.gelu(x @ p["up"], approximate=False) @ p["down"]

    p, x = {"up": normal(0, 48, wide), "down": normal(1, wide, 48)}, normal(2, *tokens, 48)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model, p, x)
    loss = lambda a, x: (lj.lora(model)(lj.attach(p, a), x) ** 2).sum()
    text = jax.jit(jax.grad(loss)).lower(adapters, x).compile().as_text() or ""
    assert "dot(" in text
    assert not re.findall(rf"= f32\[(?:{wide}|48),(?:3,32|32|96)\]\S* (?:copy|transpose)\(", text)

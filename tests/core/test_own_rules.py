"""Functions with derivative rules of their own, around activations and constants: each equals merged weights."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.ode import odeint

import lora_jax as lj
from tests.support.frontends import normal, params
from tests.support.identity import distance, equal_to_merged, value_and_grads

X = normal(9, 5, 8)
SQUARE = params(jnp.float32, w=(8, 8))
PAIR = {"w": lj.LowRank(normal(3, 8, 2) / 3, normal(4, 2, 8) / 3, lj.Layout((), (0,), (1,)), 0.5)}

indexed = jax.custom_vjp(lambda x, t: jnp.sin(x) * t.sum())


def indexed_backward(residuals, out):
    """Indexes its constant, which a NumPy array would not take."""
    x, t = residuals
    total, _ = lax.scan(lambda c, i: (c + t[i] * jnp.cos(x) * out, None), jnp.zeros_like(x), jnp.arange(2))
    return total, jnp.zeros_like(t)


indexed.defvjp(lambda x, t: (indexed(x, t), (x, t)), indexed_backward)


def field(y, t, p):
    return jnp.tanh(y @ p["w"]) * (1.0 + t)


CONSTANTS = {
    "array": lambda p, x: indexed(x @ p["w"], jnp.array([2.0, 3.0])),
    "in_jit": lambda p, x: jax.jit(indexed)(x @ p["w"], jnp.array([2.0, 3.0])),
    "in_scan": lambda p, x: lax.scan(lambda x, _: (indexed(x @ p["w"], jnp.array([2.0, 3.0])), None), x, None, length=2)[0],
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name, lenient):
    equal_to_merged(CONSTANTS[name], SQUARE, (X,))


def test_materialized_in_an_ode(lenient):
    """The times are a constant of the function, and the whole kernel goes through the solver's rule."""
    fn = lambda p, x: odeint(field, x, jnp.array([0.0, 0.5]), p)[-1]
    ours = value_and_grads(lambda a: lj.lora(fn, on_unsupported="materialize")(lj.attach(SQUARE, a), X), PAIR)
    assert distance(ours, value_and_grads(lambda a: fn(lj.merge(SQUARE, a), X), PAIR)) < 1e-4


def test_low_rank_in_an_ode(lenient):
    """The better way: the vector field is adapted, and the adapters are its argument."""
    adapted = lj.lora(lambda p, y, t: field(y, t, p))

    def solve(adapters):
        return odeint(lambda y, t, a: adapted(lj.attach(SQUARE, a), y, t), X, jnp.array([0.0, 0.5]), adapters)[-1]

    want = lambda a: odeint(field, X, jnp.array([0.0, 0.5]), lj.merge(SQUARE, a))[-1]
    assert distance(value_and_grads(solve, PAIR), value_and_grads(want, PAIR)) < 1e-4


def test_the_error_names_the_better_way():
    fn = lambda p, x: odeint(field, x, jnp.array([0.0, 0.5]), p)[-1]
    with pytest.raises(lj.NotLowRankError, match="call `lora` inside it, on the function that it differentiates"):
        lj.lora(fn)(lj.attach(SQUARE, PAIR), X)

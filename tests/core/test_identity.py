"""The contract: `lora(fn)(attach(p, a), x) == fn(merge(p, a), x)`, in value and gradient, for every frontend."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.support.frontends import FRONTENDS
from tests.support.identity import BF16, F32, F64, distance, prepare, settings, value_and_grads
from tests.support.marks import slow_unless


def batched(case, adapters):
    """The case under vmap: inputs of two rows, and two models where JAX can't share one."""
    twice = lambda x: jnp.stack([x, x[::-1]]) if x.ndim else jnp.stack([x, x])
    double = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    args = tuple(map(twice, case.args))
    return (case.variables, adapters, *args) if case.shared else (double(case.variables), double(adapters), *args)


WRAPPERS = {
    "jit": lambda fn, shared: fn,
    "remat": lambda fn, shared: jax.checkpoint(fn),
    "vmap": lambda fn, shared: (
        lambda v, a, *args: jax.vmap(fn, in_axes=(*(None if shared else 0,) * 2, *(0 for _ in args)))(v, a, *args)
    ),
}


# Transformations around `lora` see only the jaxpr that it leaves: one frontend of each kind of rule stands for the rest.
REPRESENTATIVE = ("linen_scan_remat", "conv_2d", "experts_ragged", "moved_about", "control_flow")
CASES = [(name, "jit", F64, 1e-10) for name in FRONTENDS] + [
    pytest.param(name, wrapper, F32, 1e-5, marks=[] if name in REPRESENTATIVE else pytest.mark.slow)
    for wrapper in ("remat", "vmap")
    for name in FRONTENDS
]


@pytest.mark.parametrize(("name", "wrapper", "dtype", "bound"), CASES)
def test_equals_merged_weights(name, wrapper, dtype, bound):
    with settings(name, dtype):
        case, adapters = prepare(name, dtype)
        variables, adapters, *args = batched(case, adapters) if wrapper == "vmap" else (case.variables, adapters, *case.args)
        wrap = lambda fn: WRAPPERS[wrapper](fn, case.shared)
        ours = wrap(lambda v, a, *args: lj.lora(case.fn)(lj.attach(v, a), *args))
        oracle = wrap(lambda v, a, *args: case.fn(lj.merge(v, a), *args))
        run = lambda fn: jax.jit(lambda v, a, *args: value_and_grads(functools.partial(fn, v), a, *args))(
            variables, adapters, *args
        )
        assert distance(run(ours), run(oracle)) < bound


# One of each kind of product: the others differ in how the weight is moved, which takes no dtype.
BFLOAT16 = ("plain_function", "linen_attention", "linen_scan_remat", "linen_tied_embedding", "conv_2d", "experts_ragged")


@pytest.mark.parametrize("name", slow_unless(lambda name: name in BFLOAT16, FRONTENDS))
def test_bfloat16_is_near_float32(name):
    with settings(name, BF16):
        case, adapters = prepare(name, BF16)
        exact, _ = prepare(name, F32)
        float_args = tuple(a.astype(F32) if a.dtype == BF16 else a for a in case.args)
        base = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(F32)), case.variables)
        got = jax.jit(lj.lora(case.fn))(lj.attach(case.variables, adapters), *case.args)
        want = jax.jit(exact.fn)(lj.merge(base, adapters), *float_args)
        plain = jax.eval_shape(case.fn, case.variables, *case.args)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(plain)]
    assert distance(jax.tree.map(lambda x: np.asarray(x).astype(F32), got), want) < 2e-2

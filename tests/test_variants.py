"""Adapters with a magnitude (DoRA) or a bias, against merged weights, for every frontend."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.dora import column_norm
from tests.frontends import FRONTENDS
from tests.test_identity import F64, distance, prepare, settings, value_and_grads


def with_magnitudes(case, adapters):
    """DoRA's magnitudes beside each pair: the norm of each output, moved as training would."""
    leaves, _ = lj.paths.flatten(case.variables)
    moved = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, lj.LowRank):
            norm = column_norm(leaves[path], dataclasses.replace(adapter, b=jnp.zeros_like(adapter.b)))
            wave = 1 + jnp.cos(jnp.arange(norm.size, dtype=norm.dtype)).reshape(norm.shape) / 5
            adapter = dataclasses.replace(adapter, magnitude=norm * wave)
        moved[path] = adapter
    return moved


def compared(case, adapters):
    """The distances of outputs and gradients of `lora(fn)` from those of the merged weights."""
    low_rank = lambda a, *args: lj.lora(case.fn)(lj.attach(case.variables, a), *args)
    merged = lambda a, *args: case.fn(lj.merge(case.variables, a), *args)
    got = jax.jit(lambda a: value_and_grads(low_rank, a, *case.args))(adapters)
    want = jax.jit(lambda a: value_and_grads(merged, a, *case.args))(adapters)
    return distance(got[0], want[0]), distance(got[1], want[1])


@pytest.mark.parametrize("name", FRONTENDS)
def test_magnitudes_equal_merged_weights(name):
    with settings(name, F64):
        case, adapters = prepare(name, F64)
        assert max(compared(case, with_magnitudes(case, adapters))) < 1e-10

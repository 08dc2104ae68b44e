"""AB is never formed, and no frozen leaf gets a gradient: read off the jaxprs of every frontend."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.core.test_identity import prepare, settings
from tests.support.dataflow import dependents
from tests.support.frontends import FRONTENDS

F32 = jnp.float32


def _sizes(shape):
    return tuple(sorted(size for size in shape if size != 1))


def _forbidden(case, adapters):
    """The sizes of each adapted parameter and of one matrix of its stack, in any order."""
    leaves, _ = lj.paths.flatten(case.variables)
    for path, adapter in adapters.items():
        shape = leaves[path].shape
        yield _sizes(shape)
        yield _sizes(size for axis, size in enumerate(shape) if axis not in adapter.layout.batch)


def _loss(case):
    apply = lj.lora(case.fn)
    return lambda params, *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(apply(params, *args)))


def _labels_in_order(params):
    return [label == "adapter" for label in jax.tree.leaves(lj.labels(params))]


@pytest.mark.parametrize("name", FRONTENDS)
def test_nothing_of_the_kernels_shape_depends_on_the_adapters(name):
    with settings(name, F32):
        case, adapters = prepare(name, F32)
        params = lj.attach(case.variables, adapters)
        forward = jax.make_jaxpr(_loss(case))(params, *case.args)
        backward = jax.make_jaxpr(jax.grad(_loss(case)))(params, *case.args)
    forbidden, found = set(_forbidden(case, adapters)), []

    def see(eqn, aval):
        if _sizes(getattr(aval, "shape", ())) in forbidden:
            found.append(f"{eqn.primitive.name} -> {aval}")

    inputs = [*_labels_in_order(params), *(False for _ in case.args)]
    for jaxpr in (forward, backward):
        dependents(jaxpr, inputs, see)
    assert found == []


@pytest.mark.parametrize("name", FRONTENDS)
def test_frozen_leaves_get_no_gradient(name):
    with settings(name, F32):
        case, adapters = prepare(name, F32)
        params = lj.attach(case.variables, adapters)
        jaxpr = jax.make_jaxpr(jax.grad(_loss(case)))(params, *case.args)
    depends = dependents(jaxpr, [True] * len(jaxpr.jaxpr.invars), lambda eqn, aval: None)
    assert depends == _labels_in_order(params)


def test_the_check_sees_a_materialised_product():
    """The test above can fail: forming W + AB is found."""
    case, adapters = prepare("plain_function", F32)
    naive = jax.make_jaxpr(lambda a, x: case.fn(lj.merge(case.variables, a), x))(adapters, *case.args)
    seen = []
    dependents(naive, [True] * 4 + [False], lambda eqn, aval: seen.append(_sizes(aval.shape)))
    assert set(_forbidden(case, adapters)) <= set(seen)

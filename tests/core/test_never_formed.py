"""AB is never formed, and no frozen leaf gets a gradient: read off the jaxprs of every frontend."""

import jax
import pytest

import lora_jax as lj
from tests.support.dataflow import dependents
from tests.support.frontends import FRONTENDS
from tests.support.identity import F32, prepare, settings
from tests.support.never_formed import formed, kernel_sizes, labels_in_order, loss, sizes


@pytest.mark.parametrize("name", FRONTENDS)
def test_nothing_of_the_kernels_shape_depends_on_the_adapters(name):
    with settings(name, F32):
        case, adapters = prepare(name, F32)
        assert formed(case, adapters) == []


@pytest.mark.parametrize("name", FRONTENDS)
def test_frozen_leaves_get_no_gradient(name):
    with settings(name, F32):
        case, adapters = prepare(name, F32)
        params = lj.attach(case.variables, adapters)
        jaxpr = jax.make_jaxpr(jax.grad(loss(case)))(params, *case.args)
    depends = dependents(jaxpr, [True] * len(jaxpr.jaxpr.invars), lambda eqn, aval: None)
    assert depends == labels_in_order(params)


def test_the_check_sees_a_materialised_product():
    """The test above can fail: forming W + AB is found."""
    case, adapters = prepare("plain_function", F32)
    naive = jax.make_jaxpr(lambda a, x: case.fn(lj.merge(case.variables, a), x))(adapters, *case.args)
    seen = []
    dependents(naive, [True] * 4 + [False], lambda eqn, aval: seen.append(sizes(aval.shape)))
    assert set(kernel_sizes(case, adapters)) <= set(seen)

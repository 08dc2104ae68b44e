"""Whether a program forms W + AB: the values of a kernel's shape that depend on the adapters, in its jaxprs."""

import jax
import jax.numpy as jnp

import lora_jax as lj
from tests.support.dataflow import dependents


def sizes(shape):
    return tuple(sorted(size for size in shape if size != 1))


def kernel_sizes(case, adapters):
    """The sizes of each adapted parameter and of one matrix of its stack, in any order."""
    leaves, _ = lj.paths.flatten(case.variables)
    for path, adapter in adapters.items():
        shape = leaves[path].shape
        yield sizes(shape)
        yield sizes(size for axis, size in enumerate(shape) if axis not in adapter.layout.batch)


def loss(case):
    apply = lj.lora(case.fn)
    return lambda params, *args: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(apply(params, *args)))


def labels_in_order(params):
    return [label == "adapter" for label in jax.tree.leaves(lj.labels(params))]


def formed(case, adapters):
    """What has the sizes of a kernel and depends on the adapters, forward and backward."""
    params = lj.attach(case.variables, adapters)
    forbidden, found = set(kernel_sizes(case, adapters)), []

    def see(eqn, aval):
        if sizes(getattr(aval, "shape", ())) in forbidden:
            found.append(f"{eqn.primitive.name} -> {aval}")

    for fn in (loss(case), jax.grad(loss(case))):
        dependents(jax.make_jaxpr(fn)(params, *case.args), [*labels_in_order(params), *(False for _ in case.args)], see)
    return found

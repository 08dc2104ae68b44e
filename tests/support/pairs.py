"""Low-rank pairs of every layout, and a change as the matrices that it is."""

import numpy as np

import lora_jax as lj
from tests.support.frontends import normal

LAYOUTS = {
    "dense": ((6, 5), lj.Layout((), (0,), (1,))),
    "heads": ((6, 2, 3), lj.Layout((), (0,), (1, 2))),
    "transposed": ((5, 6), lj.Layout((), (1,), (0,))),
    "stacked": ((3, 6, 5), lj.Layout((0,), (1,), (2,))),
    "experts": ((2, 6, 3, 5), lj.Layout((0, 2), (1,), (3,))),
    "conv": ((2, 2, 3, 5), lj.Layout((), (0, 1, 2), (3,))),
}


def pair(name, seed=0, rank=3, scale=0.7, **options):
    shape, layout = LAYOUTS[name]
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    return lj.LowRank(normal(2 * seed, *a_shape), normal(2 * seed + 1, *b_shape), layout, scale, **options)


def matrices(change, layout):
    """A change as `(count, in, out)`."""
    order = (*layout.batch, *layout.inputs, *layout.outputs)
    sizes = [int(np.prod([change.shape[i] for i in axes], dtype=int)) for axes in (layout.batch, layout.inputs, layout.outputs)]
    return np.asarray(change, np.float64).transpose(order).reshape(sizes)

"""On a mesh with explicit axes the result of `lora(fn)` has the type of `fn`'s own, and the values of the merged weights."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, reshard

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.identity import distance
from tests.support.marks import slow_unless

P, MATRIX, STACK = jax.P, lj.Layout((), (0,), (1,)), lj.Layout((0,), (1,), (2,))
CONV = lj.Layout((), (0, 1, 2), (3,))
IMAGES = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
layer = lambda x, w: (jnp.tanh(jnp.einsum("bi,io->bo", x, w, out_sharding=P("d", None))), None)

# The kernel's shape, spec and layout, x's shape and spec, and the function.
CASES = {
    "gathered": ((8, 16), P(None, "m"), MATRIX, (4, 8), P("d", None), lambda w, x: jnp.einsum(
        "bi,io->bo", x, w, out_sharding=P("d", None))),
    "kernel_first": ((8, 16), P(None, "m"), MATRIX, (4, 8), P("d", None), lambda w, x: jnp.einsum(
        "io,bi->ob", w, x, out_sharding=P(None, "d"))),
    "scattered": ((8, 16), P("m", None), MATRIX, (4, 8), P("d", "m"), lambda w, x: jnp.einsum(
        "bi,io->bo", x, w, out_sharding=P("d", "m"))),
    "resharded": ((8, 16), P("d", "m"), MATRIX, (4, 8), P("d", None), lambda w, x: jnp.einsum(
        "bi,io->bo", x, reshard(w, P(None, "m")), out_sharding=P("d", "m"))),
    "scaled": ((8, 16), P(None, "m"), MATRIX, (4, 8), P("d", None), lambda w, x: jnp.einsum(
        "bi,io->bo", x, w * jnp.arange(16.0)[None], out_sharding=P("d", None))),
    "batched": ((4, 8, 16), P(None, None, "m"), STACK, (4, 6, 8), P("d", None, None), lambda w, x: lax.dot_general(
        x, w, (((2,), (1,)), ((0,), (0,))), out_sharding=P("d", None, None))),
    "scan": ((3, 8, 8), P(None, None, "m"), STACK, (4, 8), P("d", None), lambda w, x: lax.scan(layer, x, w)[0]),
    "convolution": ((3, 3, 8, 16), P(None, None, None, "m"), CONV, (4, 5, 5, 8), P("d", None, None, None),
                    lambda w, x: lax.conv_general_dilated(x, w, **IMAGES, out_sharding=P("d", None, None, "m"))),
    "grouped_convolution": ((3, 3, 4, 16), P(), CONV, (4, 5, 5, 8), P("d", None, None, None),
                            lambda w, x: lax.conv_general_dilated(
                                x, w, **IMAGES, feature_group_count=2, out_sharding=P("d", None, None, None))),
    "grouped_rows": ((2, 8, 16), P(None, None, "m"), STACK, (4, 8), P(None, None), lambda w, x: lax.ragged_dot(
        x, w, jnp.array([1, 3]), out_sharding=P(None, "m"))),
    "lookup": ((16, 8), P(None, "m"), MATRIX, (4,), P("d"), lambda w, x: w.at[jnp.abs(x).astype(int)].get(
        out_sharding=P("d", "m"))),
}  # fmt: skip
DIFFERENTIATED = ("gathered", "convolution", "lookup")


FAST = [("gathered", True), *((name, False) for name in ("resharded", "scan", "convolution", "grouped_rows", "lookup"))]


@pytest.mark.parametrize(("name", "dora"), slow_unless(FAST.__contains__, itertools.product(CASES, (False, True))))
def test_a_branch_lies_as_its_product_does(name, dora):
    shape, spec, layout, x_shape, x_spec, fn = CASES[name]
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    pair = lj.LowRank(*(normal(i, *s) for i, s in enumerate(layout.factor_shapes(shape, 2))), layout, 0.5)
    if dora:
        out = tuple(shape[axis] for axis in (*layout.batch, *layout.outputs))
        pair = dataclasses.replace(pair, magnitude=2 + jnp.cos(jnp.arange(float(np.prod(out)))).reshape(out))
    w, model = normal(3, *shape), lambda p, x: fn(p["w"], x)
    merged = lj.merge({"w": w}, {"w": pair})["w"]
    with jax.set_mesh(mesh):
        x, w, merged = jax.device_put((normal(4, *x_shape), w, merged), (x_spec, spec, spec))
        adapters = jax.device_put({"w": pair}, lj.sharding.adapter_shardings({"w": w}, {"w": pair}))
        apply = lambda a: lj.lora(model)(lj.attach({"w": w}, a), x)
        got, want = jax.jit(apply)(adapters), jax.jit(fn)(merged, x)
        if name in DIFFERENTIATED:
            grads = jax.jit(jax.grad(lambda a: (apply(a) ** 2).sum()))(adapters)
            assert list(map(jax.typeof, jax.tree.leaves(grads))) == list(map(jax.typeof, jax.tree.leaves(adapters)))
    assert jax.typeof(got) == jax.typeof(want)
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("dora", [False, True])
def test_the_mesh_is_that_of_the_arrays(dora):
    """Without `jax.set_mesh`, eagerly and in `jit`."""
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    put = lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec))
    w, x = {"w": put(normal(3, 8, 16), P(None, "m"))}, put(normal(4, 4, 8), P("d", None))
    fn = lambda p, x: jnp.tanh(x @ p["w"])
    config = lj.LoraConfig(rank=2, init="orthogonal", dora=dora)
    adapters = jax.tree.map(lambda leaf: leaf * 1.5, lj.init(jax.random.key(0), config, fn, w, x))
    tree, want = lj.attach(w, adapters), fn(lj.merge(w, adapters), x)
    for apply in (lj.lora(fn), jax.jit(lj.lora(fn))):
        got = apply(tree, x)
        assert got.sharding.spec == want.sharding.spec == P("d", "m")
        assert distance(got, want) < 1e-5

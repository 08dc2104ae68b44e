"""The contract's parts: a frontend with random adapters, its values and gradients, and how far two results lie apart."""

import contextlib
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from tests.support.frontends import FRONTENDS

F32, F64, BF16 = jnp.float32, jnp.float64, jnp.bfloat16


def random_adapters(adapters, dtype):
    """Every trained leaf (shapes will do) moved off its start, as training would; padded ranks stay zero.

    NumPy draws, since JAX would compile a program for every shape.
    """

    def move(path, leaf):
        draw = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        return jnp.asarray(0.3 * draw.normal(size=leaf.shape), dtype)

    moved = jax.tree_util.tree_map_with_path(move, adapters)
    for path, adapter in adapters.items():
        if getattr(adapter, "ranks", None) is not None:
            on = np.array([r > 0 for r in adapter.ranks])
            mask = lambda x, on=on: jnp.asarray(np.asarray(x) * on.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype))
            moved[path] = jax.tree.map(mask, moved[path])
    return moved


def _distance(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    wide = np.float64 if want.dtype == np.float64 else np.float32
    norm = lambda x: np.linalg.norm(x.astype(wide).ravel())
    return float(norm(got.astype(want.dtype) - want) / (norm(want) + 1e-30))


def distance(got, want):
    """The largest normwise relative distance over the leaves."""
    return max(_distance(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@contextlib.contextmanager
def settings(case_name, dtype):
    with contextlib.ExitStack() as stack:
        if dtype == F64:
            stack.enter_context(jax.enable_x64(True))
        if case_name.startswith(("flax_", "linen_", "nnx_")):  # their own layers promote dtypes and ranks
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield


@functools.cache
def prepare(name, dtype):
    """A frontend and random adapters for it; under `settings`."""
    case = FRONTENDS[name](dtype)
    init = lambda variables: lj.init(jax.random.key(0), case.config, case.fn, variables, *case.args)
    return case, random_adapters(jax.eval_shape(init, case.variables), F64 if dtype == F64 else F32)


def value_and_grads(fn, adapters, *args):
    """The outputs, and the gradient of a projection of them with respect to the adapters."""

    def loss(adapters):
        out = fn(adapters, *args)
        project = lambda leaf: jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape))
        return sum(map(project, jax.tree.leaves(out))), out

    grads, out = jax.grad(loss, has_aux=True)(adapters)
    return out, grads


def equal_to_merged(fn, variables, args, config=None):
    """Assert the identity on random adapters, and return those."""
    config = config or lj.LoraConfig(rank=2, alpha=5, targets=list(variables))
    init = lambda variables: lj.init(jax.random.key(0), config, fn, variables, *args)
    adapters = random_adapters(jax.eval_shape(init, variables), F32)
    run = lambda f: jax.jit(lambda a: value_and_grads(f, a, *args))(adapters)
    ours = run(lambda a, *args: lj.lora(fn)(lj.attach(variables, a), *args))
    assert distance(ours, run(lambda a, *args: fn(lj.merge(variables, a), *args))) < 1e-5
    return adapters

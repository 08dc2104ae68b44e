"""The contract: `lora(fn)(attach(p, a), x) == fn(merge(p, a), x)`, in value and gradient, for every frontend."""

import contextlib
import functools
import zlib

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.support.frontends import FRONTENDS

F32, F64, BF16 = jnp.float32, jnp.float64, jnp.bfloat16


def random_adapters(adapters, dtype):
    """Every trained leaf moved off its start, as training would; padded ranks stay zero."""

    def move(path, leaf):
        key = jax.random.fold_in(jax.random.key(5), zlib.crc32(jax.tree_util.keystr(path).encode()) % 2**31)
        return (0.3 * jax.random.normal(key, leaf.shape)).astype(dtype)

    moved = jax.tree_util.tree_map_with_path(move, adapters)
    for path, adapter in adapters.items():
        if getattr(adapter, "ranks", None) is not None:
            on = jnp.array([r > 0 for r in adapter.ranks])
            mask = lambda x, on=on: jnp.where(on.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
            moved[path] = jax.tree.map(mask, moved[path])
    return moved


def distance(got, want):
    """The largest normwise relative distance over the leaves."""
    norm = lambda x: jnp.linalg.norm(x.astype(F64 if x.dtype == F64 else F32).reshape(-1))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return max(float(norm(g.astype(w.dtype) - w) / (norm(w) + 1e-30)) for g, w in pairs)


@contextlib.contextmanager
def settings(case_name, dtype):
    with contextlib.ExitStack() as stack:
        if dtype == F64:
            stack.enter_context(jax.enable_x64(True))
        if case_name.startswith(("flax_", "linen_", "nnx_")):  # their own layers promote dtypes and ranks
            stack.enter_context(jax.numpy_dtype_promotion("standard"))
            stack.enter_context(jax.numpy_rank_promotion("allow"))
        yield


def prepare(name, dtype):
    case = FRONTENDS[name](dtype)
    adapters = lj.init(jax.random.key(0), case.config, case.fn, case.variables, *case.args)
    return case, random_adapters(adapters, F64 if dtype == F64 else F32)


def value_and_grads(fn, adapters, *args):
    """The outputs, and the gradient of a projection of them with respect to the adapters."""

    def loss(adapters):
        out = fn(adapters, *args)
        project = lambda leaf: jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape))
        return sum(map(project, jax.tree.leaves(out))), out

    grads, out = jax.grad(loss, has_aux=True)(adapters)
    return out, grads


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


@pytest.mark.parametrize("dtype,wrapper,bound", [(F64, "jit", 1e-10), (F32, "jit", 1e-5), (F32, "remat", 1e-5), (F32, "vmap", 1e-5)])  # fmt: skip
@pytest.mark.parametrize("name", FRONTENDS)
def test_equals_merged_weights(name, dtype, wrapper, bound):
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


@pytest.mark.parametrize("name", FRONTENDS)
def test_bfloat16_is_near_float32(name):
    with settings(name, BF16):
        case, adapters = prepare(name, BF16)
        exact, _ = prepare(name, F32)
        float_args = tuple(a.astype(F32) if a.dtype == BF16 else a for a in case.args)
        base = jax.tree.map(lambda x: x.astype(F32), case.variables)
        got = jax.jit(lj.lora(case.fn))(lj.attach(case.variables, adapters), *case.args)
        want = jax.jit(exact.fn)(lj.merge(base, adapters), *float_args)
        plain = jax.eval_shape(case.fn, case.variables, *case.args)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(plain)]
    assert distance(jax.tree.map(lambda x: x.astype(F32), got), want) < 2e-2

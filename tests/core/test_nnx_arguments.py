"""NNX objects among the arguments: what the call changes in them it changes in the caller's, as the plain call does."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.errors import TraceContextError

import lora_jax as lj
from tests.support.frontends import normal, params
from tests.support.identity import distance

X = normal(9, 2, 8)
VARIABLES = params(jnp.float32, w=(8, 8))
TREE = lj.attach(VARIABLES, {"w": lj.LowRank(normal(3, 8, 2), normal(4, 2, 8), lj.Layout((), (0,), (1,)), 0.5)})
MERGED = lj.merge(*lj.detach(TREE))


class Cache(nnx.Module):
    def __init__(self):
        self.keys = nnx.Cache(jnp.zeros((4, 2, 8)))
        self.end = nnx.Cache(jnp.array(0))
        self.calls = 0


def step(p, x, cache):
    cache.keys[...] = cache.keys[...].at[cache.end[...]].set(x @ p["w"])
    cache.end[...] += 1
    cache.calls += 1
    return jnp.tanh(cache.keys[...].sum(0))


def test_a_cache_goes_on_as_in_the_plain_call():
    ours, plain = Cache(), Cache()
    keys = ours.keys
    for _ in range(3):
        assert distance(lj.lora(step)(TREE, X, ours), step(MERGED, X, plain)) < 1e-5
    assert distance(nnx.state(ours), nnx.state(plain)) < 1e-5
    assert (int(ours.end[...]), ours.calls, ours.keys is keys) == (3, 3, True)


def test_in_jit_the_copy_of_the_program_changes():
    """`jax.jit` itself gives a function copies."""
    cache = Cache()
    ours = jax.jit(lj.lora(step))(TREE, X, cache)
    assert distance(ours, jax.jit(step)(MERGED, X, Cache())) < 1e-5
    assert int(cache.end[...]) == cache.calls == 0


def test_a_decoder_in_jit_that_returns_its_cache():
    graph, state = nnx.split(Cache())

    def decode(p, x, state):
        cache = nnx.merge(graph, state)
        return step(p, x, cache), nnx.state(cache)

    ours, plain = jax.jit(lj.lora(decode)), jax.jit(decode)
    state, want = (function(tree, X, state)[1] for function, tree in ((ours, TREE), (plain, MERGED)))
    assert distance(ours(TREE, X, state), plain(MERGED, X, want)) < 1e-5


def test_init_and_explain_leave_it_as_it_is():
    cache = Cache()
    assert lj.explain(step, VARIABLES, X, cache).parameters["w"].kind == "linear"
    assert list(lj.init(jax.random.key(0), lj.LoraConfig(rank=2), step, VARIABLES, X, cache)) == ["w"]
    assert int(cache.end[...]) == cache.calls == 0


def test_shared_new_and_nested():
    """One object in two places, a variable that the call makes, a keyword, and a random stream."""

    def fn(p, x, both, *, rngs):
        both["one"][0].end[...] += 2
        both["two"].made = nnx.Intermediate(x @ p["w"])
        return both["two"].end[...] + jax.random.normal(rngs(), (2,)).sum() + (x @ p["w"]).sum()

    def run(function, tree):
        cache, rngs = Cache(), nnx.Rngs(0)
        outs = [function(tree, X, {"one": [cache], "two": cache}, rngs=rngs) for _ in range(2)]
        return outs, cache.made[...], cache.end[...], rngs.default.count[...]

    assert distance(run(lj.lora(fn), TREE), run(fn, MERGED)) < 1e-5


def test_an_object_of_another_trace():
    """It can be read, and NNX's own error says that it can't be changed; then it is whole."""
    cache = Cache()
    read = lambda p, x, cache: (x @ p["w"] + cache.keys[...][0]).sum()
    assert distance(jax.grad(lambda x: lj.lora(read)(TREE, x, cache))(X), jax.grad(lambda x: read(MERGED, x, cache))(X)) < 1e-5
    with pytest.raises(TraceContextError, match="Cannot mutate"):
        jax.grad(lambda x: lj.lora(step)(TREE, x, cache).sum())(X)
    assert (cache.calls, cache.keys.shape) == (0, (4, 2, 8))

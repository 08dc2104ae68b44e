"""`lora(fn)` outside of `jit`: calls and loops inside `fn` compile once, and all else runs as it does in `fn` itself."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax as lj
from lora_jax.core import jax_compat
from tests.support.frontends import normal, params
from tests.support.identity import distance

X = normal(9, 5, 8)
STACK, LAYERS = params(jnp.float32, w=(3, 8, 8)), params(jnp.float32, one=(8, 8), two=(8, 8), three=(8, 8))


def layer(x, w):
    return jnp.tanh(x @ w), None


def halved(state):
    return state[0] + 1, jnp.tanh(state[1] @ state[2]), state[2]


few = lambda state: state[0] < 2
same, product = lambda x, w: x, lambda x, w: x @ w
one_layer = jax.jit(lambda x, w: layer(x, w)[0])
kept = jax.checkpoint(lambda x, w: jnp.tanh(x @ w))


def jitted(p, x):
    return functools.reduce(one_layer, p.values(), x)


FUNCTIONS = {
    "jit": (LAYERS, jitted),
    "jit_around_all": (LAYERS, jax.jit(jitted)),
    "scan": (STACK, lambda p, x: lax.scan(layer, x, p["w"])[0]),
    "while": (LAYERS, lambda p, x: lax.while_loop(few, halved, (0, x, p["one"]))[1] @ p["two"] @ p["three"]),
    "cond": (LAYERS, lambda p, x: lax.cond(x[0, 0] < 9, product, same, x, p["one"]) @ p["two"] @ p["three"]),
    "remat": (LAYERS, lambda p, x: functools.reduce(kept, p.values(), x)),
}


def adapted(fn, variables):
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, init="orthogonal"), fn, variables, X)
    return jax.tree.map(lambda leaf: leaf + 0.1, adapters)


class Compilations:
    """How many programs JAX has compiled."""

    def __enter__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._count)

    def _count(self, name, duration, **_):
        self.count += name == "/jax/core/compile/backend_compile_duration"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_call_compiles_nothing(name):
    variables, fn = FUNCTIONS[name]
    first, second = adapted(fn, variables), jax.tree.map(jnp.cos, adapted(fn, variables))
    lj.lora(fn)(lj.attach(variables, first), X)
    with Compilations() as compilations:
        got = lj.lora(fn)(lj.attach(variables, second), X)
    assert compilations.count == 0
    assert distance(got, fn(lj.merge(variables, second), X)) < 1e-5


def test_parameters_of_one_kind_share_a_program():
    """Three layers call one function: it is compiled once, as JAX compiles it."""

    @jax.jit
    def fresh(x, w):
        return jnp.tanh(x @ w)

    adapters = adapted(jitted, LAYERS)
    tree = lj.attach(LAYERS, adapters)
    run = lambda: lj.lora(lambda p, x: functools.reduce(fresh, p.values(), x))(tree, X)
    lj.lora(jitted)(tree, X)  # compiles what is beside the layers
    with Compilations() as compilations:
        run()
    assert compilations.count == 1
    with pytest.raises(lj.InputError, match="does not use these adapted parameters: three"):
        lj.lora(lambda p, x: fresh(fresh(x, p["one"]), p["two"]))(tree, X)


def test_errors_name_the_parameter_that_meets_them():
    fn = jax.jit(lambda p, x: x @ p["one"] @ (p["two"] * jnp.tri(8)))
    with pytest.raises(lj.NotLowRankError, match=r"^two \(shape \(8, 8\)\) cannot stay low-rank in `mul` at .*test_programs"):
        lj.lora(fn)(lj.attach(LAYERS, {"two": adapted(jitted, LAYERS)["two"]}), X)


def test_what_a_call_changes_outside_of_jit_is_seen():
    """`fn` itself runs at each call: only what JAX caches is cached."""
    state = {"scale": 1.0, "calls": 0}

    def fn(p, x):
        state["calls"] += 1
        return jitted(p, x) * state["scale"]

    tree = lj.attach(LAYERS, adapted(jitted, LAYERS))
    once = lj.lora(fn)(tree, X)
    state["scale"] = 3.0
    assert distance(lj.lora(fn)(tree, X), once * 3.0) < 1e-6
    assert state["calls"] == 2


def test_a_closure_over_a_tracer():
    """Two traces of one function, each with a value of its own that the inner function closes over."""
    tree = lj.attach(LAYERS, adapted(jitted, LAYERS))
    inner = lambda scale: lj.lora(jax.jit(lambda p, x: jitted(p, x) * scale))(tree, X)
    assert distance(jax.vmap(inner)(jnp.array([1.0, 2.0])), jnp.stack([inner(1.0), inner(1.0) * 2.0])) < 1e-6
    assert distance(jax.jit(inner)(3.0), inner(1.0) * 3.0) < 1e-6


def test_a_program_dies_with_its_function():
    big = jnp.ones((8, 8))

    def make():
        function = jax.jit(lambda p, x: jitted(p, x) @ big)
        lj.lora(function)(lj.attach(LAYERS, adapted(jitted, LAYERS)), X)
        body = jax.make_jaxpr(function)(LAYERS, X).eqns[0].params["jaxpr"]
        return weakref.ref(function), weakref.ref(body)

    function, body = make()
    gc.collect()
    assert function() is None and body() is None


def test_jit_keeps_its_name_and_what_it_donates():
    @functools.partial(jax.jit, donate_argnums=1)
    def decode_step(p, cache, x):
        return cache + x @ p["one"]

    tree = lj.attach(LAYERS, {"one": adapted(jitted, LAYERS)["one"]})
    eqns = jax_compat.open_jaxpr(jax.make_jaxpr(lj.lora(decode_step))(tree, X, X))[0].eqns
    assert [eqn.params["name"] for eqn in eqns if "name" in eqn.params] == ["decode_step"]
    cache = jnp.zeros((5, 8))
    lj.lora(decode_step)(tree, cache, X)
    assert cache.is_deleted() and not tree["one"].base.is_deleted()


def test_effects_without_results_stay_apart(capfd):
    """Two prints of one number, in a function with dead code."""

    def fn(p, x):
        y = x @ p["one"]
        total = y.sum()
        jax.debug.print("first {}", total)
        jax.debug.print("second {}", total)
        return y

    lj.lora(fn)(lj.attach(LAYERS, {"one": adapted(jitted, LAYERS)["one"]}), X)
    jax.effects_barrier()
    assert sorted(line.split()[0] for line in capfd.readouterr().out.splitlines()) == ["first", "second"]


def test_each_call_has_a_mask_of_its_own():
    """One function, called twice on one parameter: dropout draws two masks, in and out of `jit` the same."""
    fn = lambda p, x: (one_layer(x, p["one"]), one_layer(x, p["one"]))
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, dropout=0.5, targets=["one"]), fn, LAYERS, X)
    tree = lj.attach(LAYERS, jax.tree.map(lambda leaf: leaf + 0.3, adapters))
    run = lambda tree: lj.lora(fn, key=jax.random.key(7))(tree, X)
    first, second = run(tree)
    assert distance(first, second) > 1e-3
    assert distance(run(tree), (first, second)) == 0.0
    assert distance(jax.jit(run)(tree), (first, second)) < 1e-6

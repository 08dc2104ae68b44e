"""`lora(fn)` under JAX's transformations, and with whatever sits in a parameter tree or comes out of a function."""

import dataclasses
import functools
import re

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import lora_jax as lj
from tests.support.frontends import normal, params
from tests.support.identity import distance, random_adapters

X = normal(9, 5, 8)
VARIABLES = params(jnp.float32, w=(8, 6), u=(6, 4))


def mlp(p, x):
    return jnp.tanh(x @ p["w"]) @ p["u"]


def adapters_of(fn=mlp, variables=VARIABLES, *args, **options):
    start = lambda key: lj.init(key, lj.LoraConfig(rank=2, **options), fn, variables, *(args or (X,)))
    return jax.jit(lambda key: random_adapters(start(key), jnp.float32))(jax.random.key(0))


def ours(a, x=X):
    return jnp.sum(jnp.sin(lj.lora(mlp)(lj.attach(VARIABLES, a), x)))


def merged(a, x=X):
    return jnp.sum(jnp.sin(mlp(lj.merge(VARIABLES, a), x)))


def direction(tree):
    return jax.tree.map(jnp.cos, tree)


def first_dot(f, a):
    return sum(map(jnp.vdot, jax.tree.leaves(jax.grad(f)(a)), jax.tree.leaves(direction(a))))


TRANSFORMS = {
    "jvp": lambda f, a: jax.jvp(f, (a,), (direction(a),)),
    "linearize": lambda f, a: jax.linearize(f, a)[1](direction(a)),
    "vjp": lambda f, a: jax.vjp(f, a)[1](jnp.float32(2.0)),
    "jacfwd": lambda f, a: jax.jacfwd(f)(a),
    "forward_over_reverse": lambda f, a: jax.jvp(jax.grad(f), (a,), (direction(a),)),
    "reverse_over_reverse": lambda f, a: jax.grad(functools.partial(first_dot, f))(a),
    "gradient_of_the_input": lambda f, a: jax.grad(f, argnums=1)(a, X),
    "vmap_over_adapters": lambda f, a: jax.vmap(f)(jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), a)),
    "vmap_over_inputs": lambda f, a: jax.vmap(f, in_axes=(None, 0))(a, jnp.stack([X, X * 0.5])),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations(name):
    run = lambda f: jax.jit(lambda a: TRANSFORMS[name](f, a))(adapters_of())
    assert distance(run(ours), run(merged)) < 1e-5


def test_frozen_leaves_get_a_gradient_only_on_request():
    adapters = adapters_of()
    ours = lambda **options: jax.jit(jax.grad(lambda v: lj.lora(mlp, **options)(lj.attach(v, adapters), X).sum()))(VARIABLES)
    merged = jax.jit(jax.grad(lambda v: mlp(lj.merge(v, adapters), X).sum()))(VARIABLES)
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(ours()))
    assert distance(ours(freeze=False), merged) < 1e-5


def test_roles_without_gradient():
    """A frozen A, and a scale that is an array, get none; the rest does."""
    layout = lj.Layout((0,), (1,), (2,))
    pair = lj.LowRank(normal(1, 3, 8, 2), normal(2, 3, 2, 8), layout, jnp.array([0.5, 1.0, 2.0]), frozen=("a",))
    variables = params(jnp.float32, w=(3, 8, 8))
    fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    run = lambda f: jax.jit(jax.value_and_grad(lambda a: f(a).sum()))({"w": pair})
    value, grads = run(lambda a: lj.lora(fn)(lj.attach(variables, a), X))
    want, oracle = run(lambda a: fn(lj.merge(variables, a), X))
    assert distance((value, grads["w"].b), (want, oracle["w"].b)) < 1e-5
    assert not grads["w"].a.any() and not grads["w"].scale.any() and oracle["w"].a.any()
    sizes = [leaf.size for leaf in jax.tree.leaves(lj.optimizer(optax.adam(1.0)).init({"w": pair}))]
    assert sum(sizes) == 2 * pair.b.size + 1


def test_an_integer_scale_is_an_error():
    pair = lj.LowRank(jnp.ones((8, 2)), jnp.ones((2, 6)), lj.Layout((), (0,), (1,)), 2)
    with pytest.raises(ValueError, match=r"w: the adapter's scale is the whole number 2: write 2\.0"):
        lj.attach(VARIABLES, {"w": pair})


def test_shapes_alone():
    shapes = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    config = lj.LoraConfig(rank=2)
    abstract = lj.init(jax.random.key(0), config, mlp, shapes(VARIABLES), shapes(X))
    concrete = lj.init(jax.random.key(0), config, mlp, VARIABLES, X)
    assert jax.tree.structure(concrete) == jax.tree.structure(abstract)
    assert [leaf.shape for leaf in jax.tree.leaves(concrete)] == [leaf.shape for leaf in jax.tree.leaves(abstract)]
    out = jax.eval_shape(lj.lora(mlp), lj.attach(shapes(VARIABLES), abstract), X)
    assert (out.shape, out.dtype) == ((5, 4), jnp.float32)
    jitted = jax.jit(lambda key, v: lj.init(key, config, mlp, v, X))(jax.random.key(0), VARIABLES)
    assert distance(jitted, concrete) < 1e-6


def test_no_tracer_leaks():
    block = jax.checkpoint(lambda x, w: (jax.lax.cond(x.sum() > 0, lambda w: jnp.tanh(x @ w), lambda w: x @ w, w), None))
    fn = lambda p, x: jax.lax.scan(block, x, p["w"])[0]
    variables = params(jnp.float32, w=(3, 8, 8))
    with jax.checking_leaks():
        adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, dropout=0.5), fn, variables, X)
        run = lambda a: lj.lora(fn, key=jax.random.key(1))(lj.attach(variables, a), X).sum()
        jax.jit(jax.grad(run))(adapters)


def test_export_with_symbolic_sizes_serialises_and_loads():
    def fn(p, x):
        h = mlp(p, x)
        return jax.lax.conv_general_dilated(h, p["c"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    variables, x = VARIABLES | {"c": normal(4, 3, 4, 5)}, normal(2, 2, 5, 8)
    adapters = adapters_of(fn, variables, x)
    rows, length = export.symbolic_shape("rows,length")
    run = jax.jit(lambda v, x: lj.lora(fn)(lj.attach(v, adapters), x))
    exported = export.export(run)(variables, jax.ShapeDtypeStruct((rows, length, 8), jnp.float32))
    loaded = export.deserialize(exported.serialize())
    assert distance(loaded.call(variables, x), fn(lj.merge(variables, adapters), x)) < 1e-5


def test_effects_happen_once():
    seen = []

    def fn(p, x):
        y = x @ p["w"]
        jax.debug.callback(lambda total: seen.append(float(total)), y.sum())
        return y

    adapters = adapters_of(fn, {"w": VARIABLES["w"]})
    jax.effects_barrier()
    assert seen == []
    for run in (lj.lora(fn), jax.jit(lj.lora(fn))):
        total = run(lj.attach({"w": VARIABLES["w"]}, adapters), X).sum()
        jax.effects_barrier()
        assert seen == [pytest.approx(float(total), rel=1e-5)]
        seen.clear()


def test_anything_in_the_tree_and_in_the_result():
    variables = {
        "w": VARIABLES["w"], "int": jnp.arange(3), "bool": jnp.array([True]), "key": jax.random.key(3), "none": None,
        "name": "a name", "activation": jnp.tanh, "number": 2.5, "numpy": np.ones((1, 6), np.float32), "scalar": jnp.float32(2),
    }  # fmt: skip

    def fn(p, x, *, mode, after):
        noise = jax.random.normal(p["key"], (5, 6))
        y = after(p["activation"](x @ p["w"]) * p["number"] * p["scalar"] + p["numpy"]) + noise
        return {"y": y, "mode": mode, "none": None, "int": p["int"], "number": 1.5, "name": p["name"]}

    options = {"mode": "train", "after": jnp.sin}
    adapters = random_adapters(lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, variables, X, **options), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        got = lj.lora(fn)(lj.attach(variables, adapters), X, **options)
        want = fn(lj.merge(variables, adapters), X, **options)
    assert distance(got.pop("y"), want.pop("y")) < 1e-5
    assert (got.pop("int") == want.pop("int")).all()
    assert got == want == {"mode": "train", "none": None, "number": 1.5, "name": "a name"}
    base, same = lj.detach(lj.attach(variables, adapters))
    assert base["activation"] is jnp.tanh and base["w"] is variables["w"] and same["w"] is adapters["w"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["up", "layers", "activation"], meta_fields=["name"])
@dataclasses.dataclass
class Module:
    """A module as Equinox has them: a pytree whose leaves are arrays and functions."""

    up: jax.Array
    layers: list
    activation: object
    name: str

    def __call__(self, x):
        return self.activation(x @ self.up) @ self.layers[0]


def test_containers():
    """Modules that are pytrees, Haiku's dicts with slashes in their keys, FrozenDict: each comes back as it was."""
    module = Module(VARIABLES["w"], [VARIABLES["u"], None], jnp.tanh, "mlp")
    haiku = {"net/~/linear": {"w": VARIABLES["w"]}, "net/~/linear_1": {"w": VARIABLES["u"]}}
    cases = [
        (lambda m, x: m(x), module, ["layers/0", "up"]),
        (lambda p, x: jnp.tanh(x @ p["net/~/linear"]["w"]) @ p["net/~/linear_1"]["w"], haiku,
         ["net%2F~%2Flinear/w", "net%2F~%2Flinear_1/w"]),
        (mlp, flax.core.freeze(VARIABLES), ["u", "w"]),
    ]  # fmt: skip
    for fn, variables, names in cases:
        adapters = adapters_of(fn, variables)
        assert sorted(adapters) == names
        attached = lj.attach(variables, adapters)
        assert distance(lj.lora(fn)(attached, X), fn(lj.merge(variables, adapters), X)) < 1e-5
        assert jax.tree.structure(lj.detach(attached)[0]) == jax.tree.structure(variables)


def test_merge_and_unmerge():
    adapters = adapters_of()
    merged = lj.merge(VARIABLES, adapters)
    pair = adapters["w"]
    assert distance(merged["w"], VARIABLES["w"] + pair.scale * pair.a @ pair.b) < 1e-6
    assert distance(lj.unmerge(merged, adapters), VARIABLES) < 1e-6
    bad = {"w": dataclasses.replace(pair, a=pair.a.at[0, 0].set(jnp.nan))}
    with pytest.raises(ValueError, match="merging makes NaN or infinite values in w; the base is unchanged"):
        lj.merge(VARIABLES, bad, check=True)
    assert lj.merge(VARIABLES, adapters, check=True)["w"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"^w: a Full adapter, Rows and one with a magnitude replace their parameter"):
        lj.unmerge(VARIABLES, {"w": lj.Full(VARIABLES["w"])})


def test_a_branch_has_the_precision_of_its_product():
    """Of the weight's operand and of the other's, in whichever order the product has them."""
    highest, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
    fn = lambda p, x: jax.lax.dot_general(p["w"], x, (((0,), (1,)), ((), ())), precision=(highest, default))
    variables, x = {"w": normal(1, 8, 6)}, normal(2, 5, 8)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, variables, x)
    text = jax.jit(lambda a: lj.lora(fn)(lj.attach(variables, a), x)).lower(adapters).as_text()
    found = re.findall(r"dot_general .*precision = \[(\w+), (\w+)\]", text)
    assert found == [("HIGHEST", "DEFAULT"), ("DEFAULT", "HIGHEST"), ("DEFAULT", "HIGHEST")]

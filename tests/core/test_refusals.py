"""What cannot stay low-rank is an error that says where and why, and right with `on_unsupported="materialize"`."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from jax import lax

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.identity import distance, value_and_grads

W, X = normal(1, 8, 8) / 3, normal(2, 5, 8)
PAIR = {"w": lj.LowRank(normal(3, 8, 2), normal(4, 2, 8), lj.Layout((), (0,), (1,)), 0.5)}

own_jvp = jax.custom_jvp(lambda w: w * 2.0)
own_jvp.defjvp(lambda w, t: (own_jvp(*w), t[0] * 2.0))
own_vjp = jax.custom_vjp(lambda x, w: x @ w)
own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, t: (t @ r[1].T, r[0].T @ t))
shrink = lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1] * 0.5), None)
NOT_ALONG_AXES = "an array that is not seen to lie along in or out axes alone"
OWN_RULE = "the function has a derivative rule of its own, which takes the whole weight"

REFUSALS = {
    "power": ("integer_pow", "no rule keeps it low-rank", lambda p, x: x @ p["w"] ** 2),
    "sum": ("add", "it is added to something, not multiplied with it", lambda p, x: x @ (p["w"] + 1.0)),
    "product": ("mul", NOT_ALONG_AXES, lambda p, x: x @ (p["w"] * jnp.tri(8))),
    "row_by_row": ("mul", NOT_ALONG_AXES, lambda p, x: x + (p["w"][3] * x[0])[None]),
    "quotient": ("div", "something is divided by it", lambda p, x: x @ (0.1 / p["w"])),
    "masked": ("select_n", NOT_ALONG_AXES, lambda p, x: x @ jnp.where(jnp.tri(8) > 0, p["w"], 0)),
    "chosen": ("select_n", "it is one of several arrays that are chosen from", lambda p, x: x @ lax.select(
        jnp.tri(8) > 0, p["w"], -p["w"])),
    "norm": ("mul", "it is multiplied elementwise with itself, or with another parameter",
             lambda p, x: x * jnp.linalg.norm(p["w"])),
    "square": ("dot_general", "two adapted parameters are multiplied with each other", lambda p, x: x @ (p["w"] @ p["w"])),
    "merged": ("reshape", "merges in and out axes", lambda p, x: x[0] + p["w"].reshape(-1)[3:11]),
    "custom_jvp": ("custom_jvp_call", OWN_RULE, lambda p, x: x @ own_jvp(p["w"])),
    "custom_vjp": ("custom_vjp_call", OWN_RULE, lambda p, x: own_vjp(x, p["w"])),
    "returned": ("return", "the function returns it", lambda p, x: p["w"]),
    "branch": ("cond", "a branch returns it", lambda p, x: x @ lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w * 2.0, p["w"])),
    "carried": ("scan", "the loop carries it and changes it", lambda p, x: lax.scan(shrink, (x, p["w"]), None, length=2)[0][0]),
    "stacked": ("scan", "the loop stacks it up", lambda p, x: lax.scan(lambda c, _: (c, p["w"]), 0, None, length=2)[1] @ x[0]),
    "sorted": ("sort", "no rule keeps it low-rank", lambda p, x: x @ jnp.sort(p["w"])),
    "as_an_input": ("conv_general_dilated", "it is the input of a convolution, not its kernel",
                    lambda p, x: lax.conv(p["w"][None], x[:, :, None], (1,), "SAME")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_the_place_and_the_reason(name):
    primitive, reason, fn = REFUSALS[name]
    with pytest.raises(lj.NotLowRankError) as error:
        lj.lora(fn)(lj.attach({"w": W}, PAIR), X)
    text = str(error.value)
    assert text.startswith("w (shape ") and f"cannot stay low-rank in `{primitive}` at " in text and reason in text
    assert "test_refusals.py" in text or "the end of the function" in text
    assert "on_unsupported='materialize'" in text and "LoraConfig(train=[...])" in text


@pytest.mark.parametrize("name", REFUSALS)
def test_materialised_on_request(name):
    _, _, fn = REFUSALS[name]
    run = lambda f: jax.jit(lambda a: value_and_grads(f, a, X))(PAIR)
    ours = run(lambda a, x: lj.lora(fn, on_unsupported="materialize")(lj.attach({"w": W}, a), x))
    assert distance(ours, run(lambda a, x: fn(lj.merge({"w": W}, a), x))) < 1e-5


def test_only_the_use_that_needs_it_is_materialised():
    """One W + AB: the other product of the same weight stays low-rank."""
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ (p["w"] ** 2)
    jaxpr = jax.make_jaxpr(lambda a: lj.lora(fn, on_unsupported="materialize")(lj.attach({"w": W}, a), X))(PAIR)
    adds = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "add" and eqn.outvars[0].aval.shape == (8, 8)]
    assert len(adds) == 1


def test_two_adapted_operands():
    fn = lambda p, x: x @ (p["v"] @ p["w"])
    variables, pairs = {"v": W, "w": W}, {"v": PAIR["w"], "w": PAIR["w"]}
    with pytest.raises(lj.NotLowRankError, match=r"multiplied with each other\. Exclude it from the targets"):
        lj.lora(fn)(lj.attach(variables, pairs), X)
    forced = lj.lora(fn, on_unsupported="materialize")(lj.attach(variables, pairs), X)
    assert distance(forced, fn(lj.merge(variables, pairs), X)) < 1e-5


LAYOUT, STACKED = lj.Layout((), (0,), (1,)), lj.Layout((0,), (1,), (2,))
SUMS = {
    "stack": (0, lj.LowRank(normal(3, 3, 8, 2), normal(4, 3, 2, 6), STACKED)),
    "magnitude": (1, lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), LAYOUT, magnitude=1 + jnp.arange(6.0))),
    "vera": (1, lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), LAYOUT, lambda_d=normal(5, 2), lambda_b=normal(6, 6))),
    "bias": (1, lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), LAYOUT, bias=normal(5, 6))),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_over_an_axis_that_several_arrays_have(name):
    axis, pair = SUMS[name]
    variables = {"w": normal(1, *((3, 8, 6) if name == "stack" else (8, 6)))}
    fn = lambda p, x: (x @ p["w"].sum(axis).reshape(8, -1)).sum(1)
    with pytest.raises(lj.NotLowRankError, match="several arrays of its adapter lie"):
        lj.lora(fn)(lj.attach(variables, {"w": pair}), X)
    if name == "bias":
        return
    run = lambda f: jax.jit(lambda a: value_and_grads(f, a, X))({"w": pair})
    ours = run(lambda a, x: lj.lora(fn, on_unsupported="materialize")(lj.attach(variables, a), x))
    assert distance(ours, run(lambda a, x: fn(lj.merge(variables, a), x))) < 1e-5


def test_a_sum_over_inputs_needs_no_bias():
    pair = lj.LowRank(normal(3, 8, 2), normal(4, 2, 6), LAYOUT, bias=normal(5, 6))
    with pytest.raises(lj.NotLowRankError, match="in axis is taken apart, and its adapter has a bias"):
        lj.lora(lambda p, x: x[:, :4] @ p["w"].reshape(2, 4, 6).sum(0))(lj.attach({"w": normal(1, 8, 6)}, {"w": pair}), X)


def test_init_refuses_a_kernel_with_such_a_use():
    fn = lambda p, x: x @ p["w"] + x @ (p["w"] ** 2)
    text = r"also used in a way that is not low-rank.*\n  w \(8, 8\): `integer_pow` at .*test_refusals"
    with pytest.raises(ValueError, match=text):
        lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["w"]), fn, {"w": W}, X)


def test_unused_adapters():
    fn = lambda p, x: x @ p["w"]
    params = lj.attach({"w": W, "v": W}, {"w": PAIR["w"], "v": PAIR["w"]})
    with pytest.raises(ValueError, match=r"the function does not use these adapted parameters: v\. Leave their adapters out"):
        lj.lora(fn)(params, X)
    assert distance(lj.lora(fn, unused="ignore")(params, X), lj.lora(fn)(lj.attach({"w": W}, PAIR), X)) == 0


DEAD = {
    "a_product": lambda p, x: (x @ p["v"], x @ p["w"])[1],
    "behind_jit": jax.jit(lambda p, x: ((p["v"] * 2.0).sum(), x @ p["w"])[1]),
    "in_a_loop": lambda p, x: lax.fori_loop(0, 2, lambda i, c: (c[0] @ p["w"], c[1] + (x @ p["v"]).sum()), (x, 0.0))[0],
    "in_a_branch": lambda p, x: lax.cond(x[0, 0] > 0, lambda v: (x @ p["w"], v.sum()), lambda v: (x, v.sum()), p["v"])[0],
}


@pytest.mark.parametrize("name", DEAD)
def test_dead_code_is_no_use(name):
    """For `lora`, `explain` and `init`, whatever the adapter."""
    fn, variables = DEAD[name], {"w": W, "v": W}
    assert lj.explain(fn, variables, X).parameters["v"].kind == "unused"
    for adapter in (PAIR["w"], lj.Full(W)):
        with pytest.raises(lj.InputError, match=r"the function does not use these adapted parameters: v\. Leave"):
            lj.lora(fn)(lj.attach(variables, PAIR | {"v": adapter}), X)
    for option in ({"targets": ["v"]}, {"targets": ["w"], "train": ["v"]}):
        with pytest.raises(lj.InputError, match="the function does not use"):
            lj.init(jax.random.key(0), lj.LoraConfig(rank=2, **option), fn, variables, X)


@pytest.mark.parametrize("options,text", [
    ({"unused": "warn"}, "unused must be one of 'error', 'ignore', not 'warn'"),
    ({"on_unsupported": "skip"}, "on_unsupported must be one of 'error', 'materialize', not 'skip'"),
])  # fmt: skip
def test_options(options, text):
    with pytest.raises(ValueError, match=text):
        lj.lora(lambda p, x: x, **options)


@pytest.mark.parametrize("call,text", [
    (lambda: lj.lora(lambda p, x: x)({"w": W}, X), "the parameters have no adapters: pass lora"),
    (lambda: lj.attach(lj.attach({"w": W}, PAIR), PAIR), "w: the tree has adapters already; `detach` them first"),
    (lambda: lj.attach({"kernel": W}, PAIR), r"the adapter 'w' has no parameter in this tree.*\n  kernel"),
    (lambda: lj.attach({"w": W[:4]}, PAIR), r"the adapter's a has the shape \(8, 2\); .* \(4, 8\) needs \(4, 2\)"),
    (lambda: lj.attach({"w": W[0]}, PAIR), r"w: the parameter has the shape \(8,\), which the adapter's Layout"),
    (lambda: lj.attach({"w": W}, {"w": W}), "w: an adapter is a LowRank, a Full or Rows, not ArrayImpl"),
])  # fmt: skip
def test_trees_that_do_not_fit(call, text):
    with pytest.raises((ValueError, TypeError), match=text):
        call()


FORGOTTEN = {
    "linen": lambda params, x: linen.Dense(3).apply({"params": {"kernel": params["w"], "bias": jnp.zeros(3)}}, x),
    "matmul": lambda params, x: x @ params["w"],
    "dot": lambda params, x: jnp.dot(x, params["w"]),
    "einsum": lambda params, x: jnp.einsum("ij,jk->ik", x, params["w"]),
    "index": lambda params, x: params["w"][0],
    "sum": lambda params, x: params["w"] + 1,
    "product": lambda params, x: 2.0 * params["w"],
    "transpose": lambda params, x: x @ params["w"].T,
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_function_without_lora_says_so(name):
    pair = lj.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), lj.Layout((), (0,), (1,)))
    attached = lj.attach({"w": jnp.ones((4, 3))}, {"w": pair})
    for fn in (FORGOTTEN[name], jax.jit(FORGOTTEN[name])):
        with pytest.raises((TypeError, AttributeError), match=r"used as an array: call lora\(fn\) with these parameters"):
            fn(attached, jnp.ones((2, 4)))


MODULES = {
    "Linear is an NNX module, .* `fn, params = lora_jax.nnx.functional": lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)),
    "Dense is a Linen module, .* give its `apply`": lambda: linen.Dense(8),
    "a function of parameters is needed, not a dict": dict,
}


@pytest.mark.parametrize("message", MODULES)
def test_modules_are_no_functions(message):
    module = MODULES[message]()
    takes = [
        lj.lora,
        lambda fn: lj.explain(fn, {"w": W}, X),
        lambda fn: lj.init(jax.random.key(0), lj.LoraConfig(), fn, {"w": W}, X),
    ]
    for take in takes:
        with pytest.raises(TypeError, match=message):
            take(module)

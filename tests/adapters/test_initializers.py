"""Initialisers over whole sets: their definitions in float64, PEFT's results, what the base becomes, and the way back."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.adapters.initializers import convert, corda, eva, gradients, loftq, lora_ga, milora, olora, pissa
from lora_jax.adapters.initializers.moments import Moments, moments
from tests.support.identity import distance
from tests.support.marks import checkerboard, every_other
from tests.support.pairs import matrices

DATA = pathlib.Path(__file__).parents[1] / "data" / "initializers"
DENSE = lj.Layout((), (0,), (1,))
LAYOUTS = {
    "dense": ((12, 8), DENSE, None),
    "heads": ((12, 4, 2), lj.Layout((), (0,), (1, 2)), None),
    "out-first": ((8, 4, 3), lj.Layout((), (1, 2), (0,)), None),
    "stacked": ((3, 12, 8), lj.Layout((0,), (1,), (2,)), (2, 0, 3)),
    "experts": ((2, 12, 3, 8), lj.Layout((0, 2), (1,), (3,)), None),
    "conv": ((2, 2, 3, 8), lj.Layout((), (0, 1, 2), (3,)), None),
}
RANK, SCALE = 3, 0.7


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def given(name, dtype=jnp.float32, rank=RANK, scale=SCALE):
    """A base with one kernel of the layout and a head, and adapters as `init` would make them."""
    shape, layout, ranks = LAYOUTS[name]
    a_shape, b_shape = layout.factor_shapes(shape, rank)
    pair = lj.LowRank(jnp.ones(a_shape, dtype), jnp.zeros(b_shape, dtype), layout, scale, dropout=0.1, ranks=ranks)
    variables = {"w": normal(1, *shape).astype(dtype), "other": {"head": normal(2, 3)}}
    return variables, {"w": pair, "other/head": lj.Full(jnp.zeros(3))}


def count(name):
    shape, layout, _ = LAYOUTS[name]
    return int(np.prod([shape[axis] for axis in layout.batch], dtype=int))


def inputs(name, seed=0, rows=40):
    """Inputs of each matrix `(count, rows, in)` that vary more in some directions and have a mean."""
    return np.asarray(normal(seed, count(name), rows, 12) * jnp.linspace(2, 0.2, 12)[None, None] + 1.0)


def moments_of(name):
    x = inputs(name)
    batch = tuple(LAYOUTS[name][0][axis] for axis in LAYOUTS[name][1].batch)
    sums = jnp.full(batch, float(x.shape[1])), x.sum(1).reshape(*batch, 12), (x.transpose(0, 2, 1) @ x).reshape(*batch, 12, 12)
    return {"w": Moments(*map(jnp.asarray, sums))}


def gradient_of(name):
    return {"w": normal(5, *LAYOUTS[name][0])}


# Each method: how it is called, and the change `scale A B` that it makes of one matrix W of rank r (index i of the stack).


def part(w, chosen, inverse=None):
    """The singular values `chosen` of W, or of `inverse^-1 W` times the inverse."""
    u, s, vt = np.linalg.svd(w if inverse is None else np.linalg.solve(inverse, w), full_matrices=False)
    change = u[:, chosen] * s[chosen] @ vt[chosen]
    return change if inverse is None else inverse @ change


def last(rank):
    return slice(8 - rank, 8)


def whitening(name, i):
    """The inverse of CorDA's C of one matrix."""
    x = np.asarray(inputs(name)[i], np.float64)
    c = x.T @ x
    return np.linalg.inv(c / np.diag(c).mean() + 0.01 * np.eye(12))


def qr_part(w, rank):
    q, r = np.linalg.qr(w.T)
    return SCALE * (q[:, :rank] @ r[:rank]).T


METHODS = {
    "pissa": (lambda name, *both: pissa(*both), lambda name, i, w, rank: part(w, slice(rank))),
    "randomised": (
        lambda name, *both: pissa(*both, iterations=20, key=jax.random.key(0)), lambda name, i, w, rank: part(w, slice(rank)),
    ),
    "milora": (lambda name, *both: milora(*both), lambda name, i, w, rank: part(w, last(rank))),
    "olora": (lambda name, *both: olora(*both), lambda name, i, w, rank: qr_part(w, rank)),
    "corda-ipm": (
        lambda name, *both: corda(*both, moments_of(name), mode="ipm"),
        lambda name, i, w, rank: part(w, slice(rank), whitening(name, i)),
    ),
    "corda-kpm": (
        lambda name, *both: corda(*both, moments_of(name), mode="kpm"),
        lambda name, i, w, rank: part(w, last(rank), whitening(name, i)),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "name"), checkerboard(METHODS, LAYOUTS))
def test_the_pair_is_what_the_paper_defines_and_the_base_the_rest(method, name):
    variables, adapters = given(name)
    call, wanted = METHODS[method]
    base, found = call(name, variables, adapters)
    kernel, pair = variables["w"], found["w"]
    ranks = pair.ranks or (RANK,) * count(name)
    want = np.stack([wanted(name, i, w, r) for i, (w, r) in enumerate(zip(matrices(kernel, pair.layout), ranks))])
    got = matrices(pair.delta(), pair.layout)
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    assert distance(base["w"], kernel - pair.delta()) < 1e-6
    assert distance(lj.merge(base, {"w": pair})["w"], kernel) < 1e-6
    assert list(found) == list(adapters) and found["other/head"] is adapters["other/head"]
    np.testing.assert_array_equal(base["other"]["head"], variables["other"]["head"])
    kept = lambda pair: (pair.layout, pair.scale, pair.dropout, pair.ranks, pair.a.shape, pair.b.shape)
    assert kept(pair) == kept(adapters["w"])


def test_beyond_a_true_rank_all_is_zero():
    for method in (*METHODS, "lora_ga"):
        call = METHODS[method][0] if method in METHODS else lambda name, *both: lora_ga(*both, gradient_of(name))
        pair = call("stacked", *given("stacked"))[1]["w"]
        for i, rank in enumerate(pair.ranks):
            assert not pair.a[i, :, rank:].any() and not pair.b[i, rank:].any()
            assert rank == 0 or (pair.a[i, :, :rank].any(0).all() and pair.b[i, :rank].any(1).all())


@pytest.mark.parametrize("method", ["pissa", "olora", "corda-ipm"])
def test_a_bfloat16_base_and_pair_are_split_to_its_precision(method):
    variables, adapters = given("heads", jnp.bfloat16)
    base, found = METHODS[method][0]("heads", variables, adapters)
    assert base["w"].dtype == found["w"].a.dtype == found["w"].b.dtype == jnp.bfloat16
    assert distance(lj.merge(base, {"w": found["w"]})["w"], variables["w"]) < 5e-3


def test_a_scale_for_each_layer_is_taken_into_account():
    variables, adapters = given("experts")
    scales = jnp.arange(1.0, 7.0).reshape(2, 3)
    varied = adapters | {"w": dataclasses.replace(adapters["w"], scale=scales)}
    same, other = (pissa(variables, one)[1]["w"] for one in (adapters, varied))
    assert distance(other.delta(), same.delta()) < 1e-5
    assert distance(other.a, same.a * jnp.sqrt(SCALE / scales)[:, None, :, None].transpose(0, 2, 1, 3)) < 1e-5


def test_the_randomised_svd_has_a_key_of_its_own_for_each_kernel():
    _, adapters = given("dense")
    both = {"w": normal(0, 40, 30), "v": normal(0, 40, 30)}
    pair = dataclasses.replace(adapters["w"], a=jnp.ones((40, RANK)), b=jnp.ones((RANK, 30)))
    rough = pissa(both, {"w": pair, "v": pair}, iterations=0, key=jax.random.key(0))[1]
    again = pissa(both, {"w": pair}, iterations=0, key=jax.random.key(0))[1]
    assert distance(rough["w"].delta(), rough["v"].delta()) > 1e-3
    np.testing.assert_array_equal(rough["w"].a, again["w"].a)


# --- PEFT -------------------------------------------------------------------------------------------------------------

GIVEN = load_file(DATA / "given.safetensors")


def peft_given():
    pair = lj.LowRank(jnp.zeros((20, 4)), jnp.zeros((4, 12)), DENSE, scale=2.0)
    return {"w": jnp.asarray(GIVEN["weight"].T)}, {"w": pair}


def sums(x):
    return Moments(jnp.asarray(float(len(x))), jnp.asarray(x.sum(0)), jnp.asarray(x.T @ x))


PEFT = {
    "pissa": pissa,
    "olora": olora,
    "corda-ipm": lambda *both: corda(*both, {"w": sums(GIVEN["inputs"])}, mode="ipm"),
    "corda-kpm": lambda *both: corda(*both, {"w": sums(GIVEN["inputs"])}, mode="kpm"),
}


@pytest.mark.parametrize("case", PEFT)
def test_peft_makes_the_same_product_and_base(case):
    want = load_file(DATA / f"{case}.safetensors")
    base, found = PEFT[case](*peft_given())
    assert distance(found["w"].a @ found["w"].b, (want["b"] @ want["a"]).T) < 1e-5
    assert distance(base["w"], want["base"].T) < 1e-5


def up_to_signs(rows, like):
    return rows * np.sign((rows * like).sum(1, keepdims=True))


@pytest.mark.parametrize("file", sorted(DATA.glob("lora_ga-*")), ids=lambda file: file.stem)
def test_peft_chooses_and_scales_the_same_directions(file):
    """A row of A or B may have the other sign."""
    _, direction, scale = file.stem.split("-")
    variables, adapters = peft_given()
    loss = lambda p, batch: ((batch["inputs"] @ p["w"] - batch["target"]) ** 2).mean()
    grads = gradients(loss, variables, adapters, [GIVEN])
    assert distance(grads["w"], GIVEN["gradient"].T) < 1e-5
    base, found = lora_ga(variables, adapters, grads, direction=direction, scale=scale)
    want, pair = load_file(file), found["w"]
    assert distance(up_to_signs(pair.a.T, want["a"]), want["a"]) < 1e-5
    assert distance(up_to_signs(pair.b, want["b"].T), want["b"].T) < 1e-5
    assert distance(lj.merge(base, found)["w"], variables["w"]) < 1e-6


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_peft_finds_the_same_components_and_ranks(rho):
    """A component may have the other sign."""
    want = load_file(DATA / f"eva-{rho}.safetensors")
    weights = [GIVEN[f"eva.{i}"].T for i in (0, 1)]
    variables = {"first": jnp.asarray(weights[0]), "second": jnp.asarray(weights[1])}
    fn = lambda p, x: x @ p["first"] @ p["second"]
    config = lj.LoraConfig(rank=4, alpha=8)
    adapters = lj.init(jax.random.key(0), config, fn, variables, GIVEN["eva.inputs"])
    _, found = eva(variables, adapters, moments(fn, variables, adapters, GIVEN["eva.inputs"]), rho=rho)
    for i, pair in enumerate(found.values()):
        assert distance(up_to_signs(pair.a.T, want[f"a.{i}"]), want[f"a.{i}"]) < 1e-5
        assert pair.scale == 2.0 and not pair.b.any()


# --- LoRA-GA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heads", "stacked"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_lora_ga_takes_singular_vectors_of_the_gradient(direction, name):
    variables, adapters = given(name)
    key = jax.random.key(3) if direction == "random" else None
    base, found = lora_ga(variables, adapters, gradient_of(name), direction=direction, scale="unit", key=key)
    pair = found["w"]
    assert distance(lj.merge(base, {"w": pair})["w"], variables["w"]) < 1e-6
    a, b = (np.asarray(x, np.float64) for x in lj.algebra.matrices(pair))
    for i, gradient in enumerate(matrices(gradient_of(name)["w"], pair.layout)):
        rank = RANK if pair.ranks is None else pair.ranks[i]
        u, s, vt = np.linalg.svd(gradient, full_matrices=False)
        of_a, of_b = np.abs(u.T @ a[i, :, :rank]), np.abs(b[i, :rank] @ vt.T / s)
        places = of_a.argmax(0), of_b.argmax(1)
        np.testing.assert_allclose(of_a, np.eye(8)[:, places[0]], atol=1e-4)
        np.testing.assert_allclose(of_b, np.eye(8)[places[1]], atol=1e-4)
        low, high, every = range(rank), range(rank, 2 * rank), range(2 * rank)
        wanted = {"ArB2r": (low, high), "A2rBr": (high, low), "ArBr": (every[1::2], every[::2])}.get(direction, places)
        assert [list(p) for p in places] == [list(p) for p in wanted]
        if direction == "random":
            assert list(places[0]) == list(places[1]) and len(set(places[0])) == rank and set(places[0]) <= set(every)


def test_gradients_are_means_over_batches_of_the_adapted_kernels_alone():
    variables, x = {"w": normal(0, 5, 4), "v": normal(1, 4, 3)}, normal(2, 6, 5)
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["w"]), fn, variables, x)
    loss = lambda p, x: (fn(p, x) ** 2).mean()
    found = gradients(loss, variables, adapters, iter([x[:3], x[3:]]))
    assert list(found) == ["w"]
    assert distance(found["w"], jax.grad(loss)(variables, x)["w"]) < 1e-6


# --- LoftQ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out-first", "stacked", "conv"])
@pytest.mark.parametrize("dtype", ["nf4", "int4", "int8"])
def test_loftq_is_nearer_than_plain_quantisation(dtype, name):
    import qwix

    variables, adapters = given(name)
    base, found = loftq(variables, adapters, dtype, block=6)
    kernel, pair = variables["w"], found["w"]
    flat, wanted = (matrices(x, pair.layout).astype(np.float32) for x in (kernel, base["w"]))
    with jax.numpy_rank_promotion("allow"):
        plain = qwix.dequantize(qwix.quantize(jnp.asarray(flat), dtype, channelwise_axes=(0, 2), tiled_axes={1: 6}))
    np.testing.assert_allclose(wanted, plain, atol=1e-6)
    left = flat - matrices(lj.merge(base, {"w": pair})["w"], pair.layout)
    ranks = np.array(pair.ranks or (RANK,) * len(flat))
    errors = [np.linalg.norm(x, axis=(1, 2)) for x in (left, flat - plain)]
    assert (errors[0][ranks > 0] < 0.9 * errors[1][ranks > 0]).all()
    np.testing.assert_allclose(errors[0][ranks == 0], errors[1][ranks == 0], rtol=1e-6)
    tails = [np.sqrt((np.linalg.svd(e, compute_uv=False)[r:] ** 2).sum()) for e, r in zip(flat - plain, ranks)]
    np.testing.assert_allclose(errors[0], tails, rtol=1e-3)


def test_more_turns_come_nearer_still():
    variables = {"w": normal(0, 64, 48)}
    pair = lj.LowRank(jnp.zeros((64, 8)), jnp.zeros((8, 48)), DENSE, scale=2.0)
    error = lambda base, found: float(jnp.linalg.norm(lj.merge(base, found)["w"] - variables["w"]))
    one, five = (error(*loftq(variables, {"w": pair}, "int4", block=None, iterations=n)) for n in (1, 5))
    assert five < one


def test_loftq_without_qwix_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"qwix, which is not installed: pip install 'lora-jax\[quant\]'"):
        loftq(*given("dense"), block=None)


# --- EVA --------------------------------------------------------------------------------------------------------------


def of_spread(spread, seed=0, rows=50):
    """Moments of inputs with these standard deviations along random directions."""
    turn = jnp.linalg.qr(normal(seed, len(spread), len(spread)))[0]
    return np.asarray((normal(seed + 1, rows, len(spread)) * jnp.asarray(spread)[None]) @ turn + 3.0)


def test_eva_gives_ranks_to_what_explains_most_and_leaves_out_what_gets_none():
    spreads = {"flat": [1.0] * 8, "steep": [9.0, 3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], "two": [3.0, 3, 2, 2, 0.1, 0.1, 0.1, 0.1]}
    data = {path: of_spread(spread, i) for i, (path, spread) in enumerate(spreads.items())}
    variables = {path: normal(i, 8, 6) for i, path in enumerate(data)} | {"head": jnp.ones(2)}
    pair = lj.LowRank(jnp.zeros((8, 2)), jnp.zeros((2, 6)), DENSE, 0.5)
    adapters = {path: pair for path in data} | {"head": lj.Full(jnp.ones(2))}
    given = {path: sums(x) for path, x in data.items()}
    base, found = eva(variables, adapters, given, rho=4.0)
    assert base is variables and list(found) == ["flat", "steep", "two", "head"]
    shares = {path: np.linalg.eigvalsh(np.cov(x.T, bias=True))[::-1] for path, x in data.items()}
    shares = sorted(((v, path) for path, values in shares.items() for v in values / values.sum()), reverse=True)
    kept = [path for _, path in shares[:6]]
    for path in data:
        found_pair = found[path]
        assert found_pair.rank == kept.count(path) and found_pair.scale == 0.5 and not found_pair.b.any()
        x = np.asarray(data[path], np.float64) - data[path].mean(0)
        top = np.linalg.svd(x, full_matrices=False)[2][: found_pair.rank]
        np.testing.assert_allclose(np.abs(top @ np.asarray(found_pair.a)), np.eye(found_pair.rank), atol=1e-3)
    assert eva(variables, adapters, given, rho=1.0)[1]["flat"].rank == 2
    flat = given | {"flat": sums(np.eye(8, dtype=np.float32) * 0 + 1)}  # inputs that never vary explain nothing
    assert list(eva(variables, adapters, flat, rho=2.0)[1]) == ["steep", "two", "head"]


def test_eva_moves_ranks_between_the_layers_of_a_stack_but_not_to_one_left_out():
    data = [of_spread([5.0] + [0.1] * 11, 0), of_spread([1.0] * 12, 1), of_spread([1.0] * 4 + [0.01] * 8, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(sums, data))
    variables, adapters = given("stacked")  # of the ranks 2, 0 and 3
    pair = eva(variables, adapters, {"w": stacked})[1]["w"]
    assert pair.ranks == (1, 0, 4) and pair.a.shape == (3, 12, 4) and pair.b.shape == (3, 4, 8)
    for i, rank in enumerate(pair.ranks):
        np.testing.assert_allclose(pair.a[i].T @ pair.a[i], np.diag([1.0] * rank + [0.0] * (4 - rank)), atol=1e-5)
    np.testing.assert_array_equal(lj.merge(variables, {"w": pair})["w"], variables["w"])


# --- the way back -----------------------------------------------------------------------------------------------------


def model(p, x):
    """A heads kernel, a scan over a stack and a convolution."""
    x = jnp.einsum("btd,dnh->btnh", x, p["heads"]).reshape(x.shape)
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["layers"]["w"])
    x = jax.lax.conv_general_dilated(x, p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return x * p["norm"]


VARIABLES = {
    "heads": normal(0, 8, 2, 4), "layers": {"w": normal(1, 3, 8, 8) / 3}, "conv": normal(2, 3, 8, 8) / 5, "norm": jnp.ones((1, 1, 8)),
}  # fmt: skip
X = normal(3, 4, 5, 8)
TRAINED = {
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
    "corda": lambda v, a: corda(v, a, moments(model, v, a, X), mode="kpm"),
    "lora_ga": lambda v, a: lora_ga(v, a, gradients(lambda p, x: (model(p, x) ** 2).mean(), v, a, [X]), gamma=64.0),
    "loftq": lambda v, a: loftq(v, a, block=None),
    "eva": lambda v, a: eva(v, a, moments(model, v, a, X)),
}


@pytest.mark.parametrize("method", every_other(TRAINED))
def test_what_was_trained_fits_the_original_base(method):
    targets = ["heads", "layers/w"] + ["conv"] * (method not in ("corda", "eva"))  # there are no moments of a convolution
    config = lj.LoraConfig(rank=2, alpha=4, targets=targets, train=["norm"])
    adapters = lj.init(jax.random.key(0), config, model, VARIABLES, X)
    base, initial = TRAINED[method](VARIABLES, adapters)
    apply = jax.jit(lambda v, a: lj.lora(model)(lj.attach(v, a), X))
    if method != "loftq":
        assert distance(apply(base, initial), model(VARIABLES, X)) < 1e-5
    tx = optax.sgd(1e-2)
    loss = lambda params, x, key: ((lj.lora(model)(params, x) - 1.0) ** 2).mean()
    state, step = lj.train.init_state(initial, tx, key=jax.random.key(1)), lj.train.make_train_step(loss, tx)
    for _ in range(3):
        state, _ = step(state, base, X)
    converted = convert(state.adapters, initial)
    original = lj.merge(base, {path: a for path, a in initial.items() if path != "norm"}) if method == "loftq" else VARIABLES
    assert converted["heads"].rank == 2 * initial["heads"].rank
    want = apply(base, state.adapters)
    assert distance(want, apply(base, initial)) > 1e-2
    assert distance(apply(original, converted), want) < 1e-5
    assert distance(lj.merge(original, converted), lj.merge(base, state.adapters)) < 1e-5


# --- errors -----------------------------------------------------------------------------------------------------------


def more(**fields):
    variables, adapters = given("dense")
    return variables, adapters | {"w": dataclasses.replace(adapters["w"], **fields)}


FULL = {"other/head": lj.Full(jnp.ones(3))}
RANDOM = {"direction": "random"}
ERRORS = [
    (lambda: pissa(given("dense")[0], FULL), "no low-rank pair, so there is nothing to initialise"),
    (lambda: pissa(*more(magnitude=jnp.ones(8))), r"w: the adapter's magnitude is set, .*LoraConfig\(init"),
    (lambda: olora(*more(bias=jnp.ones(8))), "w: the adapter's bias is set"),
    (lambda: milora(*more(lambda_d=jnp.ones(3), lambda_b=jnp.ones(8))), "w: the adapter's lambda_d is set"),
    (lambda: pissa(*more(invocation=(1, 2))), "w: the adapter's invocation is set"),
    (lambda: eva(*more(scale=-1.0), moments_of("dense")), r"w: the adapter's scale is -1.0; .* positive"),
    (lambda: pissa({"w": jnp.ones((12, 8), jnp.int8)}, {"w": given("dense")[1]["w"]}), "w: a kernel of the dtype int8"),
    (lambda: milora({"w": jax.ShapeDtypeStruct((12, 8), jnp.float32)}, {"w": given("dense")[1]["w"]}), "w: .* not its shape alone"),
    (lambda: pissa({"v": jnp.ones((12, 8))}, {"w": given("dense")[1]["w"]}), "'w' has no parameter in this tree"),
    (lambda: pissa(*given("dense"), iterations=2), "iterations and key belong together"),
    (lambda: pissa(*given("dense"), key=jax.random.key(0)), "iterations and key belong together"),
    (lambda: pissa(*given("dense"), iterations=-1, key=jax.random.key(0)), "iterations must be at least 0, not -1"),
    (lambda: loftq(*given("dense"), "int3"), "dtype must be one of 'nf4', 'int4', 'int8', not 'int3'"),
    (lambda: loftq(*given("conv")), r"block: the 12 values along the in axes of w \(shape \(2, 2, 3, 8\)\) .* blocks of 64"),
    (lambda: loftq(*given("dense"), block=0), "into blocks of 0"),
    (lambda: loftq(*given("dense"), iterations=0), "iterations must be at least 1, not 0"),
    (lambda: gradients(lambda p, x: 0.0, *given("dense"), []), "batches: there is none"),
    (lambda: lora_ga(*given("dense"), {}), "w: there is no gradient"),
    (lambda: lora_ga(*given("dense"), {"w": jnp.ones((8, 12))}), r"w: the gradient has the shape \(8, 12\), the kernel \(12, 8\)"),
    (lambda: lora_ga(*given("dense"), {"w": jnp.zeros((12, 8))}), r"w: the gradient is zero; lora\(fn\) stops it"),
    (lambda: lora_ga(*given("dense", rank=5), gradient_of("dense")), "w: LoRA-GA takes 2 x 5 directions, .* side is 8"),
    (lambda: lora_ga(*given("dense"), {}, direction="BrAr"), "direction must be one of 'ArB2r'"),
    (lambda: lora_ga(*given("dense"), {}, scale="unity"), "scale must be one of 'stable'"),
    (lambda: lora_ga(*given("dense"), {}, **RANDOM), "direction='random' and key belong together"),
    (lambda: lora_ga(*given("dense"), {}, key=jax.random.key(0)), "direction='random' and key belong together"),
    (lambda: lora_ga(*given("dense"), {}, scale="unit", gamma=2.0), "gamma is a positive number for scale='stable'; it is 2.0"),
    (lambda: lora_ga(*given("dense"), {}, gamma=0.0), "gamma is a positive number"),
    (lambda: eva(*given("dense"), {}), "w: there are no moments of its inputs"),
    (lambda: eva(*given("stacked"), moments_of("dense")), r"w: the second moments have the shape \(12, 12\); .* \(3, 12, 12\)"),
    (lambda: eva(*given("dense"), moments_of("dense"), rho=0.5), "rho must be at least 1, not 0.5"),
    (lambda: corda(*given("dense"), {}, mode="ipm"), "w: there are no moments"),
    (lambda: corda(*given("dense"), moments_of("dense"), mode="imp"), "mode must be 'ipm' or 'kpm', not 'imp'"),
    (lambda: convert(given("dense")[1], FULL), "w: a low-rank pair in one of the two sets only"),
    (lambda: convert(more(bias=jnp.ones(8))[1], given("dense")[1]), "w: an adapter with a bias can't be added"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message[:40] for _, message in ERRORS])
def test_errors_name_the_path_and_the_option(call, message):
    with pytest.raises(ValueError, match=message):
        call()

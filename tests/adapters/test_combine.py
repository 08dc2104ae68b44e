"""Adapters made one: PEFT's results for each method without chance, statistics for the others."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.adapters.combine import combine
from tests.support.identity import distance
from tests.support.marks import every_other
from tests.support.pairs import pair

DATA = pathlib.Path(__file__).parents[1] / "data" / "combine"
GIVEN = load_file(DATA / "adapters.safetensors")
WEIGHTS, ALPHAS, DENSITY = [0.7, -0.4], [6, 9], 0.6


DENSE = lj.Layout((), (0,), (1,))


def given(i, wrap=lambda x: x, layout=DENSE):
    a, b = (wrap(jnp.asarray(GIVEN[f"{i}.{x}"].T)) for x in "ab")
    return {"w": lj.LowRank(a, b, layout, ALPHAS[i] / 3)}


def options(method, majority="total"):
    trimmed = {"density": DENSITY, "majority": majority} if "ties" in method or "prune" in method else {}
    return trimmed | ({"rank": 2} if method.endswith("svd") else {})


@pytest.mark.parametrize("file", sorted(DATA.glob("*-*.safetensors")), ids=lambda file: file.stem)
@pytest.mark.parametrize("stacked", every_other([True, False]))
def test_peft_gets_the_same(file, stacked):
    method, majority = file.stem.split("-")
    want = load_file(file)
    if stacked:  # two layers, the second of twice the change
        layout, double = lj.Layout((0,), (1,), (2,)), lambda x: jnp.stack([x, 2 * x])
        found = combine([given(i, double, layout) for i in (0, 1)], WEIGHTS, method, **options(method, majority))["w"]
        delta = found.delta()
        np.testing.assert_allclose(delta[1], 4 * delta[0], atol=1e-4)  # every method is of the first degree in A and in B
        delta = delta[0]
    else:
        found = combine([given(0), given(1)], WEIGHTS, method, **options(method, majority))["w"]
        delta = found.delta()
        if not method.endswith("svd"):
            rank = found.rank
            np.testing.assert_allclose(found.a.T @ jnp.eye(7), want["a"][:rank] if method != "cat" else found.a.T, atol=1e-5)
    assert found.scale == 1.0
    assert distance(delta.T, want["delta"]) < 1e-5


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_one_adapter_keeps_its_sign_and_scale(method):
    """A weight of -1 takes the change off again; the scale of rsLoRA is in the factors, whatever is said of the result."""
    change = given(0)["w"].delta()
    for weight in (1.0, -1.0):
        np.testing.assert_allclose(combine([given(0)], [weight], method)["w"].delta(), weight * change, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "svd"])
def test_several_ranks_are_saved_and_read_again(method, tmp_path):
    """Each parameter with pairs of a rank of its own, through PEFT's files."""
    sets = [{"w": pair("dense", i, 3), "v": pair("dense", i, 2)} for i in (0, 1)]
    both = combine(sets, WEIGHTS, method, **options(method) if method != "svd" else {})
    names = {name: lj.peft.HFName(f"model.{name}.weight", "i o -> o i") for name in "wv"}
    lj.peft.save(tmp_path, both, names=names)
    base = jax.tree.map(lambda one: jnp.zeros_like(one.delta()), both, is_leaf=lambda node: isinstance(node, lj.LowRank))
    found = lj.peft.load(tmp_path, base, names=names)
    assert {name: one.rank for name, one in found.items()} == {name: one.rank for name, one in both.items()}
    for name, one in found.items():
        np.testing.assert_allclose(one.delta(), both[name].delta(), atol=1e-5)


def test_svd_is_the_truncated_sum():
    sets = [{"w": pair("stacked", 0, 3)}, {"w": pair("stacked", 1, 2)}]
    total = 0.5 * sets[0]["w"].delta() + 2.0 * sets[1]["w"].delta()
    u, s, vt = jnp.linalg.svd(total, full_matrices=False)
    for rank, kept in ((None, 3), (2, 2)):
        want = (u[..., :kept] * s[:, None, :kept]) @ vt[:, :kept]
        np.testing.assert_allclose(combine(sets, [0.5, 2.0], "svd", rank=rank)["w"].delta(), want, atol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_random_methods(method):
    key = jax.random.key(0)
    sets = [{"w": pair("dense", 0), "v": pair("dense", 0)}, {"w": pair("dense", 1)}]
    whole = combine(sets, WEIGHTS, method, density=1.0, key=key)
    plain = {"dare_linear": "linear", "dare_linear_svd": "svd", "dare_ties": "ties", "dare_ties_svd": "ties_svd"}[method]
    want = combine(sets, WEIGHTS, plain, **({"density": 1.0} if "ties" in plain else {}))
    for path in ("w", "v"):
        np.testing.assert_allclose(whole[path].delta(), want[path].delta(), atol=1e-4)
    one, two = (combine(sets, WEIGHTS, method, density=0.5, key=key)["w"].delta() for _ in range(2))
    other = combine(sets, WEIGHTS, method, density=0.5, key=jax.random.key(1))["w"].delta()
    np.testing.assert_array_equal(one, two)
    assert float(jnp.abs(one - other).max()) > 1e-3


def test_dropping_keeps_the_mean():
    sets = [{"w": pair("dense", 0)}]
    draws = [combine(sets, [1.0], "dare_linear", density=0.7, key=jax.random.key(i))["w"].a for i in range(300)]
    want = combine(sets, [1.0], "linear")["w"].a
    np.testing.assert_allclose(jnp.stack(draws).mean(0), want, atol=0.25)
    assert 0.6 < float((draws[0] != 0).mean()) < 0.9 or draws[0].size < 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "average"}, "method must be one of 'linear', 'cat'"),
        ({"weights": [1.0]}, "there are 2 adapter sets and 1 weights"),
        ({"method": "ties"}, "needs a density above 0"),
        ({"method": "ties", "density": 1.5}, "needs a density above 0 and at most 1, not 1.5"),
        ({"method": "dare_linear", "density": 0.5}, "drops values at random: give it a key"),
        ({"method": "linear", "density": 0.5}, "has no use for density"),
        ({"method": "linear", "rank": 2}, "has no use for rank"),
        ({"majority": "most"}, "majority must be 'total' or 'frequency'"),
        (
            {"method": "linear", "sets": [{"w": pair("dense", 0, 2)}, {"w": pair("dense", 0, 3)}]},
            r"w: pairs of the ranks \[2, 3\]",
        ),
        ({"sets": [{"w": lj.Full(jnp.ones((6, 5)))}, {}]}, "w: a Full adapter can't be scaled"),
    ],
)
def test_bad_options(changes, message):
    sets = [{"w": pair("dense", 0)}, {"w": pair("dense", 1)}]
    arguments = {"sets": sets, "weights": [1.0, 1.0], "method": "svd"} | changes
    with pytest.raises(ValueError, match=message):
        combine(arguments.pop("sets"), arguments.pop("weights"), arguments.pop("method"), **arguments)

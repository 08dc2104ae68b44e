"""Adapters as changes: sums, multiples, truncation, spectra, and the extraction from a full fine-tune."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters import algebra
from tests.support.marks import every_other
from tests.support.pairs import LAYOUTS, matrices, pair


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_and_multiples_are_exact(name):
    one, two = pair(name, 0, 3, 0.7), pair(name, 1, 2, -0.3)
    total = algebra.add({"w": one}, {"w": two}, {"v": two})
    assert total["w"].rank == 5 and set(total) == {"w", "v"}
    close(total["w"].delta(), one.delta() + two.delta())
    close(total["v"].delta(), two.delta())
    close(algebra.scale({"w": one}, -2.5)["w"].delta(), -2.5 * one.delta())
    close(algebra.add({"w": one}, algebra.negate({"w": one}))["w"].delta(), 0 * one.delta())
    mixed = algebra.interpolate({"w": one}, {"w": two}, 0.25)
    close(mixed["w"].delta(), 0.75 * one.delta() + 0.25 * two.delta())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("rank", every_other([1, 2, 7, 3]))
def test_truncation_is_the_best_there_is(name, rank):
    """Its error is that of the tail of A B's singular values, whatever the layout."""
    whole = pair(name)
    found = algebra.truncate({"w": whole}, rank=rank)["w"]
    assert found.rank == min(rank, 3) and found.scale == whole.scale
    change = matrices(whole.delta(), whole.layout)
    values = np.linalg.svd(change, compute_uv=False)
    error = np.linalg.norm(matrices(found.delta(), whole.layout) - change, axis=(1, 2))
    close(error, np.sqrt((values[:, rank:] ** 2).sum(-1)))
    jitted = jax.jit(lambda a: algebra.truncate(a, rank=rank))({"w": whole})["w"]
    close(jitted.delta(), found.delta())


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_truncation_to_an_energy_has_a_rank_for_each_matrix(energy):
    whole = pair("stacked")
    found = algebra.truncate({"w": whole}, energy=energy)["w"]
    squares = np.linalg.svd(matrices(whole.delta(), whole.layout), compute_uv=False)[:, :3] ** 2
    share = np.cumsum(squares, -1) / squares.sum(-1, keepdims=True)
    want = 1 + (share < energy - 1e-6).sum(-1)
    assert (found.ranks or (found.rank,) * 3) == tuple(want) and found.rank == want.max()
    left = (matrices(found.delta(), whole.layout) ** 2).sum((1, 2)) / squares.sum(-1)
    assert (left >= energy - 1e-5).all()


def test_truncation_keeps_excluded_layers_out():
    whole = pair("stacked", ranks=(3, 0, 2))
    whole = dataclasses.replace(whole, a=whole.a.at[1].set(0), b=whole.b.at[1].set(0).at[2, 2].set(0))
    found = algebra.truncate({"w": whole}, rank=2)["w"]
    assert found.ranks == (2, 0, 2)
    assert float(jnp.abs(found.delta()[1]).max()) == 0


@pytest.mark.parametrize("options", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_truncation_needs_one_measure(options):
    with pytest.raises(ValueError, match=r"exactly one of the two|must be"):
        algebra.truncate({"w": pair("dense")}, **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_spectra(name):
    scale = jnp.arange(1.0, 4.0) if name == "stacked" else 0.7
    whole = pair(name, scale=scale)
    got = algebra.singular_values({"w": whole, "head": lj.Full(jnp.ones(3))})
    assert set(got) == {"w"}
    want = np.linalg.svd(matrices(whole.delta(), whole.layout), compute_uv=False)[:, :3]
    np.testing.assert_allclose(np.asarray(got["w"]).reshape(want.shape), want, rtol=1e-5)
    entropy = lambda p: -(p * np.log(p)).sum(-1)
    effective = np.exp(entropy(want / want.sum(-1, keepdims=True)))
    np.testing.assert_allclose(np.ravel(algebra.effective_rank(got["w"])), effective, rtol=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_difference_of_low_rank_is_found_again(name):
    shape, _ = LAYOUTS[name]
    whole = pair(name)
    base = {"w": jax.random.normal(jax.random.key(5), shape), "head": jnp.ones(3)}
    tuned = {**lj.merge({"w": base["w"]}, {"w": whole}), "head": jnp.arange(3.0)}
    template = jax.eval_shape(lambda: {"w": pair(name, 9, 3, -2.0), "head": lj.Full(jnp.ones(3))})
    found = algebra.difference(template, base, tuned)
    close(found["w"].delta(), whole.delta())
    close(found["head"].value, jnp.arange(3.0))
    assert found["w"].scale == -2.0 and found["w"].a.shape == whole.a.shape


def test_padding_and_folding_share_one_program():
    """Sets of different ranks, alphas, dropouts and methods run through one compiled function."""
    model = lambda p, x: x @ p["w"]
    params, x = {"w": jnp.ones((6, 5))}, jnp.ones((2, 6))
    traces = 0

    @jax.jit
    def run(adapters, x):
        nonlocal traces
        traces += 1
        return lj.lora(model)(lj.attach(params, adapters), x)

    lora_fa, vera = {"frozen": ("a",)}, {"lambda_d": jnp.arange(4.0), "lambda_b": jnp.arange(5.0), "frozen": ("a", "b")}
    methods = {(0, 1, 0.5): {}, (1, 3, 2.0): {"dropout": 0.1}, (2, 4, -1.0): lora_fa, (3, 4, 1.0): vera}
    for shape, method in methods.items():
        adapters = {"w": pair("dense", *shape, **method)}
        ready = algebra.pad_rank(algebra.fold_scale(adapters), 4)
        close(run(ready, x), x @ lj.merge(params, adapters)["w"])
    assert traces == 1
    with pytest.raises(ValueError, match="w: the pair has rank 3, above 2"):
        algebra.pad_rank({"w": pair("dense")}, 2)


@pytest.mark.parametrize(
    ("adapter", "what"),
    [
        (lj.Full(jnp.ones((6, 5))), "a Full adapter"),
        (pair("dense", magnitude=jnp.ones(5)), "an adapter with a magnitude"),
        (pair("dense", bias=jnp.ones(5)), "an adapter with a bias"),
    ],
)
def test_what_is_more_than_a_change_is_refused(adapter, what):
    for verb, apply in (("scaled", lambda s: algebra.scale(s, 2.0)), ("added", lambda s: algebra.add(s, s))):
        with pytest.raises(ValueError, match=f"w: {what} can't be {verb}"):
            apply({"w": adapter})


def test_other_layouts_are_not_added():
    with pytest.raises(ValueError, match="w: pairs of different layouts, dropouts or branch dtypes can't be added"):
        algebra.add({"w": pair("dense")}, {"w": pair("transposed")})

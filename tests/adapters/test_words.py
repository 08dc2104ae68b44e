"""What `targets="all-linear"` takes of a model as it is, what it passes over, and where that is said."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lj
from tests.support.frontends import normal

KEY = jax.random.key(0)


def init(fn, variables, *args, **options):
    on_unsupported = options.pop("on_unsupported", "error")
    return lj.init(KEY, lj.LoraConfig(**{"rank": 2, **options}), fn, variables, *args, on_unsupported=on_unsupported)


def assert_merged_alike(fn, variables, adapters, *args, **options):
    """Equal to the merged weights, with a B that is not zero."""
    trained = {path: jax.tree.map(lambda leaf: leaf + 0.1, adapter) for path, adapter in adapters.items()}
    got = lj.lora(fn, **options)(lj.attach(variables, trained), *args)
    np.testing.assert_allclose(got, fn(lj.merge(variables, trained), *args), rtol=2e-5, atol=2e-5)


# --- what is no parameter ---------------------------------------------------------------------------------------------


def fourier(variables, x):
    return x @ variables["constants"]["fourier"] @ variables["params"]["dense"]["kernel"]


FOURIER = {"constants": {"fourier": normal(0, 8, 8)}, "params": {"dense": {"kernel": normal(1, 8, 8)}}}


def test_a_linen_collection_beside_params_is_left_alone_unless_named():
    x = normal(2, 3, 8)
    assert list(init(fourier, FOURIER, x)) == ["params/dense/kernel"]
    assert list(init(fourier, FOURIER, x, targets=["fourier"])) == ["constants/fourier"]
    found = lj.explain(fourier, FOURIER, x)
    assert found.passed_over == {"constants/fourier": "it is no parameter but of the collection `constants`"}
    pair = {"agent": FOURIER, "critic": FOURIER}
    adapters = init(lambda p, x: fourier(p["agent"], x) + fourier(p["critic"], x), pair, x)
    assert list(adapters) == ["agent/params/dense/kernel", "critic/params/dense/kernel"]


def test_spectral_norm_of_linen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5)(nn.SpectralNorm(nn.Dense(6))(x, update_stats=False))

    model, x = Model(), normal(0, 3, 4)
    variables = model.init(KEY, x)
    adapters = init(model.apply, variables, x)
    assert list(adapters) == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
    assert not any(path.startswith("batch_stats") for path in lj.summary(variables, adapters).unadapted)


def test_nnx_variables_that_are_no_params():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.basis = nnx.Variable(jnp.ones((4, 4)))

        def __call__(self, x):
            return self.dense(x @ self.basis[...])

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    fn, x = lambda state, x: nnx.merge(graph, state)(x), normal(0, 2, 4)
    assert list(init(fn, state, x)) == ["dense/kernel"]
    assert lj.explain(fn, state, x).passed_over == {"basis": "it is no parameter but of an nnx.Variable"}


def test_an_nnx_module_with_an_attribute_named_params():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.params = nnx.Dict(dense=nnx.Linear(4, 4, rngs=rngs))
            self.head = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.head(self.params["dense"](x))

    fn, state = lj.nnx.functional(Model(nnx.Rngs(0)))
    assert list(init(fn, state, normal(0, 2, 4))) == ["head/kernel", "params/dense/kernel"]


# --- small parameters and kernels behind rules of their own -----------------------------------------------------------


def gated(p, x):
    return x @ p["w"] * jax.nn.softplus(p["s"])


GATED = {"w": normal(0, 4, 4), "s": normal(1, 1, 4)}


def test_a_scale_that_goes_through_a_custom_rule_is_passed_over(caplog):
    x = normal(2, 3, 4)
    with caplog.at_level(logging.INFO, "lora_jax"):
        adapters = init(gated, GATED, x)
    assert list(adapters) == ["w"]
    assert_merged_alike(gated, GATED, adapters, x)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "s (1, 4): `custom_jvp_call` at " in record.getMessage()
    found = lj.explain(gated, GATED, x)
    assert list(found.passed_over) == ["s"]
    assert found.parameters["s"].kind == "other"
    assert str(lj.summary(GATED, adapters)).endswith("\nwithout an adapter:\n  s 1x4")


@jax.custom_vjp
def opaque(x, w):
    return x @ w


opaque.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))


def test_a_matrix_behind_a_custom_rule_is_passed_over_with_a_warning(caplog):
    p, x = {"a": normal(0, 5, 5), "w": normal(0, 5, 5)}, normal(2, 3, 5)
    assert list(init(lambda p, x: opaque(x @ p["a"], p["w"]), p, x)) == ["a"]
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "w (5, 5): `custom_vjp_call`" in record.getMessage()
    with pytest.raises(
        ValueError, match=r"also used in a way that is not low-rank(?s:.*)\n  w (?s:.*)on_unsupported='materialize'"
    ):
        init(lambda p, x: opaque(x @ p["a"], p["w"]) @ p["w"], p, x)  # a kernel by another use


# --- kernels that are formed where they are used ----------------------------------------------------------------------


def test_materialize_takes_a_named_kernel_with_the_layout_that_is_said():
    p, x = {"a": normal(0, 5, 4), "w": normal(0, 6, 4)}, normal(2, 3, 5)
    fn = lambda p, x: opaque(x @ p["a"], p["w"].T)
    materialize = {"targets": ["w"], "on_unsupported": "materialize"}
    with pytest.raises(ValueError, match=r"pattern 'w' matches only .*\n  w \(6, 4\): .*\n.*on_unsupported='materialize'"):
        init(fn, p, x, targets=["w"])
    with pytest.raises(ValueError, match=r"layouts: the use of w of the shape \(6, 4\) does not tell .*layouts={'w': lora_jax"):
        init(fn, p, x, **materialize)
    with pytest.raises(ValueError, match=r"layouts: w of the shape \(6, 4\) has 2 axes; the Layout.* does not name each"):
        init(fn, p, x, **materialize, layouts={"w": lj.Layout((), (0,), (2,))})
    adapters = init(fn, p, x, **materialize, layouts={"w": lj.Layout((), (1,), (0,))})
    assert (adapters["w"].a.shape, adapters["w"].b.shape) == ((4, 2), (2, 6))
    assert_merged_alike(fn, p, adapters, x, on_unsupported="materialize")


@pytest.mark.parametrize("targets", ["all-linear", ["w"]])
def test_materialize_takes_a_kernel_by_its_products(targets):
    p, x = {"w": normal(0, 5, 5)}, normal(2, 3, 5)
    fn = lambda p, x: opaque(x, p["w"]) @ p["w"]
    adapters = init(fn, p, x, targets=targets, on_unsupported="materialize")
    assert adapters["w"].layout == lj.Layout((), (0,), (1,))
    assert_merged_alike(fn, p, adapters, x, on_unsupported="materialize")
    with pytest.raises(ValueError, match=r"layouts: by its use w .*take it out of layouts"):
        init(fn, p, x, targets=targets, on_unsupported="materialize", layouts={"w": lj.Layout((), (1,), (0,))})


def test_layouts_in_a_configuration():
    config = lj.LoraConfig(layouts={"w": lj.Layout((0,), (1,), (2, 3))})
    assert lj.LoraConfig.from_json(config.to_json()) == config
    assert lj.LoraConfig(layouts={"w": {"batch": [0], "inputs": [1], "outputs": [2, 3]}}) == config
    for wrong in ((0, 1), {"batch": []}, {"batch": [0], "inputs": ["a"], "outputs": []}):
        with pytest.raises(ValueError, match=r"layouts\['w'\]"):
            lj.LoraConfig(layouts={"w": wrong})


# --- small outputs ----------------------------------------------------------------------------------------------------


def routed(p, x):
    return x @ p["up"] @ p["head"] + x @ p["router"]


ROUTED = {"up": normal(0, 16, 16), "head": normal(1, 16, 3), "router": normal(2, 16, 1)}


@pytest.mark.parametrize("start,ranks", [("kaiming", {"head": 3, "router": 1, "up": 8}), ("orthogonal", {"head": 2, "up": 8})])
def test_small_outputs_get_what_they_can_hold(start, ranks, caplog):
    x = normal(3, 2, 16)
    with caplog.at_level(logging.INFO, "lora_jax"):
        adapters = init(routed, ROUTED, x, rank=8, init=start)
    assert {path: adapter.rank for path, adapter in adapters.items()} == ranks
    assert adapters["head"].scale == 16 / ranks["head"]
    assert_merged_alike(routed, ROUTED, adapters, x)
    (record,) = caplog.records
    assert (
        f"head (16, 3): rank 8 is above its smaller side (16 in, 3 out), so that it gets rank {ranks['head']}" in record.message
    )
    with pytest.raises(ValueError, match="rank: 8 is above the smaller side of router"):
        init(routed, ROUTED, x, rank=8, targets=["router"])


def test_vera_has_one_rank_and_leaves_small_outputs_out():
    assert list(init(routed, ROUTED, normal(3, 2, 16), rank=8, method="vera")) == ["up"]


# --- experts ----------------------------------------------------------------------------------------------------------


def mixture(p, x):
    hidden = jax.nn.relu(jnp.einsum("td,edf->tef", x, p["moe"]["gate"]))
    return jnp.einsum("tef,efd->ted", hidden, p["moe"]["down"]).sum(1) @ p["out"]


MIXTURE = {"moe": {"gate": normal(0, 4, 8, 6), "down": normal(1, 4, 6, 8)}, "out": normal(2, 8, 8)}


def test_experts_that_share_a_factor_beside_others_that_do_not():
    x = normal(3, 5, 8)
    with pytest.warns(UserWarning, match=r"moe/gate: .*batch_axes={'moe/gate': \[0\]}") as caught:
        adapters = init(mixture, MIXTURE, x)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert adapters["moe/gate"].a.shape == (8, 2)
    assert_merged_alike(mixture, MIXTURE, adapters, x)
    each = init(mixture, MIXTURE, x, batch_axes={"moe/gate": [0]})  # no warning: warnings are errors
    assert each["moe/gate"].a.shape == (4, 8, 2)
    assert init(mixture, MIXTURE, x, batch_axes={"moe/gate": []})["moe/gate"].a.shape == (8, 2)
    assert list(init(mixture, MIXTURE, x, targets=["down"])) == ["moe/down"]


# --- how long it takes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,most",
    [
        ({}, 1),
        ({"targets": ["re:.*"]}, 2),
        ({"init": "orthogonal"}, 3),
        ({"method": "vera"}, 3),
        ({"dora": True}, 2),
        ({"dora": True, "targets": ["re:.*"]}, 3),
        ({"targets": ["w0"], "train": ["re:w[1-9].*", "table"]}, 2),
    ],
)
def test_any_number_of_shapes_takes_few_programs(options, most, caplog):
    p = {f"w{i}": np.ones((20 + i, 21 + i), np.float32) for i in range(11)} | {"table": np.ones((9, 20), np.float32)}

    def fn(p, ids):
        x = p["table"][ids]
        for i in range(11):
            x = x @ p[f"w{i}"]
        return x

    key = jax.random.fold_in(KEY, 1)
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, "jax"):
        adapters = lj.init(key, lj.LoraConfig(rank=4, **options), fn, p, np.zeros(3, np.int32))
    assert len(adapters) == 11 + ("table" in adapters)
    assert sum("Finished XLA compilation" in record.getMessage() for record in caplog.records) <= most


def test_a_key_gives_the_same_alone_and_beside_others():
    """The stream is cut in blocks, of which a large kernel takes several."""
    p = {"small": jnp.ones((6, 4)), "large": jnp.ones((9000, 6)), "other": jnp.ones((4, 9000))}
    fn = lambda p, x: x @ p["large"] @ p["small"] @ p["other"]
    x = jnp.ones((1, 9000))
    many, few = init(fn, p, x), init(fn, p, x, targets=["large"])
    np.testing.assert_array_equal(many["large"].a, few["large"].a)
    bound = 1 / np.sqrt(6)
    drawn = jax.random.uniform(jax.random.fold_in(KEY, 1967516179), (6, 2), minval=-bound, maxval=bound)
    np.testing.assert_array_equal(many["small"].a, drawn)
    values = np.asarray(many["large"].a)
    assert len(np.unique(values)) > 0.99 * values.size  # no block is drawn twice

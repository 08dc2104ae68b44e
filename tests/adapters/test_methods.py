"""The contract of each method (`LoraConfig`'s variants): against merged weights under jit, vmap, a scan, bf16 and checkpoints."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.adapters.config import SINCE
from lora_jax.core import jax_compat
from tests.support.frontends import normal
from tests.support.identity import BF16, F32, distance, random_adapters, value_and_grads
from tests.support.marks import slow_unless

IDS = jnp.array([[1, 7, 8, 2, 5], [7, 8, 3, 7, 8], [8, 7, 0, 10, 4]])
METHODS = {
    "lora": {},
    "rslora": {"scaling": "rslora"},
    "lora_fa": {"method": "lora_fa"},
    "vera": {"method": "vera"},
    "dora": {"dora": True},
    "lora_bias": {"lora_bias": True},
    "dora_fa_bias": {"dora": True, "lora_bias": True, "method": "lora_fa"},
    "orthogonal": {"init": "orthogonal", "rank": 4},
    "rows": {"trainable_token_indices": {"embed": [2, 7]}},
    "embedding_dora": {"dora": True, "targets": ["embed", "up"]},
    "whole": {"train": ["bias"]},
    "alora": {"alora_invocation_tokens": [7, 8]},
    "alora_dora_bias": {"alora_invocation_tokens": [7, 8], "dora": True, "lora_bias": True},
}


def layer(x, p):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"].reshape(1, 1, -1))
    return jnp.einsum("btnh,nhd->btd", h.reshape(*h.shape[:2], 2, 4), p["down"]["kernel"]) + p["down"]["bias"].reshape(1, 1, -1)


def stacked(params, ids):
    x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), params["embed"][ids], params["layers"])
    return x @ params["embed"].T


def unrolled(params, ids):
    return layer(params["embed"][ids], params["layers"]) @ params["embed"].T


@functools.cache
def prepare(method, form, dtype=F32):
    """The model, its variables and moved adapters."""
    lead = () if form == "unrolled" else (3,)
    half = lambda i, *shape: jnp.asarray(np.asarray(normal(i, *shape)) / 2, dtype)
    variables = {
        "embed": half(0, 11, 6),
        "layers": {
            "up": {"kernel": half(1, *lead, 6, 8), "bias": half(2, *lead, 8)},
            "down": {"kernel": half(3, *lead, 2, 4, 6), "bias": half(4, *lead, 6)},
        },
    }
    fn = unrolled if form == "unrolled" else stacked
    options = {"rank": 3, "alpha": 5.0} | METHODS[method] | ({"layers": [0, 2]} if form == "some_layers" else {})
    if options.get("method") == "vera":
        del options["alpha"]
    config = lj.LoraConfig(**options)
    adapters = jax.jit(lambda key, variables: lj.init(key, config, fn, variables, IDS))(jax.random.key(0), variables)
    return fn, variables, adapters, config


def moved(adapters):
    """Trained leaves moved off their start, frozen ones as they are."""
    other = random_adapters(adapters, F32)
    add = lambda label, x, y: jnp.asarray(np.asarray(x) + np.asarray(y)) if label == "adapter" else x
    return jax.tree.map(add, lj.labels(adapters), adapters, other)


def active(method, ids=IDS):
    return lj.active_from(ids, [7, 8]) if "alora" in method else None


def oracle(method, fn, variables, adapters, ids=IDS):
    """Merged weights; where an adapter with an invocation sequence does not act (tokens do not mix here), the base's."""
    free = {p: dataclasses.replace(a, invocation=None) if isinstance(a, lj.LowRank) else a for p, a in adapters.items()}
    merged = fn(lj.merge(variables, free), ids)
    return merged if "alora" not in method else jnp.where(active(method, ids)[..., None], merged, fn(variables, ids))


# One of each kind of arrays that a method has; the mixtures of them are slow.
KINDS = ("lora", "lora_fa", "vera", "dora_fa_bias", "rows", "embedding_dora", "alora")
EACH_KIND = slow_unless(lambda method: method in KINDS, METHODS)


# An embedding is in no layer. A stack of which some layers are adapted stands for one of which all are.
CASES = slow_unless(
    lambda case: (
        case[1] == "unrolled" or case == ("embedding_dora", "stacked") or (case[1] == "some_layers" and case[0] in KINDS)
    ),
    [
        (method, form)
        for method in METHODS
        for form in ("unrolled", "stacked", "some_layers")
        if (method, form) != ("embedding_dora", "some_layers")
    ],
)


@pytest.mark.parametrize(("method", "form"), CASES)
def test_equals_merged_weights(method, form):
    fn, variables, adapters, _ = prepare(method, form)
    ours = lambda a: lj.lora(fn, active=active(method))(lj.attach(variables, a), IDS)
    start = jax.jit(ours)(adapters)
    assert distance(start, jax.jit(fn)(variables, IDS)) < 1e-6  # step 0 is the base
    adapters = moved(adapters)
    run = lambda fn: jax.jit(lambda a: value_and_grads(fn, a))(adapters)
    got, want = run(ours), run(lambda a: oracle(method, fn, variables, a))
    trained = lambda grads: jax.tree.map(lambda label, g: g if label == "adapter" else 0 * g, lj.labels(grads), grads)
    assert distance(got[0], want[0]) < 1e-5
    assert distance(got[1], trained(want[1])) < 1e-5
    assert distance(got[0], start) > 1e-2


@pytest.mark.parametrize("form", [pytest.param("unrolled", marks=pytest.mark.slow), "stacked"])
@pytest.mark.parametrize("method", EACH_KIND)
def test_vmap(method, form):
    """Over the input alone, and over input and adapters."""
    fn, variables, adapters, _ = prepare(method, form)
    adapters, rows = moved(adapters), jnp.stack([IDS[:2], IDS[1:]])
    ours = lambda a, ids: lj.lora(fn, active=active(method, ids))(lj.attach(variables, a), ids)
    merged = jax.jit(lambda a, ids: oracle(method, fn, variables, a, ids))
    want = np.stack([merged(adapters, ids) for ids in rows])
    np.testing.assert_allclose(jax.jit(jax.vmap(ours, (None, 0)))(adapters, rows), want, atol=2e-5)
    twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), adapters)
    np.testing.assert_allclose(jax.jit(jax.vmap(ours))(twice, rows), want, atol=2e-5)


@pytest.mark.parametrize("form", ["unrolled", pytest.param("stacked", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", EACH_KIND)
def test_bfloat16_base(method, form):
    """A base of bfloat16 under adapters of float32 gives bfloat16, near what float32 gives."""
    fn, variables, adapters, _ = prepare(method, form, BF16)
    adapters = moved(adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    got = jax.jit(lambda a: lj.lora(fn, active=active(method))(lj.attach(variables, a), IDS))(adapters)
    wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(F32)), variables)
    exact = jax.jit(lambda v, a: oracle(method, fn, v, a))(wide, adapters)
    assert got.dtype == BF16
    assert distance(got.astype(F32), exact) < 3e-2


@pytest.mark.parametrize("method", EACH_KIND)
def test_training_moves_what_is_trained_and_checkpoints_hold_it_all(method, tmp_path, lenient):
    fn, variables, adapters, config = prepare(method, "stacked")
    loss = lambda params, ids, key: jnp.mean(lj.lora(fn, active=active(method), key=key)(params, ids) ** 2)
    tx = optax.adamw(1e-2)
    state = lj.train.init_state(adapters, tx, key=jax.random.key(1))
    step = lj.train.make_train_step(loss, tx)
    for _ in range(2):
        state, metrics = step(state, variables, IDS)
    assert np.isfinite(metrics["loss"])
    same = jax.tree.map(lambda x, y: bool((x == y).all()), adapters, state.adapters)
    for label, kept in zip(jax.tree.leaves(lj.labels(adapters)), jax.tree.leaves(same), strict=True):
        assert kept == (label == "frozen")
    lj.checkpoint.save(tmp_path, state.adapters, config=config, step=2)
    again = lj.checkpoint.restore(tmp_path)
    assert again.config == config
    assert jax.tree.structure(again.adapters) == jax.tree.structure(state.adapters)
    jax.tree.map(np.testing.assert_array_equal, again.adapters, state.adapters)


@pytest.mark.parametrize("form", [pytest.param("unrolled", marks=pytest.mark.slow), "stacked"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_a_kernels_shape_is_made(method, form):
    """Forward and backward, every value of the kernels' shapes is one of the base's own, as plain LoRA has them too."""

    def shapes(method):
        fn, variables, adapters, _ = prepare(method, form)
        kernels = {variables["layers"][name]["kernel"].shape for name in ("up", "down")}
        kernels |= {shape[1:] for shape in kernels if form == "stacked"}
        apply = lj.lora(fn, active=active(method))
        jaxpr = jax.make_jaxpr(jax.grad(lambda a: jnp.sum(apply(lj.attach(variables, a), IDS) ** 2)))(adapters)
        return sum(getattr(v.aval, "shape", None) in kernels for eqn in equations(jaxpr) for v in eqn.outvars)

    assert shapes(method) <= shapes("lora")


def equations(jaxpr):
    for eqn in jax_compat.open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(jax_compat.open_jaxpr(inner)[0], "eqns"):
                    yield from equations(inner)


def test_vera_shares_its_matrices():
    _, variables, adapters, _ = prepare("vera", "stacked")
    up, down = (adapters[f"layers/{name}/kernel"] for name in ("up", "down"))
    np.testing.assert_array_equal(up.a, down.a.reshape(3, 8, 3)[:, :6])  # rows of the same matrix
    np.testing.assert_array_equal(up.b[..., :6], down.b)
    np.testing.assert_array_equal(up.a[0], up.a[2])
    bound = (6 / 8) ** 0.5
    assert 0.8 * bound < float(jnp.abs(down.a).max()) <= bound
    assert lj.summary(variables, adapters).trainable == 3 * (3 + 8 + 3 + 6)
    twin = lj.init(jax.random.key(0), lj.LoraConfig(rank=3, method="vera"), lambda p, x: x @ p["v"] @ p["w"],
                   {"v": jnp.ones((5, 5)), "w": jnp.ones((5, 5))}, jnp.ones((2, 5)))  # fmt: skip
    assert twin["v"].a is twin["w"].a and twin["v"].b is twin["w"].b


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "vera", "dora": True}, "method='vera' trains a scale for each output already"),
        ({"method": "vera", "lora_bias": True}, "leave dora and lora_bias out"),
        ({"method": "vera", "alpha": 4}, "method='vera' has no use for alpha"),
        ({"method": "vera", "scaling": "rslora", "init": "gaussian"}, "no use for scaling, init"),
        ({"method": "vera", "rank_pattern": {"up": 2}}, "no use for rank_pattern"),
        ({"d_initial": 0.5}, "d_initial is for method='vera' only"),
        ({"method": "lora_fa", "init": "orthogonal", "rank": 4}, "method='lora_fa' needs an init with B zero"),
        ({"method": "fa"}, "method must be one of 'lora', 'lora_fa', 'vera', not 'fa'"),
        ({"dora": 1}, "dora must be True or False, not 1"),
        ({"trainable_token_indices": {"embed": []}}, r"trainable_token_indices\['embed'\] must be a non-empty list"),
        ({"trainable_token_indices": {"embed": [3, 3]}}, "names an index twice"),
        ({"trainable_token_indices": ["embed"]}, "trainable_token_indices must be a dict"),
        ({"alora_invocation_tokens": []}, "alora_invocation_tokens must be a non-empty list of token ids"),
        ({"alora_invocation_tokens": [1, -2]}, "alora_invocation_tokens must be whole numbers of at least 0"),
        ({"d_initial": 0.0, "method": "vera"}, "d_initial must be finite and not zero"),
        (
            {"targets": [], "train": ["head"], "dora": True, "dropout": 0.1},
            "dora, dropout is for low-rank pairs, but targets is empty",
        ),
    ],
)
def test_configurations_that_can_not_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lj.LoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "lora_fa", "targets": ["embed"]},
            "method: embed is an embedding, for which method='lora_fa' does not work",
        ),
        ({"method": "vera", "targets": ["embed"]}, "method: embed is an embedding"),
        ({"lora_bias": True, "targets": ["embed"]}, "lora_bias: embed is an embedding"),
        ({"alora_invocation_tokens": [1], "targets": ["embed"]}, "alora_invocation_tokens: embed is an embedding"),
        (
            {"trainable_token_indices": {"up/bias": [1]}},
            r"layers/up/bias of the shape \(8,\) is neither an embedding nor a head",
        ),
        ({"trainable_token_indices": {"embed": [11]}}, r"embed of the shape \(11, 6\) has 11 rows, so there is no row 11"),
        ({"trainable_token_indices": {"embed": [1]}, "train": ["embed"]}, "embed is in train, or named twice"),
        (
            {"trainable_token_indices": {"embed": [1]}, "targets": ["embed"]},
            "everything that the pattern 'embed' matches is in",
        ),
    ],
)
def test_methods_that_do_not_fit_a_parameter_are_refused(options, message):
    _, variables, _, _ = prepare("lora", "unrolled")
    with pytest.raises(ValueError, match=message):
        lj.init(jax.random.key(0), lj.LoraConfig(rank=3, **options), unrolled, variables, IDS)


def test_an_invocation_sequence_is_never_ignored():
    fn, variables, adapters, _ = prepare("alora", "unrolled")
    params = lj.attach(variables, adapters)
    with pytest.raises(ValueError, match="layers/up/kernel act from an invocation sequence on"):
        lj.lora(fn)(params, IDS)
    with pytest.raises(ValueError, match=r"layers/down/kernel, layers/up/kernel: an adapter that acts from .* can't be merged"):
        lj.merge(variables, adapters)
    with pytest.raises(ValueError, match="an adapter with an invocation sequence can't be scaled"):
        lj.algebra.scale(adapters, 2.0)
    with pytest.raises(
        lj.NotLowRankError, match=r"`active` has the shape \(3, 4\), but the rows of this product's input are \(3, 5\)"
    ):
        lj.lora(fn, active=jnp.ones((3, 4), bool))(params, IDS)
    for wrong in (IDS, jnp.ones(3, bool), [[True]], True):
        with pytest.raises(ValueError, match="`active` must be an array of booleans"):
            lj.lora(fn, active=wrong)(params, IDS)
    with pytest.raises(ValueError, match="`active` is given, but no adapter has an invocation sequence"):
        lj.lora(fn, active=active("alora"))(lj.attach(variables, prepare("lora", "unrolled")[2]), IDS)


@pytest.mark.parametrize("version", [1, 2])
def test_old_configurations_are_read(version):
    config = lj.LoraConfig(rank=2, targets=["up"])
    newer = {name for since, names in SINCE.items() if since > version for name in names}
    fields = {name: value for name, value in json.loads(config.to_json()).items() if name not in newer}
    fields["format_version"] = version
    assert lj.LoraConfig.from_json(json.dumps(fields)) == config
    with pytest.raises(ValueError, match="unknown fields: layouts"):
        lj.LoraConfig.from_json(json.dumps(fields | {"layouts": {}}))


@pytest.mark.parametrize("merged", [False, True])
def test_moments_are_those_of_the_inputs(merged):
    fn, variables, adapters, _ = prepare("lora", "stacked")
    found = lj.moments(jax.checkpoint(fn) if merged else fn, variables, adapters, IDS)
    x = variables["embed"][IDS]
    for i in range(3):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], variables["layers"])
        flat = x.reshape(-1, 6)
        assert distance(found["layers/up/kernel"].second[i], flat.T @ flat) < 1e-6
        h = jnp.tanh(flat @ p["up"]["kernel"] + p["up"]["bias"][None])
        assert distance(found["layers/down/kernel"].second[i], h.T @ h) < 1e-6
        np.testing.assert_allclose(found["layers/down/kernel"].total[i], h.sum(0), atol=1e-5)
        x = layer(x, p)
    np.testing.assert_array_equal(found["layers/up/kernel"].count, 15)


@pytest.mark.parametrize(
    "model",
    [lambda p, x: x[:, :3] @ p["w"][:3] + x[:, 3:] @ p["w"][3:], lambda p, x: p["w"][x[:, 0].astype(int)]],
    ids=["sliced", "looked up"],
)
def test_moments_need_plain_products(model):
    variables, x = {"w": jnp.ones((8, 6))}, jnp.ones((6, 8))
    pair = lj.LowRank(jnp.ones((8, 2)), jnp.ones((2, 6)), lj.Layout((), (0,), (1,)))
    with pytest.raises(lj.NotLowRankError, match=r"w .* cannot stay low-rank"):
        lj.moments(model, variables, {"w": pair}, x)


def test_moments_that_nothing_reaches_are_an_error():
    pair = lj.LowRank(jnp.ones((8, 2)), jnp.ones((2, 6)), lj.Layout((), (0,), (1,)))
    with pytest.raises(ValueError, match="no input reached w"):
        lj.moments(lambda p, x: jax.lax.stop_gradient(x @ p["w"]), {"w": jnp.ones((8, 6))}, {"w": pair}, jnp.ones((2, 8)))


def test_moments_of_low_precision_are_summed_up_in_float32():
    x = normal(0, 40, 4).astype(BF16)
    pair = lj.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)))
    found = lj.moments(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 3), BF16)}, {"w": pair}, x)["w"].second
    assert distance(found, x.astype(F32).T @ x.astype(F32)) < 1e-6


def test_moments_name_the_part_of_a_stack_that_nothing_reaches():
    variables = {"w": jnp.ones((3, 4, 4))}
    pair = lj.LowRank(jnp.ones((3, 4, 2)), jnp.ones((3, 2, 4)), lj.Layout((0,), (1,), (2,)))
    with pytest.raises(ValueError, match=r"no input reached w \(matrices \[\[2\]\] of its stack\)"):
        lj.moments(lambda p, x: x @ p["w"][0] @ p["w"][1], variables, {"w": pair}, jnp.ones((2, 4)))


def test_a_head_can_have_rows():
    """Tokens may be a head's outputs: its columns are then the rows."""
    variables = {"w": normal(0, 6, 4), "head": normal(1, 4, 9)}
    fn, x = lambda p, x: jnp.tanh(x @ p["w"]) @ p["head"], normal(2, 5, 6)
    config = lj.LoraConfig(rank=2, targets=["w"], trainable_token_indices={"head": [7, 0]})
    adapters = moved(lj.init(jax.random.key(3), config, fn, variables, x))
    assert adapters["head"].values.shape == (2, 4)
    merged = lj.merge(variables, adapters)
    np.testing.assert_array_equal(merged["head"][:, jnp.array([7, 0])].T, adapters["head"].values)
    np.testing.assert_allclose(lj.lora(fn)(lj.attach(variables, adapters), x), fn(merged, x), atol=1e-5)


def test_rows_replace_those_of_a_table_of_low_precision():
    table = 1000 * normal(0, 9, 4).astype(BF16)
    rows = lj.Rows(jnp.full((2, 4), 0.5), (3, 5), lj.Layout((), (0,), (1,)))
    got = lj.lora(lambda p, ids: p["t"][ids])(lj.attach({"t": table}, {"t": rows}), jnp.arange(9))
    np.testing.assert_array_equal(got.astype(F32), lj.merge({"t": table}, {"t": rows})["t"].astype(F32))


def test_a_bias_belongs_to_the_only_kernel_of_its_module():
    params = {
        "w1": jnp.ones((4, 4)),
        "w2": jnp.ones((4, 4)),
        "bias": jnp.ones(4),
        "own": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    }
    fn = lambda p, x: (jnp.tanh(x @ p["w1"] + p["bias"][None]) @ p["w2"]) @ p["own"]["kernel"] + p["own"]["bias"][None]
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, lora_bias=True), fn, params, jnp.ones((3, 4)))
    assert {path: a.bias_path for path, a in adapters.items()} == {"own/kernel": "own/bias", "w1": None, "w2": None}


def test_an_output_of_zeros_has_no_direction():
    """DoRA's ratio of a column of zeros is 1, not NaN, and its pair can train."""
    params, x = {"w": jnp.ones((4, 3)).at[:, 1].set(0)}, jnp.ones((2, 4))
    fn = lambda p, x: x @ p["w"]
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, dora=True), fn, params, x)
    loss = lambda a: jnp.sum((lj.lora(fn)(lj.attach(params, a), x) - 1) ** 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((jax.grad(loss)(adapters), lj.merge(params, adapters))))


def test_excluded_layers_stay_excluded():
    """Padding and truncating a stack keep apart which of its matrices are adapted at all."""
    fn, variables, adapters, _ = prepare("dora_fa_bias", "some_layers")
    adapters = moved(adapters)
    adapters = {p: dataclasses.replace(a, magnitude=a.magnitude.at[1].set(9.0)) for p, a in adapters.items()}
    run = lambda a: lj.lora(fn)(lj.attach(variables, a), IDS)
    np.testing.assert_allclose(run(lj.algebra.pad_rank(adapters, 5)), run(adapters), atol=1e-5)
    dead = {p: dataclasses.replace(a, b=a.b.at[2].set(0.0)) for p, a in adapters.items()}
    short = lj.algebra.truncate(dead, energy=1.0)
    assert {a.ranks for a in short.values()} == {(3, 0, 1)}
    np.testing.assert_allclose(run(short), run(dead), atol=1e-4)
    with pytest.raises(ValueError, match="the template is more than a pair"):
        lj.algebra.difference(adapters, variables, variables)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("frozen", ("A",), r"w: frozen is \('A',\); it must be a tuple of some of a, b"),
        ("frozen", "b", "w: frozen is 'b'; it must be a tuple"),
        ("dropout", 1.5, "w: the adapter's dropout must be at least 0 and below 1"),
        ("ranks", (1, 2), r"w: the adapter's ranks are \(1, 2\); it needs 1 of at most 2"),
        ("lambda_d", jnp.ones(2), "w: the adapter has only one of lambda_d and lambda_b"),
    ],
)
def test_pairs_made_by_hand_are_checked(field, value, message):
    pair = lj.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), lj.Layout((), (0,), (1,)))
    with pytest.raises(ValueError, match=message):
        lj.attach({"w": jnp.ones((4, 3))}, {"w": dataclasses.replace(pair, **{field: value})})

"""What `init` adapts, how, and what it refuses."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.support.frontends import Stack, normal


def model(p, ids):
    """Two layers with an embedding, norms, biases, a head, and one kernel behind a custom derivative rule."""
    x = p["embed"]["table"][ids]
    for layer in (p["layer_0"], p["layer_1"]):
        x = x * layer["norm"]["scale"][None, None]
        x = x + jax.nn.relu(x @ layer["attn"]["query"]["kernel"] + layer["attn"]["query"]["bias"][None, None])
        x = x + x @ layer["mlp"]["w"]
    return x @ p["head"]["kernel"]


def make_params(dtype=jnp.float32):
    layer = lambda i: {
        "norm": {"scale": jnp.ones(6, dtype)},
        "attn": {"query": {"kernel": normal(i, 6, 6, dtype=dtype), "bias": jnp.zeros(6, dtype)}},
        "mlp": {"w": normal(i + 9, 6, 6, dtype=dtype)},
    }
    return {"embed": {"table": normal(3, 11, 6, dtype=dtype)}, "layer_0": layer(0), "layer_1": layer(1),
            "head": {"kernel": normal(4, 6, 4, dtype=dtype)}, "spare": {"kernel": normal(5, 6, 6, dtype=dtype)}}  # fmt: skip


IDS = jnp.array([[1, 2, 10]])


def init(**options):
    options.setdefault("rank", 2)
    return lj.init(jax.random.key(0), lj.LoraConfig(**options), model, make_params(), IDS)


LINEAR = ["head/kernel", "layer_0/attn/query/kernel", "layer_0/mlp/w", "layer_1/attn/query/kernel", "layer_1/mlp/w"]


@pytest.mark.parametrize("options,found", [
    ({}, LINEAR),
    ({"targets": "attention"}, [LINEAR[1], LINEAR[3]]),
    ({"targets": ["query"]}, [LINEAR[1], LINEAR[3]]),
    ({"targets": ["layer_0/mlp"]}, [LINEAR[2]]),
    ({"targets": ["re:layer_1/.*"]}, LINEAR[3:]),
    ({"exclude": ["head"]}, LINEAR[1:]),
    ({"targets": ["table"]}, ["embed/table"]),
    ({"targets": ["mlp"], "layers": [1]}, [LINEAR[4]]),
    ({"layers": [0]}, LINEAR[1:3]),
    ({"train": ["head", "norm"], "targets": ["mlp"]}, ["head/kernel", "layer_0/mlp/w", "layer_0/norm/scale", "layer_1/mlp/w", "layer_1/norm/scale"]),
    ({"train": ["head"]}, LINEAR),
    ({"train": ["bias"], "targets": []}, ["layer_0/attn/query/bias", "layer_1/attn/query/bias"]),
])  # fmt: skip
def test_targets(options, found):
    assert sorted(init(**options)) == found


@pytest.mark.parametrize("options,message", [
    ({"targets": ["qeury"]}, "targets: the pattern 'qeury' matches no parameter.*The nearest paths are:\n  layer_0/attn/query"),
    ({"targets": ["query", "mlpp"]}, "targets: the pattern 'mlpp' matches no parameter"),
    ({"exclude": ["quer"]}, "exclude: the pattern 'quer' matches no parameter"),
    ({"train": ["haed"]}, "train: the pattern 'haed' matches no parameter"),
    ({"targets": ["query"], "rank_pattern": {"mlp": 4}}, "rank_pattern: the pattern 'mlp' matches no parameter"),
    ({"alpha_pattern": {"nothing": 4}}, "alpha_pattern: the pattern 'nothing' matches no parameter"),
    ({"batch_axes": {"nothing": [0]}}, "batch_axes: the pattern 'nothing' matches no parameter"),
    ({"batch_axes": {"head": [0]}}, "batch_axes: [0] leaves head/kernel of the shape (6, 4) no in or no out axis"),
    ({"batch_axes": {"head": [2]}}, "batch_axes: head/kernel has the shape (6, 4); [2] is out of range"),
    ({"targets": ["norm"]}, "matches only parameters that can't take a low-rank pair:\n  layer_0/norm/scale (6,): `mul` at "),
    ({"targets": ["bias"]}, "layer_0/attn/query/bias (6,): `add` at "),
    ({"targets": ["spare"]}, "spare/kernel (6, 6): the function does not use it"),
    ({"train": ["spare"]}, "train: the function does not use spare/kernel"),
    ({"targets": ["head"], "train": ["head"]}, "everything that the pattern 'head' matches is in exclude, train or trainable_token_indices: head/kernel"),
    ({"targets": ["head"], "exclude": ["kernel"]}, "everything that the pattern 'head' matches is in exclude, train or trainable_token_indices"),
    ({"rank": 5, "targets": ["head"]}, "rank: 5 is above the smaller side of head/kernel (shape (6, 4): 6 in, 4 out). Lower it with rank_pattern"),
    ({"rank_pattern": {"head": 5}}, "rank: 5 is above the smaller side of head/kernel (shape (6, 4): 6 in, 4 out). Lower it with rank_pattern"),
    ({"rank": 7, "method": "vera"}, "targets='all-linear' finds no kernel that can have a pair:\n  head/kernel (6, 4): rank 7 is above its smaller side"),
    ({"layers": [0, 7]}, "layers: no target parameter is in layer 7; the layers found are 0, 1"),
    ({"layers": [0], "targets": ["head", "mlp"]}, "layers: nothing that the target 'head' matches is in the layers [0]"),
])  # fmt: skip
def test_what_is_refused(options, message):
    pattern = ".*".join(map(re.escape, message.split(".*")))
    with pytest.raises(ValueError, match=f"(?s){pattern}"):
        init(**options)


def test_ranks_and_alphas_by_pattern_first_match_wins():
    adapters = init(
        rank=2, alpha=6, rank_pattern={"layer_0/mlp": 3, "mlp": 1}, alpha_pattern={"re:layer_1.*": 2}, scaling="rslora"
    )
    ranks = {path: adapter.rank for path, adapter in adapters.items()}
    assert ranks == dict(zip(LINEAR, [2, 2, 3, 2, 1]))
    assert adapters["layer_0/mlp/w"].scale == pytest.approx(6 / 3**0.5)
    assert adapters["layer_1/mlp/w"].scale == pytest.approx(2.0)


def test_a_kernel_that_is_also_used_otherwise_is_refused_until_excluded():
    def normed(p, x):
        return x @ p["free"] @ (p["w"] / jnp.linalg.norm(p["w"]))

    args = normed, {"w": normal(0, 5, 5), "free": normal(1, 5, 5)}, normal(2, 3, 5)
    for targets in ("all-linear", ["w"]):
        with pytest.raises(ValueError, match=r"can't take a pair:\n  w \(5, 5\): `\w+` at .*test_init.py.*(?s:.*)exclude"):
            lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=targets), *args)
    assert list(lj.init(jax.random.key(0), lj.LoraConfig(rank=2, exclude=["w"]), *args)) == ["free"]


@pytest.mark.parametrize("init_name", ["kaiming", "gaussian", "orthogonal"])
def test_step_zero_is_the_base_model(init_name):
    adapters = init(init=init_name, targets=["table", "query", "mlp", "head"], train=["norm"])
    params = make_params()
    got, want = lj.lora(model)(lj.attach(params, adapters), IDS), model(params, IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if init_name == "orthogonal" else 0)


def test_distributions():
    wide = {"w": jnp.zeros((400, 300)), "table": jnp.zeros((300, 400))}
    fn = lambda p, ids: p["table"][ids] @ p["w"]
    make = lambda name: lj.init(jax.random.key(0), lj.LoraConfig(rank=50, targets=["w", "table"], init=name), fn, wide, IDS)
    a = make("kaiming")["w"].a
    assert 0.049 < float(jnp.abs(a).max()) <= 0.05
    assert float(a.std()) == pytest.approx(0.05 / 3**0.5, rel=0.01)
    assert float(make("gaussian")["w"].a.std()) == pytest.approx(1 / 50, rel=0.02)
    pair = make("orthogonal")["w"]
    np.testing.assert_allclose(pair.a @ pair.b, jnp.zeros((400, 300)), atol=1e-5)
    spread = [float(x.std()) for x in (pair.a, pair.b)]  # a row of G times half of an orthogonal matrix, over 10
    assert spread == pytest.approx([0.1 / 2**0.5] * 2, rel=0.02)
    assert jnp.linalg.matrix_rank(pair.a) == jnp.linalg.matrix_rank(pair.b) == 25
    table = make("kaiming")["table"]
    assert not table.a.any()
    assert float(table.b.std()) == pytest.approx(1.0, rel=0.02)


def test_one_more_target_changes_no_other_adapter():
    few, many = init(targets=["mlp"]), init(targets=["mlp", "query"])
    for path, adapter in few.items():
        np.testing.assert_array_equal(adapter.a, many[path].a)
    assert not jnp.array_equal(few[LINEAR[2]].a, few[LINEAR[4]].a)


def test_the_dtype_of_the_adapters_is_the_configurations():
    params = make_params(jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, dtype=dtype, train=["norm"]), model, params, IDS)
        assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype(dtype)}


def test_full_adapters_are_copies():
    params = make_params()
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(targets=[], train=["head"]), model, params, IDS)
    assert adapters["head/kernel"].value is not params["head"]["kernel"]
    np.testing.assert_array_equal(adapters["head/kernel"].value, params["head"]["kernel"])


def test_abstract_parameters_give_abstract_adapters():
    config = lj.LoraConfig(rank=2, train=["norm"])
    shapes = jax.eval_shape(make_params)
    abstract = lj.init(jax.random.key(0), config, model, shapes, jax.eval_shape(lambda: IDS))
    concrete = init(train=["norm"])
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    assert [leaf.shape for leaf in jax.tree.leaves(abstract)] == [leaf.shape for leaf in jax.tree.leaves(concrete)]
    assert str(lj.summary(shapes, abstract)) == str(lj.summary(make_params(), concrete))


def test_layers_inside_a_stacked_kernel():
    stack, x = Stack(jnp.float32), normal(1, 3, 5, 12)
    variables = stack.init(jax.random.key(0), x)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=3, layers=[0, 2]), stack.apply, variables, x)
    up = adapters["params/layers/up/kernel"]
    assert up.ranks == (3, 0, 3, 0)
    assert (up.layout.batch, up.a.shape, up.b.shape) == ((0,), (4, 12, 3), (4, 3, 19))
    assert [bool(jnp.any(a)) for a in up.a] == [True, False, True, False]
    summary = lj.summary(variables, adapters)
    assert summary.trainable == 2 * 2 * 3 * (12 + 19)
    assert "3/0" in str(summary)


def test_excluded_layers_of_a_stack_stay_zero_in_training(lenient):
    import optax

    stack, x = Stack(jnp.float32), normal(1, 3, 5, 12)
    variables = stack.init(jax.random.key(0), x)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=3, layers=[1]), stack.apply, variables, x)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    step = lj.train.make_train_step(lambda p, x, key: jnp.mean(lj.lora(stack.apply)(p, x) ** 2), tx)
    state = lj.train.init_state(adapters, tx, key=jax.random.key(1))
    for _ in range(5):
        state, _ = step(state, variables, x)
    for adapter in state.adapters.values():
        for factor in (adapter.a, adapter.b):
            assert [bool(jnp.any(layer)) for layer in factor] == [False, True, False, False]


def test_ambiguous_layers_are_refused():
    def nested(p, x):
        return x @ p["block_0"]["layer_1"]["w"]

    with pytest.raises(ValueError, match="block_0/layer_1/w has several numbered components"):
        lj.init(
            jax.random.key(0),
            lj.LoraConfig(rank=1, layers=[0]),
            nested,
            {"block_0": {"layer_1": {"w": normal(0, 3, 3)}}},
            normal(1, 2, 3),
        )


def test_a_linen_head_of_a_multi_axis_kernel():
    layer = nn.DenseGeneral(5, axis=(-2, -1))
    x = normal(0, 2, 3, 4)
    variables = layer.init(jax.random.key(0), x)
    adapter = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), layer.apply, variables, x)["params/kernel"]
    assert adapter.layout == lj.Layout((), (0, 1), (2,))
    assert (adapter.a.shape, adapter.b.shape) == ((3, 4, 2), (2, 5))


def test_magnitudes_are_made_where_the_kernels_lie():
    """As in a pipeline made by hand; a program can't take arrays of several devices."""
    devices = jax.devices()[:2]
    kernels = {f"stage_{i}": jax.device_put(normal(i, 4, 4), device) for i, device in enumerate(devices)}
    stages = lambda p, x: jax.device_put(x @ p["stage_0"], devices[1]) @ p["stage_1"]
    config = lj.LoraConfig(rank=2, dora=True)
    adapters = lj.init(jax.random.key(0), config, stages, kernels, jnp.ones((1, 4)))
    for path, device in zip(kernels, devices):
        assert adapters[path].magnitude.devices() == {device}
        norm = np.linalg.norm(np.asarray(kernels[path]), axis=0)
        np.testing.assert_allclose(adapters[path].magnitude, norm, rtol=1e-6)

"""Adapters with a magnitude (DoRA), scales (VeRA) or a bias, against merged weights, for every frontend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.methods.dora import column_norm
from tests.support.frontends import FRONTENDS, Case, normal
from tests.support.identity import F32, F64, distance, prepare, random_adapters, settings, value_and_grads
from tests.support.marks import every_other, slow_unless
from tests.support.never_formed import formed


def with_magnitudes(case, adapters):
    """DoRA's magnitudes beside each pair: the norm of each output, moved as training would."""
    leaves, _ = lj.paths.flatten(case.variables)
    moved = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, lj.LowRank):
            norm = column_norm(leaves[path], dataclasses.replace(adapter, b=jnp.zeros_like(adapter.b)))
            wave = 1 + jnp.cos(jnp.arange(norm.size, dtype=norm.dtype)).reshape(norm.shape) / 5
            adapter = dataclasses.replace(adapter, magnitude=norm * wave)
        moved[path] = adapter
    return moved


def with_scales(case, adapters):
    """VeRA's scales of the inner and the outer numbers."""
    moved = {}
    for path, adapter in adapters.items():
        if isinstance(adapter, lj.LowRank):
            batch = len(adapter.layout.batch)
            wave = lambda shape, dtype: 1 + jnp.cos(jnp.arange(np.prod(shape), dtype=dtype)).reshape(shape) / 2
            d = wave((*adapter.a.shape[:batch], adapter.rank), adapter.a.dtype)
            b = wave((*adapter.b.shape[:batch], *adapter.b.shape[batch + 1 :]), adapter.b.dtype)
            adapter = dataclasses.replace(adapter, lambda_d=d, lambda_b=b)
        moved[path] = adapter
    return moved


def compared(case, adapters):
    """The distances of outputs and gradients of `lora(fn)` from those of the merged weights."""
    low_rank = lambda a, *args: lj.lora(case.fn)(lj.attach(case.variables, a), *args)
    merged = lambda a, *args: case.fn(lj.merge(case.variables, a), *args)
    got = jax.jit(lambda a: value_and_grads(low_rank, a, *case.args))(adapters)
    want = jax.jit(lambda a: value_and_grads(merged, a, *case.args))(adapters)
    return distance(got[0], want[0]), distance(got[1], want[1])


# Whole models have no rule that the others lack: what is more than a pair on them is in the whole suite alone.
WHOLE = ("flax_bert", "flax_gpt2", "nnx_modules", "linen_mlp")
# And of the others each has either magnitudes or scales here, in turn: both are factors that move as A and B do.
TURN = {name: (with_magnitudes, with_scales)[i % 2] for i, name in enumerate(FRONTENDS) if name not in WHOLE}
CASES = slow_unless(
    lambda case: TURN.get(case[0]) is case[1], [(name, add) for add in (with_magnitudes, with_scales) for name in FRONTENDS]
)


@pytest.mark.parametrize(("name", "add"), CASES)
def test_magnitudes_and_scales_equal_merged_weights(name, add):
    with settings(name, F64):
        case, adapters = prepare(name, F64)
        assert max(compared(case, jax.jit(functools.partial(add, case))(adapters))) < 1e-10


@pytest.mark.parametrize("name", every_other(name for name in FRONTENDS if name not in ("experts_einsum", "moved_about")))
def test_nothing_of_the_kernels_shape_depends_on_the_adapters(name):
    """DoRA's norm too is made without W + AB: `W^T A` and sums alone."""
    with settings(name, F32):
        case, adapters = prepare(name, F32)
        assert formed(case, jax.eval_shape(functools.partial(with_magnitudes, case), adapters)) == []


def test_dropout_of_dora_is_on_the_whole_change():
    """PEFT's rule: `x W + (g - 1) (x' W) + g s (x' A) B` with the same x' = dropout(x) in both."""
    key = jax.random.key(0)
    x, w = jax.random.normal(key, (64, 5)), jax.random.normal(jax.random.key(1), (5, 4))
    pair = lj.LowRank(jnp.ones((5, 2)), jnp.ones((2, 4)), lj.Layout((), (0,), (1,)), 0.5, 0.5, magnitude=jnp.arange(1.0, 5.0))
    model = lambda p, x: x @ p["w"]
    plain = lj.lora(model)(lj.attach({"w": w}, {"w": pair}), x) - x @ w
    change = lj.lora(model, key=key)(lj.attach({"w": w}, {"w": pair}), x) - x @ w
    g = pair.magnitude / jnp.linalg.norm(w + pair.delta(), axis=0)
    effective = (g - 1)[None] * w + g[None] * pair.delta()  # the change is x' times this
    assert not np.allclose(change, plain, atol=1e-2)
    kept = jnp.stack([jnp.where(jnp.array([(i >> d) & 1 for d in range(5)]), 2.0, 0.0) for i in range(32)])
    candidates = jnp.einsum("bd,md,do->bmo", x, kept, effective)
    assert float(jnp.abs(candidates - change[:, None]).max(-1).min(-1).max()) < 1e-4  # some mask explains every row


@pytest.mark.parametrize("stacked", [False, True])
def test_a_bias_is_added_to_every_product(stacked):
    layer = lambda x, p: (jnp.tanh(x @ p["w"] + p["b"][None]), None)
    if stacked:
        model = lambda p, x: jax.lax.scan(layer, x, p)[0]
        shapes, layout = ((3, 4, 4), (3, 4)), lj.Layout((0,), (1,), (2,))
    else:
        model = lambda p, x: layer(x, p)[0]
        shapes, layout = ((4, 4), (4,)), lj.Layout((), (0,), (1,))
    normal = lambda i, shape: jax.random.normal(jax.random.key(i), shape)
    params = {"w": normal(0, shapes[0]), "b": normal(1, shapes[1])}
    a_shape, b_shape = layout.factor_shapes(shapes[0], 2)
    pair = lj.LowRank(normal(2, a_shape), normal(3, b_shape), layout, 0.3, bias=normal(4, shapes[1]), bias_path="b")
    case = Case(model, params, (normal(5, (6, 4)),), lj.LoraConfig())
    assert max(compared(case, {"w": pair})) < 1e-5
    assert lj.labels({"w": pair})["w"].bias == "adapter"
    back = lj.unmerge(lj.merge(params, {"w": pair}), {"w": pair})
    np.testing.assert_allclose(back["b"], params["b"], atol=1e-6)


def test_a_bias_needs_a_product():
    params = {"w": jnp.ones((4, 3))}
    pair = lj.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), lj.Layout((), (0,), (1,)), bias=jnp.ones(3))
    attached = lj.attach(params, {"w": pair})
    for model in (lambda p, i: p["w"][i], lambda p, i: p["w"] + 1.0, lambda p, i: jnp.ones((1, 4)) @ (2.0 * p["w"])):
        for choice in ("error", "materialize"):
            with pytest.raises(lj.NotLowRankError, match="bias"):
                lj.lora(model, on_unsupported=choice)(attached, jnp.array([0, 1, 2]))
    with pytest.raises(
        ValueError, match="w: the adapter's bias can't be merged, since it needs a bias parameter and its layer has none"
    ):
        lj.merge(params, {"w": pair})


@pytest.mark.parametrize(("name", "shape"), [("magnitude", (4,)), ("bias", (2, 3))])
def test_shapes_are_checked(name, shape):
    pair = lj.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), lj.Layout((), (0,), (1,)), **{name: jnp.ones(shape)})
    with pytest.raises(ValueError, match=rf"w: the adapter's {name} has the shape .* needs \(3,\)"):
        lj.attach({"w": jnp.ones((4, 3))}, {"w": pair})


def test_a_magnitude_can_not_be_unmerged():
    pair = lj.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), lj.Layout((), (0,), (1,)), magnitude=jnp.ones(3))
    with pytest.raises(ValueError, match="w: a Full adapter, Rows and one with a magnitude replace their parameter"):
        lj.unmerge({"w": jnp.ones((4, 3))}, {"w": pair})


def test_checkpoints_hold_magnitudes_and_biases(tmp_path):
    pair = lj.LowRank(
        jnp.ones((4, 2)),
        jnp.ones((2, 3)),
        lj.Layout((), (0,), (1,)),
        magnitude=jnp.arange(3.0),
        bias=jnp.ones(3),
        bias_path="b",
    )
    lj.checkpoint.save(tmp_path, {"w": pair})
    again = lj.checkpoint.load(tmp_path)["w"]
    assert jax.tree.structure(again) == jax.tree.structure(pair)
    np.testing.assert_array_equal(again.magnitude, pair.magnitude)
    assert lj.summary({"w": jnp.ones((4, 3))}, {"w": pair}).trainable == 4 * 2 + 2 * 3 + 3 + 3


@pytest.mark.parametrize(
    "model",
    [
        lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:],
        lambda p, x: jnp.einsum("bgi,gio->bgo", x.reshape(6, 2, 4), p["w"].reshape(2, 4, 6)).sum(1),
        lambda p, x: jax.lax.scan(
            lambda y, parts: (y + parts[0] @ parts[1], None),
            jnp.zeros((6, 6)),
            (x.reshape(6, 2, 4).swapaxes(0, 1), p["w"].reshape(2, 4, 6)),
        )[0],
        jax.shard_map(
            lambda p, x: jax.lax.psum(x @ p["w"], "d"),
            mesh=jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)),
            in_specs=({"w": jax.P("d", None)}, jax.P(None, "d")),
            out_specs=jax.P(),
        ),
    ],
    ids=["sliced", "batched", "scanned", "sharded"],
)
def test_a_bias_is_not_added_to_each_part_of_a_product(model):
    params, x = {"w": jax.random.normal(jax.random.key(0), (8, 6))}, jax.random.normal(jax.random.key(1), (6, 8))
    pair = lj.LowRank(jnp.ones((8, 2)), jnp.ones((2, 6)), lj.Layout((), (0,), (1,)), bias=jnp.ones(6))
    with pytest.raises(lj.NotLowRankError, match="bias"):
        jax.jit(lj.lora(model))(lj.attach(params, {"w": pair}), x)
    plain = dataclasses.replace(pair, bias=None, magnitude=jnp.arange(1.0, 7.0))  # a magnitude may be
    want = x @ lj.merge(params, {"w": plain})["w"]
    np.testing.assert_allclose(jax.jit(lj.lora(model))(lj.attach(params, {"w": plain}), x), want, atol=2e-5)


def test_magnitudes_of_a_kernel_whose_axes_go_round():
    """The out axes of the product are in another order than the kernel's, and the permutation is not its own inverse."""
    fn = lambda p, x: jnp.tensordot(x, jnp.transpose(p["w"], (2, 0, 1)), [[1], [1]])
    variables, x = {"w": normal(1, 8, 2, 3)}, normal(2, 5, 8)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, dora=True), fn, variables, x)
    adapters = random_adapters(adapters, F32)
    low_rank = lambda a, x: lj.lora(fn)(lj.attach(variables, a), x)
    merged = lambda a, x: fn(lj.merge(variables, a), x)
    assert distance(value_and_grads(low_rank, adapters, x), value_and_grads(merged, adapters, x)) < 1e-5

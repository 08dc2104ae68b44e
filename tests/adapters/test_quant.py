"""Quantised bases: what they compute is what the dense ones of the same values do, and nothing dense is kept."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

import lora_jax as lj
from lora_jax.adapters import quant
from lora_jax.core import paths
from tests.support.identity import F32, distance, prepare, random_adapters, settings, value_and_grads
from tests.support.marks import checkerboard, every_other

ROUNDED = ("plain_function", "linen_mlp", "linen_attention", "linen_scan_remat", "linen_tied_embedding", "conv_2d", "gemma_einsum",
           "transposed_kernel", "experts_einsum", "experts_ragged", "experts_gathered", "moved_about", "control_flow", "nnx_modules")  # fmt: skip


def rounded(case, adapters):
    """The case's variables with each adapted kernel quantised, and the dense tree of the same values."""
    leaves, treedef = paths.flatten(case.variables)
    chosen = [path for path, a in adapters.items() if isinstance(a, lj.LowRank)]
    quantized = lj.quantize(case.variables, [re.compile(re.escape(path)) for path in chosen], "int8", block=None)
    leaves, _ = paths.flatten(quantized)
    return quantized, jax.tree.unflatten(treedef, [quant.dense(leaf) for leaf in leaves.values()])


@pytest.mark.parametrize("name", every_other(ROUNDED))
def test_quantised_kernels_equal_dense_ones_of_their_values(name):
    with settings(name, F32), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        case, adapters = prepare(name, F32)
        quantized, dense = rounded(case, adapters)
        run = lambda base: jax.jit(lambda a: value_and_grads(lambda a: lj.lora(case.fn)(lj.attach(base, a), *case.args), a))(
            adapters
        )
        assert distance(run(quantized), run(dense)) < 1e-5


def layer(x, p):
    return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"], None


def stacked(params, x):
    return jax.lax.scan(layer, x, params["layers"])[0] @ params["head"]


def unrolled(params, x):
    for own in params["layers"]:
        x, _ = layer(x, own)
    return x @ params["head"]


def model(form):
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape) / 8
    kernels = {"up": {"kernel": normal(0, 3, 32, 48)}, "down": {"kernel": normal(1, 3, 48, 32)}}
    layers = kernels if form == "stacked" else [jax.tree.map(lambda leaf, i=i: leaf[i], kernels) for i in range(3)]
    fn = stacked if form == "stacked" else unrolled
    return fn, {"layers": layers, "head": normal(2, 32, 7)}, normal(3, 5, 32)


@pytest.mark.parametrize(("form", "dtype"), checkerboard(["stacked", "unrolled"], ["nf4", "int4", "int8", "fp8"]))
def test_nothing_dense_is_kept_for_the_backward_pass(form, dtype):
    """Of a quantised kernel, adapted or not, the gradient keeps its integers and scales alone."""
    fn, variables, x = model(form)
    quantized = lj.quantize(variables, ["kernel"], dtype, block=16)
    config = lj.LoraConfig(rank=2, targets=["up"], dora=True)
    adapters = random_adapters(lj.init(jax.random.key(0), config, fn, quantized, x), F32)
    run = jax.jit(lambda base, a: jax.vjp(lambda a: lj.lora(fn)(lj.attach(base, a), x), a))
    out, vjp = run(quantized, adapters)
    dense = jax.tree.map(quant.dense, quantized, is_leaf=paths.is_quantized)
    want, reference = run(dense, adapters)
    assert distance(out, want) < 1e-5
    assert distance(vjp(jnp.ones_like(out)), reference(jnp.ones_like(out))) < 1e-5
    kept = [leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.dtype == F32]
    assert not {(3, 32, 48), (3, 48, 32), (32, 48), (48, 32)} & set(kept)
    assert {(3, 32, 48), (32, 48)} & {leaf.shape for leaf in jax.tree.leaves(reference)}  # which the dense ones do


def test_a_base_without_adapters():
    fn, variables, x = model("stacked")
    quantized = lj.quantize(variables, ["kernel"], "int8", block=16)
    errors = lj.quant.quantization_error(variables, quantized)
    assert set(errors) == {"layers/down/kernel", "layers/up/kernel"} and max(errors.values()) < 0.01
    assert distance(lj.lora(fn)(quantized, x), fn(variables, x)) < 0.03
    assert [p.kind for p in lj.explain(fn, quantized, x).parameters.values()] == ["linear"] * 3


def test_merging():
    fn, variables, x = model("unrolled")
    quantized = lj.quantize(variables, ["up"], "nf4", block=16)
    adapters = random_adapters(lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, quantized, x), F32)
    for act in (lj.merge, lj.unmerge):
        with pytest.raises(ValueError, match=r"layers/0/up/kernel, .*: the kernel is quantised, so the sum would be rounded"):
            act(quantized, adapters)
        with pytest.raises(ValueError, match="quantized must be one of 'error', 'dense', 'requantize', not 'yes'"):
            act(quantized, adapters, quantized="yes")
    merged = lj.merge(quantized, adapters, quantized="dense")
    assert distance(fn(merged, x), lj.lora(fn)(lj.attach(quantized, adapters), x)) < 1e-5
    back = lj.unmerge(lj.merge(quantized, adapters, quantized="dense"), adapters)
    assert distance(fn(back, x), lj.lora(fn)(quantized, x)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "block"),
    every_other(
        [("nf4", 16), ("nf4", None), ("int4", None), ("int4", 16), ("int8", 16), ("int8", None), ("fp8", None), ("fp8", 16)]
    ),
)
def test_merging_into_quantised_kernels(dtype, block):
    """The same as to quantise the dense sum; adapters of nothing leave the kernels almost as they are."""
    fn, variables, x = model("stacked")
    quantized = lj.quantize(variables, ["kernel"], dtype, block=block)
    adapters = random_adapters(lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, quantized, x), F32)
    dense, again = (lj.merge(quantized, adapters, check=True, quantized=way) for way in ("dense", "requantize"))
    want = lj.quantize(dense, ["kernel"], dtype, block=block)
    jax.tree.map(np.testing.assert_array_equal, again, want)
    errors = lj.quant.quantization_error(dense, again)
    assert set(errors) == {"layers/down/kernel", "layers/up/kernel"}
    assert 0 < max(errors.values()) < {"nf4": 0.15, "int4": 0.2, "int8": 0.01, "fp8": 0.03}[dtype]
    off = lj.unmerge(again, adapters, quantized="requantize")
    jax.tree.map(
        np.testing.assert_array_equal,
        off,
        lj.quantize(lj.unmerge(again, adapters, quantized="dense"), ["kernel"], dtype, block=block),
    )


def test_a_kernel_with_a_zero_point_is_not_quantised_again():
    array = qwix.quantize(jnp.ones((8, 4)), "int8", calibration_method="minmax")
    pair = {"w": lj.LowRank(jnp.ones((8, 1)), jnp.ones((1, 4)), lj.Layout((), (0,), (1,)))}
    assert lj.merge({"w": array}, pair, quantized="dense")["w"].shape == (8, 4)
    with pytest.raises(ValueError, match="w: a kernel with a zero point can't be quantised again"):
        lj.merge({"w": array}, pair, quantized="requantize")


def test_initialisers():
    """Those that take a part of the kernel need it dense; EVA takes none."""
    fn, variables, x = model("unrolled")
    quantized = lj.quantize(variables, ["up"], "int8", block=16)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["up"]), fn, quantized, x)
    message = "layers/0/up/kernel: the kernel is quantised, and this needs the dense one"
    for make in (lj.initializers.pissa, lj.initializers.olora, lj.initializers.milora, lj.initializers.loftq):
        with pytest.raises(ValueError, match=message):
            make(quantized, adapters)
    with pytest.raises(ValueError, match=message):
        lj.initializers.gradients(lambda p, x: fn(p, x).sum(), quantized, adapters, [x])
    moments = lj.moments(fn, quantized, adapters, x)
    with pytest.raises(ValueError, match=message):
        lj.initializers.corda(quantized, adapters, moments, mode="ipm")
    base, found = lj.initializers.eva(quantized, adapters, moments, rho=1)
    assert base is quantized
    np.testing.assert_allclose(found["layers/0/up/kernel"].a.T @ found["layers/0/up/kernel"].a, np.eye(2), atol=1e-5)


def test_moments_and_rows_of_a_quantised_base():
    fn, variables, x = model("stacked")
    quantized = lj.quantize(variables, ["up"], "int8", block=16)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["up"]), fn, quantized, x)
    assert distance(lj.moments(fn, quantized, adapters, x)["layers/up/kernel"].second[0], x.T @ x) < 1e-6
    table = lj.quantize({"t": jax.random.normal(jax.random.key(1), (32, 16))}, ["t"], "int8", block=16)
    look = lambda p, ids: p["t"][ids]
    rows = lj.init(jax.random.key(0), lj.LoraConfig(targets=[], trainable_token_indices={"t": [3]}), look, table, jnp.arange(4))
    rows = {"t": dataclasses.replace(rows["t"], values=rows["t"].values + 1)}
    got = lj.lora(look)(lj.attach(table, rows), jnp.arange(4))
    np.testing.assert_allclose(got - quant.dense(table["t"])[:4], jnp.outer(jnp.array([0.0, 0, 0, 1]), jnp.ones(16)), atol=1e-6)


def test_counts_and_bytes():
    fn, variables, x = model("stacked")
    quantized = lj.quantize(variables, ["kernel"], "nf4", block=16)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2, targets=["up"]), fn, quantized, x)
    found = lj.summary(quantized, adapters)
    count = 2 * 3 * 32 * 48
    assert found.parameters == count + 32 * 7
    assert found.parameter_bytes == count // 2 + 4 * count // 16 + 4 * 32 * 7


@pytest.mark.parametrize(("shape", "block"), [((32, 16), 16), ((2, 16, 32), 8), ((16, 8), None)])
def test_nf4_is_made_dense_as_qwix_does(shape, block):
    kernel = jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)
    found = lj.quantize({"w": kernel}, ["w"], "nf4", block=block)["w"]
    np.testing.assert_array_equal(quant.dense(found), qwix.dequantize(found))


def test_shards_stay_where_they_are():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data", "model"))
    kernel = jax.device_put(jax.random.normal(jax.random.key(0), (64, 32)), sharding)
    found = lj.quantize({"w": kernel}, ["w"], "int8", block=16)["w"]
    assert found.qvalue.sharding.is_equivalent_to(sharding, 2)
    assert found.scale.sharding.is_equivalent_to(sharding, 2)


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["up"], {"dtype": "int3"}, "dtype must be one of 'nf4', 'int4', 'int8', 'fp8', not 'int3'"),
        (["up"], {"block": 0}, "block must be None or a whole number of at least 1"),
        (["up"], {"block": 5}, r"no axis of layers/up/kernel of the shape \(3, 32, 48\) can be cut into blocks of 5"),
        (["nothing"], {}, "nothing"),
        (["bias"], {}, r"bias of the shape \(7,\) is no float kernel of two axes or more"),
    ],
)
def test_bad_requests(targets, options, message):
    _, variables, _ = model("stacked")
    with pytest.raises(ValueError, match=message):
        lj.quantize(variables | {"bias": jnp.ones(7)}, targets, **options)


def test_what_a_quantised_kernel_can_not_do():
    fn, variables, x = model("stacked")
    quantized = lj.quantize(variables, ["up"], "nf4", block=16)
    with pytest.raises(ValueError, match="targets: layers/up/kernel is quantised already"):
        lj.quantize(quantized, ["up"], "int8", block=16)
    with pytest.raises(ValueError, match="train: layers/up/kernel is quantised, so it can't be trained whole"):
        lj.init(jax.random.key(0), lj.LoraConfig(targets=[], train=["up"]), fn, quantized, x)


@pytest.mark.parametrize("dtype", lj.quant.DTYPES)
def test_small_numbers_of_float16(dtype):
    kernel = {"w": 0.001 * jax.random.normal(jax.random.key(0), (64, 8), jnp.float16)}
    found = lj.quantize(kernel, ["w"], dtype)
    assert found["w"].scale.dtype == jnp.float16
    assert lj.quant.quantization_error(kernel, found)["w"] < 0.15

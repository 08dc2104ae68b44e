"""What the branches are computed in: `branch_dtype="float32"` on a bfloat16 base is PEFT's rule.

Not jitted, since XLA leaves roundings to bfloat16 out where it can.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.identity import BF16, F32, distance

DENSE, STACK, CONV = lj.Layout((), (0,), (1,)), lj.Layout((0,), (1,), (2,)), lj.Layout((), (0, 1), (2,))
KINDS = {
    "dense": ((32, 24), DENSE, (9, 32), lambda w, x: x @ w),
    "transposed": ((24, 32), lj.Layout((), (1,), (0,)), (9, 32), lambda w, x: lax.dot_general(w, x, (((1,), (1,)), ((), ())))),
    "grouped_rows": ((2, 32, 24), STACK, (9, 32), lambda w, x: lax.ragged_dot(x, w, jnp.array([4, 5]))),
    "convolution": ((3, 8, 24), CONV, (1, 9, 8), lambda w, x: lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))),
}  # fmt: skip


def case(kind):
    shape, layout, x_shape, fn = KINDS[kind]
    a_shape, b_shape = layout.factor_shapes(shape, 4)
    pair = lj.LowRank(normal(3, *a_shape), normal(4, *b_shape), layout, 0.5, branch_dtype="float32")
    return normal(1, *shape, dtype=BF16), normal(2, *x_shape, dtype=BF16), pair, fn


def expected(fn, w, x, pair):
    """The two summands of PEFT's `result = (x W + s (x A) B).to(bfloat16)`: `x W` in bfloat16, the branch and the sum in float32."""
    branch = fn(pair.delta(), x.astype(F32))
    return fn(w, x).astype(F32), branch


@pytest.mark.parametrize("kind", KINDS)
def test_the_branch_and_the_sum_are_in_float32(kind):
    w, x, pair, fn = case(kind)
    base, branch = expected(fn, w, x, pair)
    run = lambda pair: lj.lora(lambda p, x: fn(p["w"], x))(lj.attach({"w": w}, {"w": pair}), x)
    got, narrow = run(pair), run(dataclasses.replace(pair, branch_dtype=None))
    assert got.dtype == narrow.dtype == BF16
    assert distance(got, (base + branch).astype(BF16)) < 2e-4 < 1e-3 < distance(narrow, (base + branch).astype(BF16))


def test_magnitudes_biases_and_scales():
    w, x, pair, fn = case("dense")
    run = lambda pair: lj.lora(lambda p, x: fn(p["w"], x))(lj.attach({"w": w}, {"w": pair}), x)
    base, branch = expected(fn, w, x, pair)
    merged = w.astype(F32) + pair.delta()
    magnitude, bias = 1 + jnp.arange(24.0) / 5, normal(5, 24)
    gain = (magnitude / jnp.linalg.norm(merged, axis=0))[None]
    got = run(dataclasses.replace(pair, magnitude=magnitude, bias=bias))
    assert distance(got, ((base + branch) * gain + 0.5 * bias[None]).astype(BF16)) < 2e-4
    scales = {"lambda_d": normal(6, 4), "lambda_b": normal(7, 24)}
    change = 0.5 * x.astype(F32) @ (pair.a * scales["lambda_d"][None] @ pair.b * scales["lambda_b"][None])
    assert distance(run(dataclasses.replace(pair, **scales)), (base + change).astype(BF16)) < 2e-4


def test_dropout_is_drawn_in_the_branch_dtype():
    w, x, pair, fn = case("dense")
    key, pair = jax.random.key(0), dataclasses.replace(pair, dropout=0.3)
    run = lambda pair, w, x: lj.lora(lambda p, x: fn(p["w"], x), key=key)(lj.attach({"w": w}, {"w": pair}), x)
    zero = run(pair, jnp.zeros_like(w), x)
    exact = run(dataclasses.replace(pair, branch_dtype=None), jnp.zeros(w.shape), x.astype(F32))
    assert distance(zero, exact.astype(BF16)) == 0


def test_a_narrower_branch_is_added_in_the_wider_dtype():
    w, x, pair, fn = case("dense")
    w, x = w.astype(F32), x.astype(F32) + 1e-4
    got = lj.lora(lambda p, x: fn(p["w"], x))(lj.attach({"w": w}, {"w": dataclasses.replace(pair, branch_dtype="bfloat16")}), x)
    low = lambda array: array.astype(BF16)
    branch = ((low(x) @ low(pair.a)) * 0.5) @ low(pair.b)
    assert got.dtype == F32 and distance(got, x @ w + branch.astype(F32)) < 1e-6


def test_the_configuration_says_it(tmp_path):
    config = lj.LoraConfig(rank=4, targets=["w"], branch_dtype=np.float32)
    w, x, _, fn = case("dense")
    adapters = lj.init(jax.random.key(0), config, lambda p, x: fn(p["w"], x), {"w": w}, x)
    lj.checkpoint.save(tmp_path, adapters, config=config, step=1)
    for pair in (adapters["w"], lj.checkpoint.load(tmp_path)["w"]):
        assert isinstance(pair, lj.LowRank) and pair.branch_dtype == config.branch_dtype == "float32"
    with pytest.raises(lj.InputError, match="branch_dtype must be a floating-point dtype, not int8"):
        lj.LoraConfig(branch_dtype="int8")
    other = {"w": dataclasses.replace(adapters["w"], branch_dtype=None)}
    with pytest.raises(lj.InputError, match="different layouts, dropouts or branch dtypes"):
        lj.algebra.add(adapters, other)

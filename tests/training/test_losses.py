"""The chunked cross-entropy against optax's on all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.training.losses import token_cross_entropy
from tests.benchmarks.measure import dot_flops
from tests.support.dataflow import dependents
from tests.support.frontends import normal
from tests.support.identity import distance, random_adapters
from tests.support.marks import every_other

HIDDEN = normal(0, 3, 7, 8)
WEIGHTS = normal(1, 8, 50)
LABELS = jax.random.randint(jax.random.key(2), (3, 7), 0, 50)
NOISE = jax.random.uniform(jax.random.key(3), (3, 7))


def whole(hidden, weights):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ weights, LABELS)


@pytest.mark.parametrize("chunk", every_other([1, 4, 7, 21, None, 100]))
def test_equals_the_loss_of_all_logits(chunk):
    run = lambda loss: jax.value_and_grad(lambda h, w: jnp.vdot(loss(h, w), NOISE), (0, 1))(HIDDEN, WEIGHTS)
    got = run(lambda hidden, weights: token_cross_entropy(lambda x: x @ weights, hidden, LABELS, chunk=chunk))
    assert distance(got, run(whole)) < 1e-6


@pytest.mark.parametrize("chunk", [2, 5, None])
def test_chunks_of_several_parts(chunk):
    run = lambda loss: jax.value_and_grad(lambda h, w: jnp.vdot(loss(h, w), NOISE), (0, 1))(HIDDEN, WEIGHTS)
    got = run(lambda hidden, weights: token_cross_entropy(lambda x: x @ weights, hidden, LABELS, chunk=chunk, parts=3))
    assert distance(got, run(whole)) < 1e-6
    with pytest.raises(ValueError, match=r"labels of the shape \(3, 7\) can't be cut into 2 equal parts along the first axis"):
        token_cross_entropy(lambda x: x @ WEIGHTS, HIDDEN, LABELS, parts=2)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_may_be_adapted(tied):
    """Inside `lora(fn)`, a head of its own or a tied table, quantised or not."""
    params = {"table": normal(4, 50, 8), "head": WEIGHTS}

    def fn(params, ids):
        head = (lambda x: x @ params["table"].T) if tied else (lambda x: x @ params["head"])
        return token_cross_entropy(head, jnp.tanh(params["table"][ids]), LABELS, chunk=4)

    config = lj.LoraConfig(rank=2, targets=["table"] if tied else ["head"])
    adapters = random_adapters(lj.init(jax.random.key(0), config, fn, params, LABELS), jnp.float32)
    run = lambda fn: jax.value_and_grad(lambda a: jnp.vdot(fn(a), NOISE))(adapters)
    got = run(lambda a: lj.lora(fn)(lj.attach(params, a), LABELS))
    assert distance(got, run(lambda a: fn(lj.merge(params, a), LABELS))) < 1e-5
    if not tied:
        rounded = lj.quantize(params, ["head"], "int8", block=10)
        dense = {**params, "head": lj.quant.dense(rounded["head"])}
        values = [lj.lora(fn)(lj.attach(base, adapters), LABELS) for base in (rounded, dense)]
        np.testing.assert_allclose(*values, rtol=1e-5)


def test_no_value_has_all_logits_and_one_product_is_made_twice():
    loss = lambda chunk: lambda h: token_cross_entropy(lambda x: x @ WEIGHTS, h, LABELS, chunk=chunk).sum()
    sizes = []
    jaxpr = jax.make_jaxpr(jax.grad(loss(3)))(HIDDEN)
    dependents(jaxpr, [True], lambda eqn, aval: sizes.append(np.prod(getattr(aval, "shape", ()))))
    assert max(sizes) < LABELS.size * 50
    product = 2 * LABELS.size * 8 * 50
    assert dot_flops(jax.make_jaxpr(jax.grad(lambda h: whole(h, WEIGHTS).sum()))(HIDDEN)) == 2 * product
    assert dot_flops(jaxpr) == 3 * product and dot_flops(jaxpr, again=False) == 2 * product


def test_temporaries_do_not_grow_with_the_vocabulary():
    """The logits at once are as many whatever the vocabulary."""

    def temporaries(vocabulary):
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2048, 16), (16, vocabulary))]
        loss = lambda h, w: token_cross_entropy(lambda x: x @ w, h, jnp.zeros(2048, jnp.int32)).mean()
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(128_256) < 1.2 * temporaries(8192)


def test_half_precision_is_summed_up_in_float32():
    half = HIDDEN.astype(jnp.bfloat16), WEIGHTS.astype(jnp.bfloat16)
    got = token_cross_entropy(lambda x: x @ half[1], half[0], LABELS, chunk=5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, whole(HIDDEN, WEIGHTS), atol=0.1)


@pytest.mark.parametrize(
    ("labels", "chunk", "message"),
    [
        (LABELS[:2], None, r"hidden has the shape \(3, 7, 8\) and labels \(2, 7\); labels need \(3, 7\)"),
        (LABELS, 0, "chunk must be at least 1, not 0"),
    ],
)
def test_bad_requests(labels, chunk, message):
    with pytest.raises(ValueError, match=message):
        token_cross_entropy(lambda x: x @ WEIGHTS, HIDDEN, labels, chunk=chunk)

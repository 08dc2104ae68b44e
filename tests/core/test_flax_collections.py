"""Linen models with more than parameters: batch statistics, a key-value cache, boxed parameters; and a bf16 base."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.identity import distance, random_adapters

pytestmark = pytest.mark.usefixtures("lenient")
X = normal(1, 5, 8)


def adapters_of(fn, variables, *args, **options):
    config = lj.LoraConfig(rank=2, **options)
    return random_adapters(jax.eval_shape(lambda v: lj.init(jax.random.key(0), config, fn, v, *args), variables), jnp.float32)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dense(4)(nn.relu(x))


def test_batch_statistics_move():
    model = Normed()
    variables = model.init(jax.random.key(0), X, False)
    adapters = adapters_of(model.apply, variables, X, False)
    assert sorted(adapters) == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
    params, merged = lj.attach(variables, adapters), lj.merge(variables, adapters)
    for scale in (1.0, 2.0, 3.0):
        out, moved = lj.lora(model.apply)(params, X * scale, train=True, mutable=["batch_stats"])
        want, oracle = model.apply(merged, X * scale, train=True, mutable=["batch_stats"])
        assert distance((out, moved), (want, oracle)) < 1e-5
        assert distance(moved["batch_stats"], params["batch_stats"]) > 0.1
        params, merged = {**params, **moved}, {**merged, **oracle}
    assert distance(lj.lora(model.apply)(params, X, train=False), model.apply(merged, X, train=False)) < 1e-5


def test_decoding_with_a_cache_equals_the_whole_sequence():
    options = {"num_heads": 2, "qkv_features": 8}
    decoder, whole = nn.MultiHeadDotProductAttention(decode=True, **options), nn.MultiHeadDotProductAttention(**options)
    xs = normal(3, 2, 6, 8)
    variables = decoder.init(jax.random.key(0), xs)
    step = jax.jit(lambda params, x: lj.lora(decoder.apply)(params, x, mutable=["cache"]))
    adapters = adapters_of(lambda p, x: decoder.apply(p, x, mutable=["cache"]), variables, xs[:, :1])
    assert sorted(path.split("/")[1] for path in adapters) == ["key", "out", "query", "value"]
    params, outs = lj.attach(variables, adapters), []
    for t in range(xs.shape[1]):
        out, moved = step(params, xs[:, t : t + 1])
        params, outs = {**params, **moved}, [*outs, out]
    merged = {"params": lj.merge(variables, adapters)["params"]}
    want = whole.apply(merged, xs, mask=nn.make_causal_mask(jnp.ones((2, 6))))
    assert distance(jnp.concatenate(outs, 1), want) < 1e-5


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_boxed_parameters(box):
    model = nn.Dense(6, kernel_init=box(nn.initializers.lecun_normal(), ("embed", "mlp")))
    variables = model.init(jax.random.key(0), X)
    adapters = adapters_of(model.apply, variables, X)
    assert list(adapters) == ["params/kernel"]
    params, merged = lj.attach(variables, adapters), lj.merge(variables, adapters)
    assert distance(lj.lora(model.apply)(params, X), model.apply(merged, X)) < 1e-5
    assert nn.get_partition_spec(merged) == nn.get_partition_spec(variables)
    assert jax.tree.structure(lj.detach(params)[0]) == jax.tree.structure(variables)
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)
    shapes = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model.apply, abstract, X)
    assert isinstance(shapes["params/kernel"].a, jax.ShapeDtypeStruct)


def test_a_bfloat16_base_keeps_its_dtype_and_the_adapters_theirs():
    model = nn.Dense(6, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), X)
    adapters = adapters_of(model.apply, variables, X)
    out = lj.lora(model.apply)(lj.attach(variables, adapters), X)
    assert out.dtype == lj.merge(variables, adapters)["params"]["kernel"].dtype == jnp.bfloat16
    loss = lambda a: lj.lora(model.apply)(lj.attach(variables, a), X).astype(jnp.float32).sum()
    grads = jax.grad(loss)(adapters)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), variables)
    want = nn.Dense(6).apply(lj.merge(exact, adapters), X)
    assert distance(out.astype(jnp.float32), want) < 2e-2

"""NNX modules as functions: the same results as the module's own, and what becomes of their state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lora_jax as lj
from tests.support.frontends import normal
from tests.support.marks import every_other


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=rngs, decode=False)
        self.norm = nnx.BatchNorm(8, momentum=0.5, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(self.dropout(nnx.relu(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rate=0.0):
        rngs = nnx.Rngs(0, dropout=1)
        self.layers = nnx.List([Block(rngs, rate), Block(rngs, rate)])

    def __call__(self, x, *, scale=1.0):
        for layer in self.layers:
            x = layer(x)
        return x * scale

    def first(self, x):
        return self.layers[0].up(x)


X = normal(0, 3, 5, 8)


def assert_close(got, want, tolerance=1e-5):
    """Equal in the norm of each leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape and np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


def random_adapters(fn, params, *args, targets="all-linear", **options):
    """Adapters whose B is not zero."""
    config = lj.LoraConfig(rank=2, alpha=2, targets=targets, **options)
    adapters = jax.eval_shape(lambda params: lj.init(jax.random.key(0), config, fn, params, *args), params)
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(normal(leaf.size, *leaf.shape)) / 4), adapters)


def test_paths():
    """Module attributes joined by `/`, without the `value` of each variable."""
    _, params = lj.nnx.functional(Model())
    paths = list(lj.paths.flatten(params)[0])
    assert paths[:2] == ["layers/0/attention/key/bias", "layers/0/attention/key/kernel"]
    assert "layers/1/attention/query/kernel" in paths
    assert not [path for path in paths if "rngs" in path or "mean" in path]


def evaluated(rate=0.0):
    model = Model(rate)
    model.eval()
    return model


def test_closed_equals_the_module():
    fn, params = lj.nnx.functional(evaluated(rate=0.5))
    want = evaluated()(X, scale=2.0)
    assert_close(fn(params, X, scale=2.0), want)
    assert_close(jax.jit(fn)(params, X, scale=2.0), want)


class Inside(nnx.Module):
    """A block that is called through an NNX transform, which gives back the whole of its state, changed or not."""

    def __init__(self, transform):
        self.block, self.transform = Block(nnx.Rngs(0), rate=0.5), transform

    def __call__(self, x):
        return self.transform(lambda block, x: block(x))(self.block, x)


@pytest.mark.parametrize("transform", [lambda fn: fn, nnx.jit, nnx.remat, lambda fn: nnx.jit(nnx.remat(fn))])
def test_a_closed_state_must_not_change(transform):
    model = Inside(transform)
    fn, params = lj.nnx.functional(model)
    for call in (fn, jax.jit(fn), lambda params, x: random_adapters(fn, params, x)):
        with pytest.raises(ValueError, match="changes block/dropout/rngs/count, block/norm/mean, block/norm/var, which"):
            call(params, X)
    model.eval()
    fn, params = lj.nnx.functional(model)
    for call in (fn, jax.jit(fn)):
        assert_close(call(params, X), model(X))


class Layers(nnx.Module):
    """Layers under a scan, for which a stream is split whether they draw from it or not."""

    def __init__(self):
        made = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: Block(rngs, rate=0.5)))
        self.layers = made(nnx.Rngs(0, dropout=1))
        self.own = nnx.Rngs(dropout=2)

    def __call__(self, x, *, state=0.0):
        @nnx.split_rngs(splits=2)
        def forward(rngs, x):
            del rngs
            return nnx.scan(lambda x, layer: (layer(x), None), in_axes=(nnx.Carry, 0))(x, self.layers)[0]

        return forward(self.own, x) + state


def test_a_stream_that_is_split_in_vain_may_go_on():
    """And a module may have an argument called `state`."""
    model = Layers()
    model.eval()
    fn, params = lj.nnx.functional(model)
    assert_close(fn(params, X, state=1.0), model(X, state=1.0))
    assert_close(jax.jit(fn)(params, X), model(X))
    model.train()
    with pytest.raises(ValueError, match="which a closed state would drop"):
        fn, params = lj.nnx.functional(model)
        fn(params, X)


def test_returned_goes_on_as_the_module_does():
    """Batch statistics and dropout streams move through three calls as they do in the module itself."""
    model = Model(rate=0.5)
    fn, params, state = lj.nnx.functional(model, state="returned")
    step = jax.jit(fn)
    for _ in range(3):
        want = model(X)
        got, state = step(params, state, X)
        assert_close(got, want)
    assert_close(statistics(state), statistics(nnx.as_pure(nnx.state(model))))
    assert len(statistics(state)) == 4
    assert step._cache_size() == 1


def statistics(tree):
    return {path: leaf for path, leaf in lj.paths.flatten(tree)[0].items() if path.endswith(("norm/mean", "norm/var"))}


def test_method():
    model = Model()
    fn, params = lj.nnx.functional(model, method="first")
    assert_close(fn(params, X), model.first(X))


@pytest.mark.parametrize("jit", every_other([True, False]))
def test_lora_equals_merged(jit):
    fn, params = lj.nnx.functional(evaluated())
    adapters = random_adapters(fn, params, X)
    assert "layers/0/attention/query/kernel" in adapters
    apply = jax.jit(lj.lora(fn)) if jit else lj.lora(fn)
    assert_close(apply(lj.attach(params, adapters), X), fn(lj.merge(params, adapters), X))

    def loss(function):
        return lambda adapters: jnp.sum(function(adapters) ** 2)

    low_rank = jax.grad(loss(lambda a: lj.lora(fn)(lj.attach(params, a), X)))(adapters)
    merged = jax.grad(loss(lambda a: fn(lj.merge(params, a), X)))(adapters)
    assert_close(low_rank, merged)


def test_lora_with_returned_state():
    fn, params, state = lj.nnx.functional(Model(rate=0.5), state="returned")
    adapters = random_adapters(fn, params, state, X)
    apply = jax.jit(lj.lora(fn))
    got, new = apply(lj.attach(params, adapters), state, X)
    want, merged_new = fn(lj.merge(params, adapters), state, X)
    assert_close(got, want)
    leaves, merged_leaves = (lj.paths.flatten(tree)[0] for tree in (new, merged_new))
    moved = 0
    for path, leaf in lj.paths.flatten(state)[0].items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        assert_close(leaves[path], merged_leaves[path])
        moved += not np.array_equal(leaf, leaves[path])
    assert moved == 6  # mean and variance of two norms, the counts of two dropout streams
    assert not np.allclose(got, apply(lj.attach(params, adapters), new, X)[0])


def test_training_step(lenient):
    fn, params, state = lj.nnx.functional(Model(rate=0.1), state="returned")
    adapters = random_adapters(fn, params, state, X)
    tx = optax.adam(1e-2)

    def loss_fn(params, batch, key):
        x, state = batch
        out, state = lj.lora(fn)(params, state, x)
        return jnp.mean(out**2), state

    step = lj.train.make_train_step(loss_fn, tx)
    run = lj.train.init_state(adapters, tx, key=jax.random.key(1))
    losses = []
    for _ in range(30):
        run, metrics = step(run, params, (X, state))
        state = metrics["aux"]
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1


def test_merged_parameters_go_back_into_the_module():
    model = evaluated()
    fn, params = lj.nnx.functional(model)
    adapters = random_adapters(fn, params, X)
    want = fn(lj.merge(params, adapters), X)
    nnx.update(model, lj.merge(params, adapters))
    assert_close(model(X), want)


def test_cache():
    """Decoding step by step through a returned cache equals the module's own."""
    options = {"num_heads": 2, "in_features": 8, "rngs": nnx.Rngs(0), "decode": True}
    model = nnx.MultiHeadAttention(**options)
    model.init_cache((3, 5, 8))
    fn, params, state = lj.nnx.functional(model, state="returned")
    adapters = random_adapters(fn, params, state, X[:, :1], targets=["query", "value"])
    apply, tree = jax.jit(lj.lora(fn)), lj.attach(params, adapters)
    nnx.update(model, lj.merge(params, adapters))
    for position in range(5):
        token = X[:, position : position + 1]
        got, state = apply(tree, state, token)
        assert_close(got, model(token))
    assert apply._cache_size() == 1


def test_new_variables_are_an_error_in_a_returned_state_only():
    class Rememberer(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            self.seen = nnx.Intermediate(self.linear(x))
            return self.seen[...]

    fn, params, state = lj.nnx.functional(Rememberer(), state="returned")
    with pytest.raises(ValueError, match=r"made new variables \(seen\) or dropped some \(none\)"):
        fn(params, state, jnp.ones((2, 3)))
    fn, params = lj.nnx.functional(Rememberer())
    assert fn(params, jnp.ones((2, 3))).shape == (2, 4)


def test_bad_arguments():
    with pytest.raises(ValueError, match="state must be 'closed' or 'returned', not 'open'"):
        lj.nnx.functional(Model(), state="open")
    with pytest.raises(TypeError, match=r"model must be an nnx\.Module, not a Dense"):
        lj.nnx.functional(linen.Dense(3))
    with pytest.raises(TypeError, match="Model has no method 'encode' to call"):
        lj.nnx.functional(Model(), method="encode")

"""Many adapter sets in one program: stacked, one for each row of a batch, and trained side by side."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core.adapter import Rows
from tests.benchmarks import decoder, measure
from tests.benchmarks.many import compare_rows, compare_sweep, exchangeable, trained_sets
from tests.support.frontends import FRONTENDS, normal, params
from tests.support.identity import distance, random_adapters
from tests.support.marks import checkerboard, every_other

SMALL = decoder.Sizes(width=32, heads=2, layers=2, hidden=48, vocabulary=64, length=8, batch=6, rank=8)
X, VARIABLES = normal(9, 4, 3, 8), params(jnp.float32, w=(8, 6), u=(6, 4))


def model(p, x):
    return jnp.tanh(x @ p["w"]) @ p["u"]


def trained(rank, seed=0, scale=2.0, **options):
    """A set whose arrays are all random."""
    config = lj.LoraConfig(rank=rank, alpha=scale * rank, **options)
    adapters = jax.eval_shape(lambda variables: lj.init(jax.random.key(seed), config, model, variables, X), VARIABLES)
    leaves, treedef = jax.tree.flatten(adapters)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(0.3 * np.asarray(normal(seed + i, *leaf.shape))) for i, leaf in enumerate(leaves)]
    )


def same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second)))


# --- stack ------------------------------------------------------------------------------------------------------------


def test_unstack_is_the_inverse_of_stack():
    sets = [trained(1, scale=2.0), trained(4, 1, scale=0.5, targets=["w"]), trained(2, 2, train=["u"], targets=["w"])]
    pairs = [{"w": one["w"]} for one in sets]
    stacked = lj.many.stack(pairs)
    assert stacked["w"].a.shape == (3, 8, 4) and stacked["w"].b.shape == (3, 4, 6)
    assert stacked["w"].scale.tolist() == [2.0, 0.5, 2.0]
    assert all(map(same, lj.many.unstack(stacked, like=pairs), pairs))
    shapes = jax.eval_shape(lambda: pairs)
    assert all(map(same, lj.many.unstack(stacked, like=shapes), pairs))
    whole = lj.many.unstack(stacked)
    assert whole[0]["w"].rank == 4 and whole[1]["w"].scale == 0.5
    assert distance(whole[0]["w"].delta(), pairs[0]["w"].delta()) < 1e-6


def test_a_set_without_a_pair_gets_a_zero_one():
    sets = [trained(2), trained(2, 1, targets=["w"])]
    stacked = lj.many.stack(sets)
    assert stacked["u"].scale == 2.0 and not stacked["u"].a[1].any() and not stacked["u"].b[1].any()
    assert all(map(same, lj.many.unstack(stacked, like=sets), sets))


def test_stacked_kernels_keep_their_scale_per_layer():
    layers = lj.Layout((0,), (1,), (2,))
    one = lj.LowRank(normal(0, 3, 4, 2), normal(1, 3, 2, 5), layers, scale=jnp.array([1.0, 0.0, 2.0]), ranks=(2, 0, 1))
    two = lj.LowRank(normal(2, 3, 4, 1), normal(3, 3, 1, 5), layers, scale=0.5)
    stacked = lj.many.stack([{"w": one}, {"w": two}])
    assert stacked["w"].scale.tolist() == [[1.0, 0.0, 2.0], [0.5, 0.5, 0.5]] and stacked["w"].ranks is None
    assert all(map(same, lj.many.unstack(stacked, like=[{"w": one}, {"w": two}]), [{"w": one}, {"w": two}]))


PAIR = trained(2)["w"]
UNLIKE = {
    "layouts": (
        dataclasses.replace(PAIR, layout=lj.Layout((), (1,), (0,))),
        r"w: these adapters can't be stacked.*\n.*inputs=\(0,\)",
    ),
    "dropouts": (dataclasses.replace(PAIR, dropout=0.5), r"(?s)can't be stacked.*dropout=0.0.*dropout=0.5"),
    "kinds": (lj.Full(jnp.ones((8, 6))), r"(?s)w: these adapters can't be stacked.*LowRank: a \(8, 2\).*Full: value \(8, 6\)"),
    "shapes": (dataclasses.replace(PAIR, a=jnp.ones((9, 2))), r"(?s)a \(8, 2\).*a \(9, 2\)"),
    "biases": (dataclasses.replace(PAIR, bias=jnp.ones(6)), r"(?s)can't be stacked.*bias \(6,\)"),
}


@pytest.mark.parametrize("difference", UNLIKE)
def test_what_can_not_be_stacked(difference):
    other, message = UNLIKE[difference]
    with pytest.raises(ValueError, match=message):
        lj.many.stack([{"w": PAIR}, {"w": other}])


def test_what_has_no_neutral_value_must_be_in_every_set():
    with pytest.raises(ValueError, match="w: one set has a Full adapter and another has nothing"):
        lj.many.stack([{"w": lj.Full(jnp.ones(2))}, {}])
    with pytest.raises(ValueError, match="w: one set has a pair with a magnitude and another has nothing"):
        lj.many.stack([{}, {"w": dataclasses.replace(PAIR, magnitude=jnp.ones(6))}])
    with pytest.raises(ValueError, match="there are no adapter sets to stack"):
        lj.many.stack([])


def test_unstack_refuses_what_does_not_fit():
    stacked = lj.many.stack([{"w": PAIR}, {"w": PAIR}])
    with pytest.raises(ValueError, match="2 members are stacked, but `like` has 1"):
        lj.many.unstack(stacked, like=[{"w": PAIR}])
    with pytest.raises(ValueError, match="the stacked tree has no u/a, u/b, which `like` has"):
        lj.many.unstack(stacked, like=[{"w": PAIR}, {"w": PAIR, "u": PAIR}])
    with pytest.raises(ValueError, match=r"the leading axes \[\(2,\), \(8,\)\], not one size: make the tree with `many.stack`"):
        lj.many.lora(model)(VARIABLES, {"w": PAIR}, jnp.array([0]), X)


# --- rows -------------------------------------------------------------------------------------------------------------


def with_scales(pair, seed):
    return dataclasses.replace(pair, lambda_d=normal(seed, 2), lambda_b=normal(seed + 1, 6), frozen=("a", "b"))


def check_rows(sets, index, rows_each=1, variables=VARIABLES, plain=model, **options):
    stacked = lj.many.stack(sets)
    got = lj.many.lora(model, **options)(variables, stacked, jnp.array(index), X)
    for row, number in enumerate(np.repeat(index, rows_each)):
        x = X[row : row + 1]
        want = plain(variables, x) if number < 0 else lj.lora(model)(lj.attach(variables, sets[number]), x)
        assert distance(got[row : row + 1], want) < 1e-5


KINDS = {
    "pairs of other ranks and scales": lambda i: trained(i + 1, i, scale=i + 0.5),
    "magnitudes": lambda i: trained(2, i, dora=True),
    "VeRA's scales": lambda i: {"w": with_scales(trained(2, i)["w"], i)},
    "whole parameters": lambda i: trained(2, i, targets=["w"], train=["u"]),
}


def test_no_adapters_beside_a_quantised_kernel():
    """DoRA's neutral magnitude is that of what the base computes with."""
    base = lj.quantize(VARIABLES, ["w"], "int8", block=4)
    pair = trained(2, dora=True)["w"]
    none = lj.many.neutral(base, {"w": pair})
    assert distance(lj.lora(model)(lj.attach(base, none), X), lj.lora(model)(base, X)) < 1e-5


BOTH = pytest.mark.parametrize("grouped", [False, True])


@pytest.mark.parametrize(("grouped", "kind"), checkerboard([False, True], KINDS))
def test_each_row_has_its_own_set(kind, grouped):
    check_rows([KINDS[kind](i) for i in range(3)], [2, -1, 0, 2], grouped=grouped)


@pytest.mark.parametrize(("grouped", "kind"), checkerboard([False, True], ["int8", "nf4"]))
def test_magnitudes_beside_quantised_kernels(kind, grouped):
    base = lj.quantize(VARIABLES, ["w", "u"], kind, block=2)
    check_rows([KINDS["magnitudes"](i) for i in range(3)], [2, -1, 0, 2], variables=base, plain=lj.lora(model), grouped=grouped)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32"])
def test_an_index_of_any_integers(dtype):
    assert lj.many.check_index(np.array([0, 1], dtype), 2).tolist() == [0, 1]
    with pytest.raises(ValueError, match="index asks for the set 1, but there are 1, numbered from 0"):
        lj.many.check_index(np.array([0, 1], dtype), 1)


@BOTH
def test_several_rows_can_share_an_entry(grouped):
    check_rows([trained(2), trained(1, 1)], [1, -1], rows_each=2, grouped=grouped)


@BOTH
def test_adapters_that_act_on_some_tokens(grouped):
    sets = [{path: dataclasses.replace(pair, invocation=(3,)) for path, pair in trained(2, i).items()} for i in range(2)]
    active, index = normal(1, 4, 3) > 0, [1, -1, 0, 1]
    got = lj.many.lora(model, active=active, grouped=grouped)(VARIABLES, lj.many.stack(sets), jnp.array(index), X)
    for row, number in enumerate(index):
        x, mask = X[row : row + 1], active[row : row + 1]
        want = model(VARIABLES, x) if number < 0 else lj.lora(model, active=mask)(lj.attach(VARIABLES, sets[number]), x)
        assert distance(got[row : row + 1], want) < 1e-5


@pytest.mark.parametrize(
    ("flavour", "grouped"),
    [
        ("scan", True),
        pytest.param("remat", False, marks=pytest.mark.slow),
        pytest.param("scan", False, marks=pytest.mark.slow),
        pytest.param("remat", True, marks=pytest.mark.slow),
    ],
)
def test_layers_under_a_scan_or_remat(flavour, grouped, lenient):
    model, tokens = decoder.plain(SMALL, flavour), decoder.batch(SMALL)[:3, :-1]
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    sets, index = trained_sets(model, variables, 3), jnp.array([2, -1, 0])
    fn = lj.many.lora(model.apply, grouped=grouped)
    got = jax.jit(fn)(variables, lj.many.stack(sets), index, tokens)
    apply = jax.jit(model.apply)
    want = [
        apply(lj.merge(variables, sets[i]) if i >= 0 else variables, tokens[r : r + 1]) for r, i in enumerate(index.tolist())
    ]
    assert distance(got, jnp.concatenate(want)) < 1e-5
    if grouped:
        jaxpr = str(jax.make_jaxpr(fn)(variables, lj.many.stack(sets), index, tokens))
        products = 2 * len(decoder.TARGETS) * (1 if flavour == "scan" else SMALL.layers)
        assert jaxpr.count("= ragged_dot_general") == products  # A and B of every kernel, none of them gathered


@pytest.mark.parametrize(("grouped", "own_sizes"), every_other([(True, True), (True, False), (False, False), (False, True)]))
def test_experts_that_all_rows_share(own_sizes, grouped):
    """JAX can't vmap their ragged products; here they are one product for all rows."""
    case = FRONTENDS["experts_ragged"](jnp.float32)
    sets = [lj.init(jax.random.key(i), case.config, case.fn, case.variables, *case.args) for i in range(2)]
    sets = [random_adapters(jax.tree.map(lambda x, i=i: x * (i + 1), one), jnp.float32) for i, one in enumerate(sets)]
    x, index = normal(4, 3, 9, 8), jnp.array([1, -1, 0])
    sizes = jnp.array([[3, 0, 4, 2], [1, 1, 1, 1], [0, 2, 7, 0]]) if own_sizes else case.args[1]
    one = lambda p, x, sizes: case.fn(p, x[0], sizes[0] if own_sizes else sizes)[None]
    fn = lj.many.lora(one, in_axes=(0, 0 if own_sizes else None), grouped=grouped)
    got = fn(case.variables, lj.many.stack(sets), index, x, sizes)
    for row, number in enumerate(index.tolist()):
        variables = case.variables if number < 0 else lj.merge(case.variables, sets[number])
        assert distance(got[row], case.fn(variables, x[row], sizes[row] if own_sizes else sizes)) < 1e-5


def test_a_row_does_not_see_the_sets_of_others():
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, trained(2))
    got = lj.many.lora(model)(VARIABLES, lj.many.stack([trained(2), broken]), jnp.array([-1, 1, -1, 0]), X)
    assert jnp.isnan(got).any((1, 2)).tolist() == [False, True, False, False]


def test_rows_of_a_table():
    table = {"table": normal(0, 9, 4)}
    lookup = lambda p, ids: p["table"][ids]
    sets = [{"table": Rows(normal(i + 1, 2, 4), (4, 7), lj.Layout((), (0,), (1,)))} for i in range(2)]
    ids = jnp.array([[4, 1], [7, 4], [7, 7]])
    got = lj.many.lora(lookup)(table, lj.many.stack(sets), jnp.array([1, -1, 0]), ids)
    want = jnp.stack(
        [lookup(lj.merge(table, sets[1]), ids[0]), lookup(table, ids[1]), lookup(lj.merge(table, sets[0]), ids[2])]
    )
    assert distance(got, want) < 1e-6


@BOTH
def test_axes_of_arguments_and_results(grouped):
    """A state with its rows on the second axis goes in and out, other arguments have no rows, and some are no arrays."""

    def step(p, state, x, shift, name, *, factor):
        assert name == ("static", None) and state["h"].shape == (2, 1, 6) and x.shape == (1, 8)
        h = jnp.tanh(x @ p["w"] + shift)[None] + state["h"] * factor
        return {"h": h}, (h.sum(0) @ p["u"])

    sets, index = [trained(2), trained(3, 1)], jnp.array([1, 0, -1])
    state, x, shift = {"h": normal(1, 2, 3, 6)}, normal(2, 3, 8), normal(3, 1, 6)
    fn = lj.many.lora(step, in_axes=({"h": 1}, 0, None, None), out_axes=({"h": 1}, 0), grouped=grouped)
    got = fn(VARIABLES, lj.many.stack(sets), index, state, x, shift, ("static", None), factor=0.5)
    assert got[0]["h"].shape == (2, 3, 6)
    for row, number in enumerate(index.tolist()):
        variables = VARIABLES if number < 0 else lj.merge(VARIABLES, sets[number])
        own = {"h": state["h"][:, row : row + 1]}, x[row : row + 1]
        want = step(variables, *own, shift, ("static", None), factor=0.5)
        assert distance((got[0]["h"][:, row : row + 1], got[1][row : row + 1]), (want[0]["h"], want[1])) < 1e-5


@BOTH
def test_a_wrong_index_is_refused(grouped):
    stacked, fn = lj.many.stack([trained(2)]), lj.many.lora(model, grouped=grouped)
    with pytest.raises(ValueError, match="index asks for the set 1, but there are 1, numbered from 0"):
        fn(VARIABLES, stacked, jnp.array([0, 1, 0, 0]), X)
    assert jnp.isnan(jax.jit(fn)(VARIABLES, stacked, jnp.array([0, 1, 0, 0]), X)).any((1, 2)).tolist() == [
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match=r"index must be integers of the shape \(rows,\), not float32 of the shape \(4,\)"):
        fn(VARIABLES, stacked, jnp.zeros(4), X)
    with pytest.raises(ValueError, match=r"shape \(4, 3, 8\) has no axis 0 \(from 0 up\) with a row, .* each of the 3 in"):
        fn(VARIABLES, stacked, jnp.array([0, 0, 0]), X)


@BOTH
def test_the_gradient_of_each_set_comes_from_its_rows(grouped):
    sets, index = [trained(2), trained(2, 1), trained(2, 2)], jnp.array([1, 0, 1, -1])
    loss = lambda stacked: (lj.many.lora(model, grouped=grouped)(VARIABLES, stacked, index, X) ** 2).sum()
    alone = lambda one, rows: (lj.lora(model)(lj.attach(VARIABLES, one), X[jnp.array(rows)]) ** 2).sum()
    got = lj.many.unstack(jax.grad(loss)(lj.many.stack(sets)))
    wants = [jax.grad(alone)(sets[0], [1]), jax.grad(alone)(sets[1], [0, 2]), jax.tree.map(jnp.zeros_like, sets[2])]
    assert distance(got, wants) < 1e-5


def test_a_batch_of_many_costs_what_one_set_costs(lenient):
    """The products of the jaxpr, the rows' values, and that other sets compile nothing."""
    found = compare_rows(SMALL, sets=4)
    assert found.dot_flops == 1.0 and found.difference < 1e-5 and found.compiled_by_swaps == 0


def test_sets_of_other_ranks_and_alphas_share_the_program_of_lora(lenient):
    model, tokens = decoder.plain(SMALL), decoder.batch(SMALL)[:1, :-1]
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    ready = [lj.algebra.pad_rank(lj.algebra.fold_scale(one), 8) for one in trained_sets(model, variables, 4)]
    args = [(lj.attach(variables, one), tokens) for one in ready]
    rest = iter(args[1:])
    swap = measure.Variant("swap", jax.jit(lj.lora(model.apply)), args[0], lambda *_: next(rest, args[0]))
    assert measure.traces_and_compiles(swap, steps=4)[1] == 1


def test_for_inference_dropout_and_frozen_arrays_do_not_matter():
    """LoRA with dropout beside LoRA-FA, whole parameters that are trained beside ones that are not: one stack, one program."""
    sets = [
        {"w": pair_of(0, dropout=0.1), "head": lj.Full(jnp.full(6, 0.5))},
        {"w": pair_of(1, frozen=("a",)), "head": lj.Full(jnp.full(6, 0.25), frozen=("value",))},
    ]
    fn, base = lambda p, x: x @ p["w"] + p["head"][None], {"w": jnp.eye(8, 6), "head": jnp.zeros(6)}
    with pytest.raises(ValueError, match=r"can't be stacked.*stack `lj.algebra.fold_scale` of each set"):
        lj.many.stack(sets)
    run, x = jax.jit(lj.many.lora(fn)), jax.random.normal(jax.random.key(9), (2, 8))
    for order in (sets, sets[::-1]):
        got = run(base, lj.many.stack([lj.algebra.fold_scale(one) for one in order]), jnp.array([0, 1]), x)
        for i, one in enumerate(order):
            np.testing.assert_allclose(got[i], fn(lj.merge(base, one), x[i : i + 1])[0], rtol=0, atol=1e-5)
    assert run._cache_size() == 1


def pair_of(seed, **method):
    a, b = (jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(seed)), ((8, 2), (2, 6))))
    return lj.LowRank(a, b, lj.Layout((), (0,), (1,)), scale=0.5, **method)


def test_exchangeable_sets_have_one_structure(lenient):
    model, tokens = decoder.plain(SMALL), decoder.batch(SMALL)[:1, :-1]
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    shapes = [jax.eval_shape(lambda first=first: exchangeable(trained_sets(model, variables, 2, first))) for first in (0, 1)]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])


# --- training ---------------------------------------------------------------------------------------------------------


def loss_fn(p, batch, key):
    return jnp.mean((lj.lora(model, key=key)(p, batch) - 1.0) ** 2), {"mean": batch.mean()}


def test_members_end_as_runs_of_their_own(lenient):
    """Seeds, ranks, alphas, targets, learning rates, data, dropout, clipping and accumulation, each the member's own."""
    options = [dict(rank=1, alpha=2), dict(rank=4, alpha=8), dict(rank=3, alpha=1, targets=["w"])]
    sets = [lj.init(jax.random.key(i), lj.LoraConfig(dropout=0.1, **o), model, VARIABLES, X) for i, o in enumerate(options)]
    rates, keys = {"learning_rate": jnp.array([1e-2, 3e-3, 1e-3])}, jax.random.split(jax.random.key(5), 3)
    batches = normal(3, 5, 3, *X.shape)
    common = {"accumulate": 2, "max_grad_norm": 0.3}
    states = lj.many.init_states(sets, optax.adamw, rates, keys=keys)
    step = lj.many.make_train_step(loss_fn, optax.adamw, rates, batch_axis=0, **common)
    for batch in batches:
        states, metrics = step(states, VARIABLES, batch)
    assert step._cache_size() == 1 and metrics["loss"].shape == metrics["aux"]["mean"].shape == (3,)
    wants = []
    for member in range(3):
        tx = optax.adamw(float(rates["learning_rate"][member]))
        state = lj.train.init_state(sets[member], tx, key=keys[member])
        own = lj.train.make_train_step(loss_fn, tx, **common)
        for batch in batches:
            state, found = own(state, VARIABLES, batch[member])
        assert distance(metrics["loss"][member], found["loss"]) < 1e-5
        wants.append(state)
    for got, want in zip(lj.many.unstack(states, like=wants), wants):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        assert distance((got.adapters, got.opt_state), (want.adapters, want.opt_state)) < 1e-5
        assert int(got.step) == 5 and got.key == want.key
    assert not states.adapters["w"].a[0, :, 1:].any() and not states.adapters["u"].b[2].any()


def test_members_with_experts_end_as_runs_of_their_own(lenient):
    """The gradients of ragged products, of which the base's are shared."""
    case = FRONTENDS["experts_ragged"](jnp.float32)
    loss = lambda p, batch, key: (lj.lora(case.fn)(p, *batch) ** 2).mean()
    sets = [lj.init(jax.random.key(i), case.config, case.fn, case.variables, *case.args) for i in range(2)]
    rates, keys = {"learning_rate": jnp.full(2, 0.01)}, jax.random.split(jax.random.key(0))
    states = lj.many.init_states(sets, optax.sgd, rates, keys=keys)
    step, own = lj.many.make_train_step(loss, optax.sgd, rates), lj.train.make_train_step(loss, optax.sgd(0.01))
    alone = [lj.train.init_state(one, optax.sgd(0.01), key=keys[0]) for one in sets]
    for _ in range(3):
        states, _ = step(states, case.variables, case.args)
        alone = [own(state, case.variables, case.args)[0] for state in alone]
    assert distance(lj.many.unstack(states.adapters), [state.adapters for state in alone]) < 1e-5
    assert distance(alone[0].adapters, sets[0]) > 1e-3


def test_one_member_that_is_not_finite_stops_alone(lenient):
    sets = [trained(2), jax.tree.map(lambda leaf: leaf * jnp.inf, trained(2))]
    states = lj.many.init_states(sets, optax.sgd, {"learning_rate": jnp.ones(2)}, keys=jax.random.split(jax.random.key(0)))
    step = lj.many.make_train_step(loss_fn, optax.sgd, {"learning_rate": jnp.ones(2)})
    states, metrics = step(states, VARIABLES, X)
    assert states.skipped.tolist() == [0, 1] and jnp.isfinite(metrics["loss"]).tolist() == [True, False]
    assert distance(lj.many.unstack(states.adapters, like=sets)[0], sets[0]) > 1e-3


def test_stacked_sets_are_measured_one_after_the_other():
    sets = [trained(2), trained(3, 1)]
    metric = lambda p, batch: lj.lora(model)(p, batch).sum((1, 2))
    got = lj.many.make_eval_step(metric)(lj.many.stack(sets), VARIABLES, X)
    assert distance(got, jnp.stack([metric(lj.attach(VARIABLES, one), X) for one in sets])) < 1e-5


@pytest.mark.slow
def test_a_sweep_ends_as_its_runs_do(lenient):
    found = compare_sweep(dataclasses.replace(SMALL, batch=2, layers=1), [(1, 1e-3, 0), (4, 3e-3, 1)])
    assert found.distance < 1e-5 and found.compilations == 1


def test_hyperparameters_and_keys_are_one_for_each_member():
    sets, keys = [trained(2), trained(2, 1)], jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match=r"the hyperparameter learning_rate has the shape \(3,\): 2 members need \(2,\)"):
        lj.many.init_states(sets, optax.sgd, {"learning_rate": jnp.ones(3)}, keys=keys)
    with pytest.raises(ValueError, match=r"keys has the shape \(\): 2 members need \(2,\)"):
        lj.many.init_states(sets, optax.sgd, {"learning_rate": jnp.ones(2)}, keys=keys[0])
    with pytest.raises(ValueError, match="batch_axis must be 0 or None, not 1"):
        lj.many.make_train_step(loss_fn, optax.sgd, {}, batch_axis=1)

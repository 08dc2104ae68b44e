"""Control flow, indexing and odd forms of the product: each equals merged weights, in value and gradient."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lora_jax as lj
from lora_jax.core import jax_compat
from tests.support.frontends import normal, params
from tests.support.identity import distance, equal_to_merged, random_adapters

X = normal(9, 5, 8)
IDS = jnp.array([[0, -1, 3], [8, -9, 2]])
layer = lambda x, w: (jnp.tanh(x @ w), None)
STACK, SQUARE, TABLE = {"w": (3, 8, 8)}, {"w": (8, 8)}, {"t": (9, 4)}


def in_each_other(p, x):
    """scan around jit around remat around cond around a loop."""

    @jax.jit
    def step(x, w):
        loop = lambda x, w: lax.fori_loop(0, 2, lambda i, x: jnp.sin(x @ w), x)
        branches = lambda x, w: lax.cond(x.sum() > 0, lambda x, w: jnp.tanh(x @ w), loop, x, w)
        return jax.checkpoint(branches)(x, w), None

    return lax.scan(step, x, p["w"])[0]


def nested_scans(axis, p, x):
    outer = lambda x, ws: lax.scan(layer, x, jnp.moveaxis(ws, axis, 0))
    return lax.scan(outer, x, p["w"])[0]


def dynamic_layers(p, x):
    one = lambda i, x: jnp.tanh(x @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False))
    return lax.fori_loop(0, 3, one, x)


def own_rules(p, x):
    """Derivative rules around activations keep their (here deliberately wrong) gradients."""
    vjp, jvp = jax.custom_vjp(jnp.sin), jax.custom_jvp(jnp.sin)
    vjp.defvjp(lambda x: (vjp(x), x), lambda x, t: (t * 7.0,))
    jvp.defjvp(lambda x, t: (jvp(*x), t[0] * 3.0))
    return jvp(vjp(jax.nn.silu(x @ p["w"])))


LOOPS = {
    "scan": (STACK, lambda p, x: lax.scan(layer, x, p["w"])[0]),
    "scan_reverse": (STACK, lambda p, x: lax.scan(layer, x, p["w"], reverse=True)[0]),
    "scan_unroll": (STACK, lambda p, x: lax.scan(layer, x, p["w"], unroll=2)[0]),
    "scan_of_one": ({"w": (1, 8, 8)}, lambda p, x: lax.scan(layer, x, p["w"])[0]),
    "scan_of_scans": ({"w": (2, 3, 8, 8)}, functools.partial(nested_scans, 0)),
    "scan_of_scans_over_a_later_axis": ({"w": (2, 8, 3, 8)}, functools.partial(nested_scans, 1)),
    "map_over_kernels": (STACK, lambda p, x: lax.map(lambda w: x @ w, p["w"])),
    "map_over_rows": (SQUARE, lambda p, x: lax.map(lambda x: x @ p["w"], x, batch_size=2)),
    "in_each_other": (STACK, in_each_other),
    "fori_loop_slices_the_stack": (STACK, dynamic_layers),
    "fori_loop_indexes_the_stack": (STACK, lambda p, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)),
    "switch": (SQUARE, lambda p, x: lax.switch(2, [lambda w: x, lambda w: x @ w, lambda w: x @ w.T * 2.0], p["w"])),
    "own_rules": (SQUARE, own_rules),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_control_flow(name):
    shapes, fn = LOOPS[name]
    equal_to_merged(fn, params(jnp.float32, **shapes), (X,))


def test_while_loop_forward():
    """A weight in the condition and in the body; a while loop has no reverse mode, so values and tangents."""
    variables = params(jnp.float32, **SQUARE)

    def fn(p, x):
        small = lambda s: (s[0] < 3) & (jnp.abs(s[1] @ p["w"]).max() < 1e9)
        return lax.while_loop(small, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (0, x))[1]

    config = lj.LoraConfig(rank=2)
    adapters = random_adapters(lj.init(jax.random.key(0), config, fn, variables, X), jnp.float32)
    run = lambda f: jax.jvp(f, (adapters,), (jax.tree.map(jnp.cos, adapters),))
    ours = run(lambda a: lj.lora(fn)(lj.attach(variables, a), X))
    assert distance(ours, run(lambda a: fn(lj.merge(variables, a), X))) < 1e-5


policies = jax.checkpoint_policies
POLICIES = {
    "none": None,
    "dots": policies.dots_saveable,
    "names": policies.save_only_these_names("hidden"),
    "other_names": policies.save_any_names_but_these("hidden"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_remat_keeps_its_policy(name):
    def block(x, w):
        return checkpoint_name(jnp.tanh(x @ checkpoint_name(w, "kernel")), "hidden"), None

    def fn(p, x):
        return lax.scan(jax.checkpoint(block, policy=POLICIES[name]), x, p["w"])[0]

    variables = params(jnp.float32, **STACK)
    adapters = equal_to_merged(fn, variables, (X,))
    jaxpr = jax.make_jaxpr(lambda a: lj.lora(fn)(lj.attach(variables, a), X))(adapters)
    [scan] = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    body, _ = jax_compat.open_jaxpr(scan.params["jaxpr"])
    assert [eqn.params["policy"] for eqn in body.eqns if "policy" in eqn.params] == [POLICIES[name]]


RELATIVE = jnp.arange(4)[:, None] - jnp.arange(4)[None]
beyond = lambda table, ids: table.at[ids].get(mode="fill")

LOOKUPS = {
    "take": lambda p, ids: jnp.take(p["t"], ids, axis=0),
    "index_then_use": lambda p, ids: jnp.tanh(p["t"][ids]) * 2.0,
    "one_hot": lambda p, ids: jax.nn.one_hot(ids, 9) @ p["t"],
    "columns_of_rows": lambda p, ids: p["t"][ids, 1:3],
    "sliced_vocabulary": lambda p, ids: p["t"][2:7][ids % 5],
    "position_table": lambda p, ids: lax.dynamic_slice_in_dim(p["t"], ids[0, 2], 3) + 1.0,
    "in_a_loop": lambda p, ids: lax.map(lambda i: p["t"][i], ids.reshape(-1)),
    "in_a_branch": lambda p, ids: lax.cond(ids[0, 0] == 0, lambda: p["t"][ids], lambda: jnp.zeros((2, 3, 4))),
    "bag_of_rows": lambda p, ids: jnp.tanh(p["t"][ids].mean(1)),
    "sum_of_a_window": lambda p, ids: lax.dynamic_slice_in_dim(p["t"], ids[0, 2], 3).sum(0) * 2.0,
    "table_of_sums": lambda p, ids: p["t"].sum(1)[ids],
    "relative_bias": lambda p, ids: jnp.transpose(p["t"][RELATIVE + 4], (2, 0, 1)),
    "sampled_softmax": lambda p, ids: X[:, :4] @ p["t"][ids[0]].T,
    "tied": lambda p, ids: jnp.tanh(p["t"][ids]) @ p["t"].T,
    "fill_with_one": lambda p, ids: jnp.take(p["t"], ids + 5, axis=0, mode="fill", fill_value=1.0),
    "clip": lambda p, ids: jnp.take(p["t"], ids + 5, axis=0, mode="clip"),
    "masked_out_of_range": lambda p, ids: jnp.where(ids[..., None] > 2, 0.0, beyond(p["t"], jnp.where(ids > 2, 99, ids))),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups(name):
    equal_to_merged(LOOKUPS[name], params(jnp.float32, **TABLE), (IDS,))


stacked = lambda x: jnp.stack([x, x * 0.5, -x])
FORMS = {
    "row_vector": ({"w": (8, 6)}, lambda p, x: p["w"].T @ x[0]),
    "einsum_weight_first": ({"w": (8, 6)}, lambda p, x: jnp.einsum("io,...i->o...", p["w"], stacked(x))),
    "bilinear": ({"w": (8, 6)}, lambda p, x: jnp.einsum("bi,io,bo->b", x, p["w"], x[:, :6])),
    "twice": ({"w": (8, 6)}, lambda p, x: x @ p["w"] @ p["w"].T),
    "merged_inputs": ({"w": (4, 2, 6)}, lambda p, x: x @ p["w"].reshape(8, 6)),
    "contracted_inputs": ({"w": (4, 2, 6)}, lambda p, x: contract_pair(x, p["w"])),
    "merged_outputs": ({"w": (8, 3, 6)}, lambda p, x: x @ p["w"].reshape(8, 18)),
    "merged_in_another_order": ({"w": (2, 4, 6)}, lambda p, x: x @ p["w"].transpose(1, 0, 2).reshape(8, 6)),
    "reshaped_in_column_order": ({"w": (8, 12)}, lambda p, x: contract_pair(x, p["w"].reshape(4, 2, 12, order="F"))),
    "reshaped_and_permuted": ({"w": (6, 8)}, lambda p, x: x @ lax.reshape(p["w"], (8, 6), dimensions=(1, 0))),
    "two_indices_at_once": ({"w": (3, 4, 2, 6)}, lambda p, x: x @ p["w"][IDS[0] % 2, :, IDS[1] % 2][1:].reshape(8, 6)),
    "one_input": ({"w": (1, 6)}, lambda p, x: x[:, :1] @ p["w"]),
    "one_output": ({"w": (8, 1)}, lambda p, x: x @ p["w"]),
    "stack_of_one": ({"w": (1, 8, 4)}, lambda p, x: x @ p["w"][0]),
    "head_of_one": ({"w": (8, 1, 4)}, lambda p, x: x @ p["w"].squeeze(1)),
    "broadcast": ({"w": (1, 8, 4)}, lambda p, x: stacked(x) @ jnp.broadcast_to(p["w"], (3, 8, 4))),
    "vmap_over_kernels": ({"w": (3, 8, 6)}, lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], stacked(x))),
    "vmap_over_tables": ({"w": (9, 3, 4)}, lambda p, x: jax.vmap(lambda w, i: w[i], in_axes=(1, 0))(p["w"], IDS.T)),
    "vmap_over_layer_indices": ({"w": (4, 8, 6)}, lambda p, x: jax.vmap(lambda x, i: x @ p["w"][i])(x, jnp.arange(5) % 4)),
    "vmap_over_convolutions": ({"w": (3, 2, 8, 6)}, lambda p, x: jax.vmap(lambda w, x: conv(x[None], w))(p["w"], stacked(x))),
    "lone_axis_of_an_einsum": ({"w": (3, 8, 6)}, lambda p, x: jnp.einsum("ti,kio->to", x, p["w"])),
    "mean_of_matrices": ({"w": (8, 3, 6)}, lambda p, x: x @ p["w"].mean(1)),
    "sum_of_groups_of_inputs": ({"w": (8, 6)}, lambda p, x: x[:, :4] @ p["w"].reshape(2, 4, 6).sum(0)),
    "sum_of_outputs_beside_them": ({"w": (8, 6)}, lambda p, x: x @ p["w"] + x @ p["w"].sum(1, keepdims=True)),
    "sum_of_copies": ({"w": (8, 6)}, lambda p, x: x @ jnp.broadcast_to(p["w"][None], (3, 8, 6)).sum(0)),
    "sum_of_a_stack_of_two": ({"w": (8, 8)}, lambda p, x: x @ jnp.stack([p["w"], p["w"].T * 2.0]).sum(0)),
    "sum_of_a_scanned_matrix": ({"w": (3, 8, 2, 8)}, lambda p, x: lax.scan(lambda x, w: layer(x, w.sum(1)), x, p["w"])[0]),
    "ragged_transposed": ({"w": (6, 8, 3)}, lambda p, x: lax.ragged_dot(x, p["w"].transpose(2, 1, 0), jnp.array([3, 0, 2]))),
}  # fmt: skip


def contract_pair(x, w):
    return jnp.einsum("tab,abo->to", x.reshape(5, 4, 2), w)


def conv(x, w, numbers=("NWC", "WIO", "NWC"), **options):
    return lax.conv_general_dilated(x, w, **({"window_strides": (1,), "padding": "SAME"} | options), dimension_numbers=numbers)


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_product(name):
    shapes, fn = FORMS[name]
    rank = 1 if name.startswith("one_") else 2
    config = lj.LoraConfig(rank=rank, alpha=2, targets=["w"])
    equal_to_merged(fn, params(jnp.float32, **shapes), (X,), config)


CONVOLUTIONS = {
    "lhs_dilation": ((3, 4, 6), {"lhs_dilation": (2,), "padding": ((1, 2),)}),
    "rhs_dilation": ((3, 4, 6), {"rhs_dilation": (2,), "window_strides": (2,)}),
    "groups": ((3, 2, 6), {"feature_group_count": 2}),
    "depthwise": ((3, 1, 8), {"feature_group_count": 4}),
    "window_of_one": ((1, 4, 6), {}),
    "channels_first": ((6, 2, 3), {"numbers": ("NCW", "OIW", "NWC"), "feature_group_count": 2}),
    "channels_in_the_middle": ((4, 6, 3), {"numbers": ("WCN", "IOW", "CWN")}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    shape, options = CONVOLUTIONS[name]
    spec = options.get("numbers", ("NWC",))[0]
    x = normal(9, *({"N": 2, "W": 9, "C": 4}[c] for c in spec))
    equal_to_merged(lambda p, x: conv(x, p["w"], **options), {"w": normal(1, *shape)}, (x,), lj.LoraConfig(rank=2))


def test_one_array_under_two_paths():
    """Two adapters, though the frozen kernels are one array."""
    w = normal(1, 8, 8)
    adapters = equal_to_merged(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"].T, {"a": w, "b": w}, (X,))
    assert distance(adapters["a"].a, adapters["b"].a) > 0.1


def test_zero_uses_in_a_branch_that_is_not_taken():
    """A weight that only one branch uses gets its gradient through that branch alone."""
    variables = params(jnp.float32, **SQUARE)
    fn = lambda p, x: lax.cond(x[0, 0] > 100.0, lambda: x @ p["w"], lambda: x)
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), fn, variables, X)
    grads = jax.grad(lambda a: lj.lora(fn)(lj.attach(variables, a), X).sum())(adapters)
    assert all(bool((leaf == 0).all()) for leaf in jax.tree.leaves(grads))

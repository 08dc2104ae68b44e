"""Mixtures of experts: against the dense formula, by what they cost, on a mesh, and how they are balanced."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.core.errors import InputError
from lora_jax.models import llama
from lora_jax.models.experts import Experts, balance_loss
from lora_jax.planning.flops import dot_flops
from lora_jax.sharding import batch_sharding, make_mesh
from tests.support.identity import distance, random_adapters
from tests.support.marks import checkerboard, slow_unless

DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
CASES = ("mixtral", "qwen3_moe", "gpt_oss")
IDS = jnp.arange(4 * 6, dtype=jnp.int32).reshape(4, 6) % 61


def adapted(loaded):
    config = lj.LoraConfig(rank=2, alpha=3)
    init = lambda variables: lj.init(jax.random.key(0), config, loaded.apply, variables, IDS)
    return random_adapters(jax.eval_shape(init, loaded.variables), jnp.float32)


def loss(loaded):
    return lambda params: lj.lora(loaded.losses)(params, IDS, jnp.roll(IDS, -1, axis=1)).mean()


def gradients(loaded, adapters):
    return jax.jit(jax.value_and_grad(lambda a: loss(loaded)(lj.attach(loaded.variables, a))))(adapters)


@pytest.mark.parametrize("case", slow_unless(lambda case: case == "qwen3_moe", CASES))
def test_gradients_are_those_of_the_dense_formula(case):
    """Every expert on every token, weighted: no sorting; with adapters, and with kernels merged."""
    ragged, dense = (llama.load(DATA / case / "base", dense_experts=choice) for choice in (False, True))
    adapters = adapted(ragged)
    kernels = {path for path in adapters if "/mlp/" in path}
    assert len(kernels) == 3 * ragged.config.num_hidden_layers  # experts' kernels and routers
    merged = lambda a: dense.losses(lj.merge(dense.variables, a), IDS, jnp.roll(IDS, -1, axis=1)).mean()
    value, grads = gradients(ragged, adapters)
    assert distance((value, grads), gradients(dense, adapters)) < 1e-5
    assert distance((value, grads), jax.jit(jax.value_and_grad(merged))(adapters)) < 1e-4


@pytest.mark.parametrize(("case", "axes"), checkerboard(CASES[1:], [{"fsdp": 4}, {"data": 2, "model": 2}]), ids=str)
def test_a_mesh_changes_nothing(case, axes):
    loaded = llama.load(DATA / case / "base")
    adapters = adapted(loaded)
    want = gradients(loaded, adapters)
    mesh = make_mesh(axes, jax.devices()[:4])
    place = jax.tree.map(jax.device_put, loaded.variables, llama.shardings(mesh, loaded.variables))
    there = dataclasses.replace(loaded.on_mesh(mesh), variables=place)
    assert there.model.activations == batch_sharding(mesh)
    assert distance(gradients(there, adapters), want) < 5e-5  # sums in another order


@pytest.mark.parametrize("joined", [False, True], ids=["one by one", "joined"])
@pytest.mark.parametrize("case", CASES)
def test_files_have_experts_one_by_one_or_joined(case, joined, tmp_path):
    loaded = llama.load(DATA / case / "base", scan_layers=True)
    leaves, names = paths.flatten(loaded.variables)[0], loaded.names if joined else llama.file_names(loaded)
    tensors = {
        tensor: np.ascontiguousarray(names[path].export(np.asarray(leaf), index))
        for path, leaf in leaves.items()
        for index, tensor in names[path].tensors(leaf.shape).items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((DATA / case / "base" / "config.json").read_bytes())
    assert distance(llama.load(tmp_path, scan_layers=True).variables, loaded.variables) == 0


def step_flops(experts, chosen):
    sizes = dict(vocab_size=8, hidden_size=64, intermediate_size=16, num_hidden_layers=2, max_position_embeddings=16)
    own = Experts(count=experts, chosen=chosen, width=64, layers=(0, 1))
    config = llama.LlamaConfig(
        model_type="mixtral", num_attention_heads=2, num_key_value_heads=1, head_dim=8, experts=own, **sizes
    )
    loaded = llama.abstract(config)
    shapes = jax.eval_shape(lambda v: lj.init(jax.random.key(0), lj.LoraConfig(rank=1), loaded.apply, v, IDS), loaded.variables)
    grad = jax.grad(lambda a, v: lj.lora(loaded.losses)(lj.attach(v, a), IDS, IDS).sum())
    return dot_flops(jax.make_jaxpr(grad)(shapes, loaded.variables))


def test_only_chosen_experts_cost():
    active, whole = step_flops(4, 4), step_flops(32, 4)
    assert whole < 1.15 * active


def test_balance():
    logits = jnp.zeros((2, 3, 5, 4)).at[..., 1].set(50.0)
    assert abs(balance_loss(logits, 1) - 4) < 1e-5  # one expert does all
    real = jnp.arange(5)[None] < jnp.array([[5], [2], [0]])
    mixed = jnp.where(real[None, :, :, None], 0.0, logits)
    assert abs(balance_loss(mixed, 4, real) - 4) < 1e-5 and balance_loss(mixed, 4) > 3.99


def test_balanced_losses():
    """The formula of transformers' `load_balancing_loss_func`, written out."""
    loaded = llama.load(DATA / "mixtral" / "base")
    losses, uneven = jax.jit(loaded.balanced_losses)(loaded.variables, IDS, IDS)
    assert distance(losses, loaded.losses(loaded.variables, IDS, IDS)) < 1e-6
    _, routing = loaded.model.apply(loaded.variables, IDS, routing=True)
    probabilities = np.asarray(jax.nn.softmax(routing, axis=-1)).reshape(-1, 4)
    used = np.zeros(4)
    for row in probabilities:
        used[np.argsort(row)[-2:]] += 1 / len(probabilities)
    np.testing.assert_allclose(uneven, 4 * (used * probabilities.mean(0)).sum(), rtol=1e-5)
    grads = jax.grad(lambda v: loaded.balanced_losses(v, IDS, IDS)[1])(loaded.variables)
    assert float(jnp.abs(grads["params"]["layer_0"]["mlp"]["router"]["kernel"]).max()) > 1e-5
    with pytest.raises(InputError, match="without experts has no balance loss"):
        plain = llama.load(DATA / "qwen3" / "base")
        plain.balanced_losses(plain.variables, IDS, IDS)

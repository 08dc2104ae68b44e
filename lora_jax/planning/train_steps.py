"""Train steps on shapes alone, to compile and to count: with adapters, of all parameters, and with `W + s A B` formed."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.init import init
from lora_jax.adapters.merging import merge
from lora_jax.adapters.quant import quantize
from lora_jax.adapters.summary import Summary, summary
from lora_jax.core.adapter import detach
from lora_jax.core.transform import lora
from lora_jax.core.weighted import Weighted
from lora_jax.models import llama
from lora_jax.sharding import batch_sharding, place_shapes, state_shardings
from lora_jax.training.train import init_state, make_train_step

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_BLOCK = 256  # queries
OPTIMIZER = optax.adamw(1e-4)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and its adapters on a mesh, as shapes.

    Args:
      mesh: of devices, or an abstract one.
      model: without weights.
      variables: its parameters, some of them quantised.
      adapters: `{path: adapter}`.
      batch: `input_ids` and `labels`, `(batch, length)`.
      summary: what the adapters add.
    """

    mesh: Any
    model: llama.Loaded
    variables: Any
    adapters: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    summary: Summary


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted train step and the shapes of its arguments.

    Args:
      jitted: the step, which donates its state.
      args: the shapes of its arguments.
      trainable: how many numbers it trains.
      optimizer_bytes: bytes of Adam's moments on a chip.
    """

    jitted: Any
    args: tuple[Any, ...]
    trainable: int
    optimizer_bytes: int


def prepare(
    mesh: Any,
    config: llama.LlamaConfig,
    lora_config: LoraConfig,
    batch: int,
    length: int,
    quantized: str | None,
    block: int | None,
) -> Setup:
    """The shapes of a bfloat16 base, scanned and computed again in the backward pass, and of adapters for it.

    Args:
      mesh: where they are; a `jax.sharding.AbstractMesh` to trace only.
      config: the model's sizes.
      lora_config: the adapters.
      batch: rows on all chips.
      length: tokens a row.
      quantized: of what kind the layers' kernels are, if they are quantised.
      block: how many of their values share a scale.

    Raises:
      InputError: a mesh axis does not divide an axis of a parameter that it cuts.
    """
    options: Any = {"scan_layers": True, "remat": "full", "attention_block": ATTENTION_BLOCK}
    model = llama.abstract(config, dtype=jnp.bfloat16, **options).on_mesh(mesh)
    variables = model.variables
    if quantized is not None:
        kernels = [f"{name}/kernel" for name in PROJECTIONS]  # and not the biases of Qwen2
        variables = jax.eval_shape(lambda v: quantize(v, kernels, quantized, block=block), variables)
    model = dataclasses.replace(model, variables=place_shapes(model.variables, llama.shardings(mesh, model.variables)))
    variables = place_shapes(variables, llama.shardings(mesh, variables))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=batch_sharding(mesh))
    adapters = init(jax.random.key(0), lora_config, model.apply, variables, ids)
    return Setup(mesh, model, variables, adapters, {"input_ids": ids, "labels": ids}, summary(variables, adapters))


def low_rank(setup: Setup) -> Step:
    """The step that trains the adapters, by `lora`."""
    model = dataclasses.replace(setup.model, variables=setup.variables).on_mesh(setup.mesh)
    return _adapters_step(setup, lambda params, batch, key: _loss(lora(model.losses), params, batch))


def naive(setup: Setup) -> Step:
    """The step that trains the adapters through kernels `W + s A B`."""

    def loss(params: Any, batch: Any, key: jax.Array) -> Weighted:
        variables, adapters = detach(params)
        return _loss(setup.model.losses, merge(variables, adapters, quantized="dense"), batch)

    return _adapters_step(setup, loss)


def full(setup: Setup) -> Step:
    """The step that trains all parameters of the dense model."""

    def loss(variables: Any, batch: Any) -> jax.Array:
        return _loss(setup.model.losses, variables, batch).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, opt_state: Any, batch: Any) -> Any:
        loss_value, grads = jax.value_and_grad(loss)(variables, batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state, loss_value

    variables = setup.model.variables
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    state = jax.eval_shape(OPTIMIZER.init, variables)
    state = place_shapes(state, state_shardings(state, variables))
    return Step(step, (variables, state, setup.batch), count, _moment_bytes(state))


STEPS = {"lora": low_rank, "full": full, "naive": naive}


def chip_bytes(tree: Any) -> int:
    """The bytes on one chip of all arrays of a tree of shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # on every chip
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return -(-math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8)


def _moment_bytes(opt_state: Any) -> int:
    """All of the optimiser's state but the counts of its steps."""
    return chip_bytes([leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape])


def _adapters_step(setup: Setup, loss: Any) -> Step:
    state = init_state(setup.adapters, OPTIMIZER, key=jax.random.key(0))
    args = state, setup.variables, setup.batch
    return Step(make_train_step(loss, OPTIMIZER, like=state), args, setup.summary.trainable, _moment_bytes(state.opt_state))


def _loss(losses: Any, variables: Any, batch: Any) -> Weighted:
    """That of all tokens, of which each is learnt."""
    found = losses(variables, batch["input_ids"], batch["labels"])
    return Weighted(found.sum(), found.size)

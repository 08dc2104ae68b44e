"""Train steps on shapes alone, to compile and to count: with adapters, of all parameters, and with `W + s A B` formed."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapter import detach
from lora_jax.algebra import merge
from lora_jax.config import LoraConfig
from lora_jax.init import init
from lora_jax.models import llama
from lora_jax.quant import quantize
from lora_jax.report import Summary, summary
from lora_jax.train import init_state, make_train_step
from lora_jax.transform import lora

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION_BLOCK = 256  # queries
OPTIMIZER = optax.adamw(1e-4)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model and its adapters, as shapes.

    Args:
      model: without weights.
      variables: its parameters, some of them quantised.
      adapters: `{path: adapter}`.
      batch: `input_ids` and `labels`, `(batch, length)`.
      summary: what the adapters add.
    """

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
      optimizer_bytes: bytes of Adam's moments.
    """

    jitted: Any
    args: tuple[Any, ...]
    trainable: int
    optimizer_bytes: int


def prepare(
    config: llama.LlamaConfig, lora_config: LoraConfig, batch: int, length: int, quantized: str | None, block: int | None
) -> Setup:
    """The shapes of a bfloat16 base, scanned and computed again in the backward pass, and of adapters for it.

    Args:
      config: the model's sizes.
      lora_config: the adapters.
      batch: rows.
      length: tokens a row.
      quantized: of what kind the layers' kernels are, if they are quantised.
      block: how many of their values share a scale.
    """
    options: Any = {"scan_layers": True, "remat": "full", "attention_block": ATTENTION_BLOCK}
    model = llama.abstract(config, dtype=jnp.bfloat16, **options)
    variables = model.variables
    if quantized is not None:
        variables = jax.eval_shape(lambda v: quantize(v, PROJECTIONS, quantized, block=block), variables)
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    adapters = init(jax.random.key(0), lora_config, model.apply, variables, ids)
    return Setup(model, variables, adapters, {"input_ids": ids, "labels": ids}, summary(variables, adapters))


def low_rank(setup: Setup) -> Step:
    """The step that trains the adapters, by `lora`."""
    return _adapters_step(setup, lambda params, batch, key: _mean(lora(setup.model.losses), params, batch))


def naive(setup: Setup) -> Step:
    """The step that trains the adapters through kernels `W + s A B`."""

    def loss(params: Any, batch: Any, key: Any) -> jax.Array:
        variables, adapters = detach(params)
        return _mean(setup.model.losses, merge(variables, adapters, quantized="dense"), batch)

    return _adapters_step(setup, loss)


def full(setup: Setup) -> Step:
    """The step that trains all parameters of the dense model."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, opt_state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(functools.partial(_mean, setup.model.losses))(variables, batch)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state, loss

    variables = setup.model.variables
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    state = jax.eval_shape(OPTIMIZER.init, variables)
    return Step(step, (variables, state, setup.batch), count, 2 * tree_bytes(variables))


STEPS = {"lora": low_rank, "full": full, "naive": naive}


def tree_bytes(tree: Any) -> int:
    """The bytes of all arrays of a tree of shapes."""
    sizes = (math.prod(leaf.shape) * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in _plain(tree))
    return sum(-(-size // 8) for size in sizes)


def _plain(tree: Any) -> Sequence[Any]:
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return [jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def _adapters_step(setup: Setup, loss: Any) -> Step:
    state = jax.eval_shape(lambda adapters, key: init_state(adapters, OPTIMIZER, key=key), setup.adapters, jax.random.key(0))
    args = state, setup.variables, setup.batch
    return Step(make_train_step(loss, OPTIMIZER), args, setup.summary.trainable, setup.summary.optimizer_bytes)


def _mean(losses: Any, variables: Any, batch: Any) -> jax.Array:
    return jnp.mean(losses(variables, batch["input_ids"], batch["labels"]))

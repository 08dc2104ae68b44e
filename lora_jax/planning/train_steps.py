"""Train steps on shapes alone, to compile and to count: with adapters, of all parameters, and with `W + s A B` formed."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding

from lora_jax.adapters.merging import merge
from lora_jax.adapters.summary import Summary, summary
from lora_jax.core.adapter import detach
from lora_jax.core.weighted import Weighted
from lora_jax.models import llama
from lora_jax.planning.decoder_step import DecoderStep, mean_loss
from lora_jax.sharding import place_shapes, state_shardings
from lora_jax.training import recipe
from lora_jax.training.train import LossFn, init_state, make_train_step

OPTIMIZER = recipe.optimizer(1e-3, [60])  # that of a run with the usual options of the task lm


@dataclasses.dataclass(frozen=True)
class Setup:
    """A step's model and adapters, as shapes.

    Args:
      step: what it is.
      model: without weights.
      adapters: `{path: adapter}`.
      batch: `input_ids` and what else a packed batch has, `(rows, length)`.
      summary: what the adapters add.
      tx: the optimiser of the adapters.
      device: where a step without a mesh is compiled for; `None`: it is traced only.
    """

    step: DecoderStep
    model: llama.Loaded
    adapters: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    summary: Summary
    tx: optax.GradientTransformation
    device: Any

    @property
    def cut(self) -> dict[str, int]:
        """The size of each axis of the mesh; without a mesh, none."""
        return {} if self.step.mesh is None else dict(self.step.mesh.shape)

    def placed(self, tree: Any) -> Any:
        """Shapes on the device of a step without a mesh."""
        if self.step.mesh is not None or self.device is None:
            return tree
        return jax.tree.map(lambda leaf: leaf.update(sharding=SingleDeviceSharding(self.device)), tree)


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
    step: DecoderStep, config: llama.LlamaConfig, tx: optax.GradientTransformation = OPTIMIZER, device: Any = None
) -> Setup:
    """The shapes of a step on a model of these sizes.

    Args:
      step: what it is; its mesh may be a `jax.sharding.AbstractMesh`, to trace only.
      config: the model's sizes.
      tx: the optimiser of the adapters.
      device: where a step without a mesh is compiled for.

    Raises:
      InputError: a mesh axis does not divide an axis of a parameter that it cuts.
    """
    model = step.model.shapes(config, step.mesh)
    adapters = step.adapters(model, seed=0)
    return Setup(step, model, adapters, step.batch(), summary(model.variables, adapters), tx, device)


def low_rank(setup: Setup) -> Step:
    """The step that trains the adapters, by `lora`."""
    return _adapters_step(setup, setup.step.loss(setup.model))


def naive(setup: Setup) -> Step:
    """The step that trains the adapters through kernels `W + s A B`."""
    model = _dense(setup)

    def loss(params: Any, batch: Any, key: jax.Array) -> Weighted:
        variables, adapters = detach(params)
        return mean_loss(model.losses, merge(variables, adapters, quantized="dense"), batch)

    return _adapters_step(setup, loss)


def full(setup: Setup) -> Step:
    """The step that trains all parameters of the dense model."""
    model = _dense(setup)

    def loss(variables: Any, batch: Any) -> jax.Array:
        return mean_loss(model.losses, variables, batch).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, opt_state: Any, batch: Any) -> Any:
        loss_value, grads = jax.value_and_grad(loss)(variables, batch)
        updates, opt_state = setup.tx.update(grads, opt_state, variables)
        return optax.apply_updates(variables, updates), opt_state, loss_value

    variables = model.variables
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables))
    state = jax.eval_shape(setup.tx.init, variables)
    if setup.step.mesh is not None:
        state = place_shapes(state, state_shardings(state, variables))
    return Step(step, setup.placed((variables, state, setup.batch)), count, _moment_bytes(state))


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


def _dense(setup: Setup) -> llama.Loaded:
    return setup.step.model.dense().shapes(setup.model.config, setup.step.mesh)


def _adapters_step(setup: Setup, loss: LossFn) -> Step:
    state = init_state(setup.adapters, setup.tx, key=jax.random.key(0))
    how: Any = {"accumulate": setup.step.accumulate, "max_grad_norm": setup.step.max_grad_norm}
    step: Any = make_train_step(loss, setup.tx, like=setup.placed(state), **how)
    args = setup.placed((state, setup.model.variables, setup.batch))
    return Step(step, args, setup.summary.trainable, _moment_bytes(state.opt_state))

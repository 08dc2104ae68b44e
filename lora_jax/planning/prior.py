"""How long and how large a train step is, about, without a trace of it: by which order the compiler is asked."""

import dataclasses

import jax.numpy as jnp

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.planning import memory_estimate, train_steps
from lora_jax.planning.decoder_step import DecoderStep
from lora_jax.planning.topology import Speed
from lora_jax.sharding import batch_parts

_USED = 0.5  # of the peak, in products


@dataclasses.dataclass(frozen=True)
class Guess:
    """About what a step takes on each chip.

    Args:
      bytes: of memory.
      seconds: of time.
    """

    bytes: int
    seconds: float


def guess(setup: train_steps.Setup, speed: Speed) -> Guess:
    """About what the step that trains the adapters takes.

    Args:
      setup: its model on its mesh; the adapters may be those of another mesh.
      speed: of a chip.
    """
    cuts = setup.cut.get("fsdp", 1), setup.cut.get("model", 1)
    # Of a pair, one lies along fsdp and the other along model; Adam has two moments of each.
    adapters = int(3 * 4 * setup.summary.trainable * (1 / cuts[0] + 1 / cuts[1]) / 2)
    base = train_steps.chip_bytes(setup.model.variables)
    return Guess(base + adapters + memory_estimate.temporary_bytes("lora", setup), _seconds(setup, speed))


def _seconds(setup: train_steps.Setup, speed: Speed) -> float:
    """Products at half of the peak, kernels as fast as memory gives them, and what the chips send each other, in turn."""
    step, config = setup.step, setup.model.config
    size, tokens = jnp.dtype(step.model.dtype).itemsize, step.rows * step.length
    chips = batch_parts(step.mesh) * setup.cut.get("model", 1)
    kernels, head = memory_estimate.layers_parameters(setup), config.vocab_size * config.hidden_size
    passes = 3 if step.model.remat == "full" else 2  # forward, backward, and forward once more
    products = 2 * tokens * (passes * memory_estimate.active_parameters(setup) + 3 * head) + _attention_flops(step, config)
    # A quantised kernel is made dense, which writes and reads it.
    read = passes * step.accumulate * size * kernels * (1 if step.model.quantize is None else 3) / setup.cut.get("model", 1)
    computed = products * size / 2 / chips / speed.flops / _USED
    return computed + read / speed.memory + _sent(setup, passes, size, kernels) / speed.network


def _attention_flops(step: DecoderStep, config: DecoderConfig) -> float:
    """Of scores and values: forward and twice backward, and once more where they are computed again."""
    again = (step.queries < step.length) + (step.model.remat != "none")
    causal = 1 if step.queries == step.length else (1 + step.queries / step.length) / 2
    pairs = step.rows * step.length**2 * config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * 4 * pairs * causal * (3 + again)


def _sent(setup: train_steps.Setup, passes: int, size: int, kernels: int) -> float:
    """Bytes that a chip gets: the kernels that fsdp cuts in each pass, and sums over model after each half of a layer."""
    step, config = setup.step, setup.model.config
    fsdp, model = (setup.cut.get(name, 1) for name in ("fsdp", "model"))
    gathered = passes * step.accumulate * size * kernels / model if fsdp > 1 else 0.0
    rows = size * step.rows * step.length * config.hidden_size / batch_parts(step.mesh)
    summed = 2 * 2 * (passes - 1) * config.num_hidden_layers * rows if model > 1 else 0.0
    gradients = 4 * setup.summary.trainable if batch_parts(step.mesh) > 1 else 0.0
    return gathered + summed + gradients

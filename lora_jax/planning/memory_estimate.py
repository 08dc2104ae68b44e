"""The memory that a train step takes beside its arguments, about, where no compiler says it."""

import jax.numpy as jnp

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.planning import train_steps
from lora_jax.planning.decoder_step import DecoderStep
from lora_jax.sharding import batch_parts
from lora_jax.training.losses import LOGITS_AT_ONCE


def temporary_bytes(name: str, setup: train_steps.Setup) -> int:
    """About the bytes on a chip beside the arguments: what layers keep, gradients, and the dearest place of the backward pass.

    A layer's backward pass holds some five arrays of the size of the MLP's, two blocks of attention scores in float32, and the
    layer's dense kernels where they are quantised or gathered; the loss holds some three chunks of logits in float32, and the
    head where that is gathered.

    Args:
      name: of the step, one of `train_steps.STEPS`.
      setup: the model on its mesh.
    """
    step, config, cut = setup.step, setup.model.config, setup.cut.get("model", 1)
    gathered, size = setup.cut.get("fsdp", 1) > 1, jnp.dtype(step.model.dtype).itemsize
    rows = step.rows // step.accumulate // batch_parts(step.mesh)
    tokens, width, vocabulary = rows * step.length, config.hidden_size, config.vocab_size // cut
    kept = config.num_hidden_layers * _kept(step, config, rows, size, cut)
    layer = size * tokens * (5 * config.active_width // cut + 4 * width) + 2 * 4 * _scores(step, config, rows) // cut
    if gathered or (step.model.quantize is not None and name != "full"):
        layer += size * layers_parameters(setup) // cut // config.num_hidden_layers
    logits = 3 * 4 * min(LOGITS_AT_ONCE // cut, tokens * vocabulary) + gathered * size * width * vocabulary
    return kept + _gradients(name, setup, size) + max(layer, logits)


def layers_parameters(setup: train_steps.Setup) -> int:
    """How many numbers the base has beside its embedding and head."""
    config = setup.model.config
    return setup.summary.parameters - (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size


def active_parameters(setup: train_steps.Setup) -> int:
    """How many of them take part in what is computed for a token: all but those of the experts that it does not choose."""
    config = setup.model.config
    if config.experts is None:
        return layers_parameters(setup)
    idle = config.experts.count - config.experts.chosen
    return layers_parameters(setup) - sum(config.has_experts) * idle * 3 * config.experts.width * config.hidden_size


def _kept(step: DecoderStep, config: DecoderConfig, rows: int, size: int, cut: int) -> int:
    """The bytes that one layer keeps for its backward pass."""
    tokens, width = rows * step.length, config.hidden_size
    if step.model.remat == "full":
        return size * tokens * width
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    products = 3 * width + (queries + 2 * keys + 2 * config.active_width) // cut
    if step.model.remat == "products":
        return size * tokens * products
    # Also what norms, rotations and the activation function give; and the attention weights, unless they are made in blocks.
    rest = 3 * width + (2 * queries + 2 * keys + 2 * config.active_width) // cut
    weights = 0 if step.queries < step.length else (4 + size) * _scores(step, config, rows) // cut
    return size * tokens * (products + rest) + weights


def _scores(step: DecoderStep, config: DecoderConfig, rows: int) -> int:
    """How many attention scores there are at once."""
    return rows * config.num_attention_heads * step.queries * step.length


def _gradients(name: str, setup: train_steps.Setup, size: int) -> int:
    if name == "full":
        return train_steps.chip_bytes(setup.step.model.dense().shapes(setup.model.config, setup.step.mesh).variables)
    adapters = train_steps.chip_bytes(setup.adapters) * (1 if setup.step.accumulate == 1 else 2)
    if name == "lora":
        return adapters
    # The naive step's gradients of whole kernels, beside the kernels themselves.
    kernels = sum(row.parameters for row in setup.summary.rows)
    return adapters + 2 * size * kernels // (setup.cut.get("fsdp", 1) * setup.cut.get("model", 1))

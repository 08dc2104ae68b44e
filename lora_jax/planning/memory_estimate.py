"""The memory that a train step takes beside its arguments, about, where no compiler says it."""

from typing import Any

from lora_jax.core import paths
from lora_jax.planning import train_steps
from lora_jax.training.losses import LOGITS_AT_ONCE


def temporary_bytes(name: str, setup: train_steps.Setup) -> int:
    """About the bytes on a chip beside the arguments: layer inputs, gradients, and the dearest place of the backward pass.

    Layers are kept as their inputs in bfloat16. Beside that, a layer's backward pass holds some five arrays of the size of the
    MLP's, two blocks of attention scores in float32, and the layer's dense kernels where they are quantised or gathered; the
    loss holds some three chunks of logits in float32, and the head where that is gathered.

    Args:
      name: of the step, one of `steps.STEPS`.
      setup: the model on its mesh.
    """
    config, cut, gathered = setup.model.config, setup.mesh.shape.get("model", 1), setup.mesh.shape.get("fsdp", 1) > 1
    ids: Any = setup.batch["input_ids"]
    rows, length = ids.sharding.shard_shape(ids.shape)
    tokens, width, vocabulary = rows * length, config.hidden_size, config.vocab_size // cut
    inputs = 2 * config.num_hidden_layers * tokens * width
    scores = 4 * rows * config.num_attention_heads * min(train_steps.ATTENTION_BLOCK, length) * length // cut
    layer = 2 * tokens * (5 * config.intermediate_size // cut + 4 * width) + 2 * scores
    quantized = any(map(paths.is_quantized, paths.flatten(setup.variables)[0].values()))
    if gathered or (quantized and name != "full"):
        tables = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
        layer += 2 * (setup.summary.parameters - tables) // cut // config.num_hidden_layers
    logits = 3 * 4 * min(LOGITS_AT_ONCE // cut, tokens * vocabulary) + gathered * 2 * width * vocabulary
    return inputs + _gradients(name, setup) + max(layer, logits)


def _gradients(name: str, setup: train_steps.Setup) -> int:
    if name == "full":
        return train_steps.chip_bytes(setup.model.variables)
    adapters = train_steps.chip_bytes(setup.adapters)
    if name == "lora":
        return adapters
    # The naive step's gradients of whole kernels, beside the kernels themselves.
    kernels = sum(row.parameters for row in setup.summary.rows)
    return adapters + 2 * 2 * kernels // (setup.mesh.shape.get("fsdp", 1) * setup.mesh.shape.get("model", 1))

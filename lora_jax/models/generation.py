"""Texts from a decoder, token by token, with a key-value cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import paths
from lora_jax.core.adapter import is_adapted
from lora_jax.core.errors import InputError
from lora_jax.core.methods.alora import active_from
from lora_jax.core.transform import lora
from lora_jax.models.decoder import Decoder, init_cache


class Generated(NamedTuple):
    """What `generate` returns.

    Args:
      tokens: `(batch, max_new_tokens)`: the new tokens of each row; after an end token, that token again.
      lengths: `(batch,)`: how many of them count, the end token included.
    """

    tokens: jax.Array
    lengths: jax.Array


def generate(
    model: Decoder,
    variables: Any,
    prompt_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Generated:
    """Continue prompts: the most likely token each time, or one drawn from `softmax(logits / temperature)`.

    The prompts are read in one pass, then each token in one step; both compile once for a shape.

    Args:
      model: the decoder, or what `load` returned.
      variables: its parameters, plain or with adapters attached. Adapters with an invocation sequence (aLoRA) act in the rows
        whose prompt has it, from its last occurrence on.
      prompt_ids: `(batch, length)`, padded on the left.
      attention_mask: `(batch, length)`: 0 for padding.
      max_new_tokens: how many tokens to add.
      eos_ids: the tokens that end a row.
      temperature: 0 for the most likely token.
      key: a PRNG key, for a temperature above 0.

    Raises:
      InputError: an option out of range, an id that the model has no embedding for, a prompt that is padded on the right, or a
        temperature without a key.
    """
    model = getattr(model, "model", model)
    prompt_ids = jnp.asarray(prompt_ids, jnp.int32)
    real = jnp.ones(prompt_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
    if prompt_ids.ndim != 2 or prompt_ids.shape[1] < 1:
        raise InputError(f"prompt_ids must have the shape (batch, length) with a token at least, not {prompt_ids.shape}")
    unknown = (prompt_ids < 0) | (prompt_ids >= model.config.vocab_size)
    if bool(unknown.any()):
        raise InputError(
            f"prompt_ids holds {int(prompt_ids[unknown][0])}, but the model's embedding has the rows 0 to "
            f"{model.config.vocab_size - 1}: use its own tokenizer, or load the embedding that goes with the added tokens"
        )
    if real.shape != prompt_ids.shape:
        raise InputError(f"attention_mask has the shape {real.shape}, but prompt_ids has {prompt_ids.shape}")
    if not bool(real[:, -1].all()):
        raise InputError("attention_mask marks the last token of a prompt as padding: pad prompts on the left")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 or a positive number, not {temperature}")
    if temperature and key is None:
        raise InputError("a temperature above 0 draws tokens at random: give a key")
    key = jax.random.key(0) if key is None else key
    options = {"count": max_new_tokens, "eos_ids": tuple(map(int, eos_ids)), "sampled": temperature > 0}
    return _generate(model, variables, prompt_ids, real, key, jnp.float32(temperature or 1.0), **options)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("count", "eos_ids", "sampled"))
def _generate(model, variables, prompt_ids, real, key, temperature, *, count, eos_ids, sampled):
    batch, length = prompt_ids.shape
    read, apply = _applies(model, variables, prompt_ids)
    ends = jnp.asarray(eos_ids, jnp.int32)

    def choose(logits, step):
        logits = logits[:, -1].astype(jnp.float32)
        if not sampled:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)

    def proceed(state):
        step, _, _, done, _, _ = state
        return (step < count) & ~done.all()

    def advance(state):
        step, last, cache, done, tokens, lengths = state
        logits, cache = apply(variables, last[:, None], cache=cache, last_only=True)
        last = jnp.where(done, last, choose(logits, step))
        tokens = jnp.where(jnp.arange(count) >= step, last[:, None], tokens)
        return step + 1, last, cache, done | jnp.isin(last, ends), tokens, lengths + (~done).astype(jnp.int32)

    logits, cache = read(variables, prompt_ids, real, cache=init_cache(model, batch, length + count), last_only=True)
    first = choose(logits, 0)
    tokens = jnp.broadcast_to(first[:, None], (batch, count))
    state = jnp.int32(1), first, cache, jnp.isin(first, ends), tokens, jnp.ones(batch, jnp.int32)
    _, _, _, _, tokens, lengths = lax.while_loop(proceed, advance, state)
    return Generated(tokens, lengths)


def _applies(model: Decoder, variables: Any, prompt_ids: jax.Array) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model for the prompt, and for one token after it: adapters with an invocation sequence act from it on."""
    nodes = paths.flatten(variables, is_leaf=is_adapted)[0].values()
    adapters: list[Any] = [node.adapter for node in nodes if is_adapted(node)]
    if not adapters and not any(map(paths.is_quantized, nodes)):
        return model.apply, model.apply
    sequences = {tuple(adapter.invocation) for adapter in adapters if getattr(adapter, "invocation", None) is not None}
    if not sequences:
        return lora(model.apply), lora(model.apply)
    if len(sequences) > 1:
        raise InputError(f"the adapters have different invocation sequences, {sorted(sequences)}: generate with one of them")
    active = active_from(prompt_ids, *sequences)
    return lora(model.apply, active=active), lora(model.apply, active=active[:, -1:])

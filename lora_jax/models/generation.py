"""Texts from a decoder, token by token, with a key-value cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lora_jax.core import paths
from lora_jax.core.adapter import is_adapted
from lora_jax.core.errors import InputError
from lora_jax.core.methods.alora import active_from
from lora_jax.core.transform import lora
from lora_jax.models.decoder import Cache, Decoder, init_cache
from lora_jax.training import many

_SHORTEST = 16  # what `stream` pads a prompt to


class Generated(NamedTuple):
    """What `generate` returns.

    Args:
      tokens: `(batch, max_new_tokens)`: the new tokens of each row; after an end token, that token again.
      lengths: `(batch,)`: how many of them count, the end token included.

    >>> found = Generated(jnp.array([[5, 3, 3], [6, 7, 1]]), jnp.array([2, 3]))  # where 3 ends a text
    >>> [row[:length].tolist() for row, length in zip(found.tokens, found.lengths)]
    [[5, 3], [6, 7, 1]]
    """

    tokens: jax.Array
    lengths: jax.Array


class RowAdapters(NamedTuple):
    """Parameters with a set of adapters for each row, for `generate`.

    Args:
      variables: the base's, without adapters.
      stacked: the sets, from `many.stack`.
      index: `(batch,)`: which set each row has; below 0 for none.

    >>> import lora_jax as lj
    >>> sets = [{"params/norm/scale": lj.Full(value * jnp.ones(4))} for value in (1.0, 2.0)]
    >>> variables = {"params": {"norm": {"scale": jnp.ones(4)}}}
    >>> rows = RowAdapters(variables, lj.many.stack(sets), jnp.array([1, -1]))  # for generate(model, rows, ...) of two prompts
    >>> rows.stacked["params/norm/scale"].value.shape
    (2, 4)
    """

    variables: Any
    stacked: Any
    index: jax.Array


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
        whose prompt has it, from its last occurrence on. `RowAdapters` for a set for each row.
      prompt_ids: `(batch, length)`, padded on the left.
      attention_mask: `(batch, length)`: 0 for padding.
      max_new_tokens: how many tokens to add.
      eos_ids: the tokens that end a row.
      temperature: 0 for the most likely token.
      key: a PRNG key, for a temperature above 0.

    Raises:
      InputError: an option out of range, an id that the model has no embedding for, a prompt that is padded on the right, a
        temperature without a key, or an `index` of `RowAdapters` that is beyond the last set or not of one set for each prompt.

    >>> from lora_jax.models import llama
    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = llama.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> tiny = llama.init(config, jax.random.key(0))
    >>> ids, mask = jnp.array([[0, 1, 2], [3, 4, 5]]), jnp.array([[0, 1, 1], [1, 1, 1]])  # the first is shorter
    >>> found = generate(tiny, tiny.variables, ids, mask, max_new_tokens=4)
    >>> found.tokens.shape, found.lengths.tolist()
    ((2, 4), [4, 4])
    """
    model = getattr(model, "model", model)
    prompt_ids, real = _checked(model, variables, prompt_ids, attention_mask, max_new_tokens, temperature, key)
    key = jax.random.key(0) if key is None else key
    options = {"count": max_new_tokens, "eos_ids": tuple(map(int, eos_ids)), "sampled": temperature > 0}
    return _generate(model, variables, prompt_ids, real, key, jnp.float32(temperature or 1.0), **options)


def stream(
    model: Decoder,
    variables: Any,
    prompt_ids: ArrayLike,
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> Iterator[int]:
    """The tokens of `generate` for one prompt, one by one as they are found, an end token included.

    The prompt is padded to a power of two. For each of these, and each `max_new_tokens`, two programs are compiled: one reads
    the prompt, and one adds a token.

    Args:
      model: the decoder, or what `load` returned.
      variables: its parameters, plain or with adapters attached.
      prompt_ids: `(length,)`.
      max_new_tokens: at most this many tokens.
      eos_ids: the tokens that end the text.
      temperature: 0 for the most likely token.
      key: a PRNG key, for a temperature above 0.

    Raises:
      InputError: as `generate`.

    >>> from lora_jax.models import llama
    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = llama.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> tiny = llama.init(config, jax.random.key(0))
    >>> for token in stream(tiny, tiny.variables, jnp.array([1, 2, 3]), max_new_tokens=2):
    ...     print(0 <= token < 8)
    True
    True
    """
    model = getattr(model, "model", model)
    ids, real = _checked(model, variables, np.asarray(prompt_ids)[None], None, max_new_tokens, temperature, key)
    padding = max(_SHORTEST, 1 << (ids.size - 1).bit_length()) - ids.size
    ids, real = (jnp.pad(array, ((0, 0), (padding, 0))) for array in (ids, real))
    draw = jax.random.key(0) if key is None else key, jnp.float32(temperature or 1.0)
    return _stream(model, variables, ids, real, draw, max_new_tokens, tuple(eos_ids), temperature > 0)


def _stream(model, variables, ids, real, draw, count, eos_ids, sampled) -> Iterator[int]:
    token, cache = _begin(model, variables, ids, real, *draw, count=count, sampled=sampled)
    for step in range(1, count + 1):
        found = int(token[0])
        yield found
        if found in eos_ids or step == count:
            return
        token, cache = _add(model, variables, ids, token, cache, jnp.int32(step), *draw, sampled=sampled)


def _checked(
    model: Decoder, variables: Any, prompt_ids: Any, attention_mask: Any, max_new_tokens: int, temperature: float, key: Any
) -> tuple[jax.Array, jax.Array]:
    """Prompts and which of them are tokens, as arrays."""
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
    if isinstance(variables, RowAdapters):
        _check_sets(variables, len(prompt_ids))
    return prompt_ids, real


def _check_sets(variables: RowAdapters, rows: int) -> None:
    """Raise an InputError unless each row has a set of adapters, or none by a number below 0."""
    index = many.check_index(variables.index, many.set_count(variables.stacked))
    if len(index) != rows:
        raise InputError(f"index has {len(index)} sets, but there are {rows} prompts: give one for each")


@functools.partial(jax.jit, static_argnums=0, static_argnames=("count", "sampled"))
def _begin(model, variables, prompt_ids, real, key, temperature, *, count, sampled):
    """The first token after the prompts, and the cache."""
    read, _ = _applies(model, variables, prompt_ids)
    cache = init_cache(model, len(prompt_ids), prompt_ids.shape[1] + count)
    logits, cache = read(variables, prompt_ids, real, cache=cache, last_only=True)
    return _choose(logits, 0, key, temperature, sampled), cache


@functools.partial(jax.jit, static_argnums=0, static_argnames="sampled", donate_argnames="cache")
def _add(model, variables, prompt_ids, last, cache, step, key, temperature, *, sampled):
    """The token after the last one, and the cache with that."""
    _, apply = _applies(model, variables, prompt_ids)
    logits, cache = apply(variables, last[:, None], cache=cache, last_only=True)
    return _choose(logits, step, key, temperature, sampled), cache


def _choose(logits: jax.Array, step: Any, key: jax.Array, temperature: jax.Array, sampled: bool) -> jax.Array:
    logits = logits[:, -1].astype(jnp.float32)
    if not sampled:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("count", "eos_ids", "sampled"))
def _generate(model, variables, prompt_ids, real, key, temperature, *, count, eos_ids, sampled):
    ends, draw = jnp.asarray(eos_ids, jnp.int32), (key, temperature)

    def proceed(state):
        step, _, _, done, _, _ = state
        return (step < count) & ~done.all()

    def advance(state):
        step, last, cache, done, tokens, lengths = state
        found, cache = _add(model, variables, prompt_ids, last, cache, step, *draw, sampled=sampled)
        last = jnp.where(done, last, found)
        tokens = jnp.where(jnp.arange(count) >= step, last[:, None], tokens)
        return step + 1, last, cache, done | jnp.isin(last, ends), tokens, lengths + (~done).astype(jnp.int32)

    first, cache = _begin(model, variables, prompt_ids, real, *draw, count=count, sampled=sampled)
    tokens = jnp.broadcast_to(first[:, None], (len(prompt_ids), count))
    state = jnp.int32(1), first, cache, jnp.isin(first, ends), tokens, jnp.ones(len(prompt_ids), jnp.int32)
    _, _, _, _, tokens, lengths = lax.while_loop(proceed, advance, state)
    return Generated(tokens, lengths)


def _applies(model: Decoder, variables: Any, prompt_ids: jax.Array) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The model for the prompt, and for one token after it: adapters with an invocation sequence act from it on."""
    if isinstance(variables, RowAdapters):
        apply = _apply_rows(model)
        return apply, apply
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


def _apply_rows(model: Decoder) -> Callable[..., Any]:
    """The model with a set of adapters for each row; what has no rows, the length of the cache, goes beside."""

    def advance(variables: Any, ids: Any, real: Any, layers: Any, taken: Any, length: Any) -> Any:
        found: Any = model.apply(variables, ids, real, cache=Cache(layers, taken, length), last_only=True)
        logits, cache = found
        return logits, cache.layers, cache.real

    axis = 1 if model.scan_layers else 0
    rows = many.lora(advance, in_axes=(0, 0, axis, 0, None), out_axes=(0, axis, 0))

    def apply(variables: RowAdapters, ids: Any, real: Any = None, *, cache: Cache, last_only: bool) -> tuple[Any, Cache]:
        assert last_only
        logits, layers, taken = rows(*variables, ids, real, cache.layers, cache.real, cache.length)
        return logits, Cache(layers, taken, cache.length + ids.shape[1])

    return apply

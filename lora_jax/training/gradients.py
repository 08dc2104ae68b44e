"""Loss and gradient of a batch that is cut into microbatches and spread over devices: sums, divided once."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.core.weighted import Weighted, as_weighted, widened


class _Sums(NamedTuple):
    """What the parts of a batch add up."""

    loss: Weighted
    aux: Any
    grads: Any


def loss_and_gradient(
    loss_fn: Callable[[Mapping[str, Adapter], Any, jax.Array], Any],
    adapters: Mapping[str, Adapter],
    batch: Any,
    key: jax.Array,
    accumulate: int,
    axis_name: str | None,
) -> tuple[jax.Array, Any, Any]:
    """The loss, aux and gradient of the whole batch, loss and gradient in float32 at least.

    Args:
      loss_fn: `(adapters, batch, key) -> loss` or `(loss, aux)`, the loss a scalar or a `Weighted`.
      adapters: `{path: adapter}`.
      batch: this device's.
      key: this device's; each microbatch gets one of its own.
      accumulate: into how many microbatches the batch is cut.
      axis_name: the `pmap` axis of the devices, if there is one.

    Raises:
      InputError: the batch can't be cut so, or the loss is no scalar.
    """

    def loss_and_aux(adapters: Mapping[str, Adapter], batch: Any, key: jax.Array) -> tuple[Any, Any]:
        out = loss_fn(adapters, batch, key)
        loss, aux = out if isinstance(out, tuple) else (out, None)
        loss = as_weighted(loss)
        return loss.total, (loss.weight, aux)

    def part(batch: Any, key: jax.Array) -> _Sums:
        (total, (weight, aux)), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(adapters, batch, key)
        return _Sums(Weighted(total, weight), aux, grads)

    count, (sums, like) = accumulate, _added_up(part, batch, key, accumulate)
    if axis_name is not None:
        count, sums = count * jax.lax.axis_size(axis_name), jax.lax.psum(widened(sums), axis_name)
    loss, aux, grads = widened(sums.loss), sums.aux, widened(sums.grads)
    aux = jax.tree.map(lambda total, one: _mean(total, one, count), aux, like, is_leaf=_is_weighted)
    return loss.mean(), aux, jax.tree.map(lambda grad: grad / loss.weight.astype(grad.dtype), grads)


def _added_up(part: Callable[[Any, jax.Array], _Sums], batch: Any, key: jax.Array, accumulate: int) -> tuple[_Sums, Any]:
    """The sums over the microbatches, one after the other, and arrays or shapes like the aux of one."""
    if accumulate == 1:
        sums = part(batch, key)
        return sums, sums.aux
    batches = jax.tree.map(lambda leaf: _cut(leaf, accumulate), batch)
    keys = jax.random.split(key, accumulate)
    shapes = jax.eval_shape(part, *jax.tree.map(lambda leaf: leaf[0], (batches, keys)))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(widened, shapes))

    def add(total: _Sums, microbatch: Any) -> tuple[_Sums, None]:
        return jax.tree.map(jnp.add, total, widened(part(*microbatch))), None

    return jax.lax.scan(add, zeros, (batches, keys))[0], shapes.aux


def _mean(total: Any, one: Any, count: int) -> Any:
    """The mean of a part of aux, from the sum and one of those in it; but for a `Weighted`, floats keep their dtype."""
    if _is_weighted(total):
        return total.mean()
    if count == 1:
        return total
    dtype = one.dtype if jnp.issubdtype(one.dtype, jnp.floating) else total.dtype
    return (total / count).astype(dtype)


def _is_weighted(node: Any) -> bool:
    return isinstance(node, Weighted)


def _cut(leaf: jax.Array, accumulate: int) -> jax.Array:
    if jnp.ndim(leaf) == 0 or leaf.shape[0] % accumulate:
        raise InputError(
            f"accumulate: a leaf of the batch has the shape {jnp.shape(leaf)}; its leading axis can't be cut into "
            f"{accumulate} equal microbatches"
        )
    return leaf.reshape(accumulate, leaf.shape[0] // accumulate, *leaf.shape[1:])

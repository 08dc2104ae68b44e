"""`einsum` of two arrays with integer labels, as the one `dot_general` that it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType


def contract(
    x: Any,
    x_labels: Sequence[int],
    y: Any,
    y_labels: Sequence[int],
    out: Sequence[int],
    sharding: jax.NamedSharding | None = None,
    dot_general: Callable[..., jax.Array] = lax.dot_general,
    **options: Any,
) -> jax.Array:
    """The product of two arrays, summed over the labels that `out` lacks (and a transpose where its order asks for one).

    A label of `out` that neither operand has is a new axis of size 1.

    Args:
      x: any array.
      x_labels: a number for each of its axes.
      y: any array.
      y_labels: the same for y.
      out: the labels of the result, in order.
      sharding: of the result on a mesh with explicit axes; of its first axes, which its operands tell, it may lack entries.
      dot_general: what multiplies them.
      options: of that.

    >>> contract(jnp.ones((2, 3)), [0, 1], jnp.ones((3, 4)), [1, 2], [2, 0]).shape
    (4, 2)
    """
    keep, shared = set(out), set(x_labels) & set(y_labels)
    x, x_labels = _sum_out(x, x_labels, keep | shared)
    y, y_labels = _sum_out(y, y_labels, keep | shared)
    batch = [label for label in x_labels if label in shared and label in keep]
    summed = [label for label in x_labels if label in shared and label not in keep]
    dims = lambda labels, chosen: tuple(labels.index(label) for label in chosen)
    numbers = ((dims(x_labels, summed), dims(y_labels, summed)), (dims(x_labels, batch), dims(y_labels, batch)))
    labels = [*batch, *(i for i in x_labels if i not in shared), *(i for i in y_labels if i not in shared)]
    given = None if sharding is None else dict(zip(reversed(out), reversed(sharding.spec)))
    spec = _out_spec(x, x_labels, y, y_labels, labels, given)
    known = filter(None, (sharding, explicit_sharding(x), explicit_sharding(y)))
    # With its mesh, since there are arrays on a mesh without `jax.set_mesh`, too.
    out_sharding = None if spec is None else next(known).update(spec=spec)
    result = dot_general(x, y, numbers, out_sharding=out_sharding, **options)
    order = [labels.index(label) for label in out if label in labels]
    if order != sorted(order):
        result = lax.transpose(result, order)
    missing = [position for position, label in enumerate(out) if label not in labels]
    return lax.expand_dims(result, missing) if missing else result


def _out_spec(
    x: Any, x_labels: Sequence[int], y: Any, y_labels: Sequence[int], out: Sequence[int], given: Mapping[int, Any] | None
) -> jax.P | None:
    """On a mesh with explicit axes, the sharding of a product: as it is given, else each axis as in x, or else as in y."""
    names = lambda entry: (entry,) if isinstance(entry, str) else tuple(entry or ())
    fixed = {label: names(entry) for label, entry in (given or {}).items()}
    entries: dict[int, tuple[str, ...]] = {}
    for array, labels in ((x, x_labels), (y, y_labels)):
        for label, entry in zip(labels, jax.typeof(array).sharding.spec):
            taken = {name for kept in out for name in (fixed | entries).get(kept, ())}
            if not entries.get(label):
                entries[label] = tuple(name for name in names(entry) if name not in taken)
    entries |= fixed
    return jax.P(*(entries[label] or None for label in out)) if given is not None or any(entries.values()) else None


def explicit_sharding(array: Any) -> jax.NamedSharding | None:
    """How an array lies on a mesh with explicit axes; None on any other."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _sum_out(x: Any, labels: Sequence[int], keep: set[int]) -> tuple[Any, list[int]]:
    """Sum over the axes whose label nothing else needs."""
    gone = tuple(d for d, label in enumerate(labels) if label not in keep)
    return (jnp.sum(x, gone) if gone else x), [label for label in labels if label in keep]

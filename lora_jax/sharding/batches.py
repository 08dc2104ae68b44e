"""Batches on a mesh: the rows of each device and process."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lora_jax.core.errors import InputError
from lora_jax.sharding.mesh import AXES, named, ways


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch goes: its rows along `data` and `fsdp`.

    Args:
      mesh: a mesh; its axes of other names cut no batch.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> batch_sharding(make_mesh({"fsdp": 1, "model": 1}, jax.devices()[:1])).spec
    P('fsdp',)
    """
    return named(mesh, (_batch_axes(mesh),))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(name for name in AXES[:2] if name in mesh.shape)


def batch_parts(mesh: Mesh | None) -> int:
    """Into how many equal parts a batch is cut; without a mesh it is one.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> batch_parts(make_mesh({"fsdp": 1, "model": 1}, jax.devices()[:1]))
    1
    """
    return 1 if mesh is None else ways(mesh, _batch_axes(mesh))


def check_batch(mesh: Mesh | None, size: int) -> None:
    """Raise an InputError unless a batch of this size can be cut so."""
    if mesh is not None and size % batch_parts(mesh):
        axes = " and ".join(_batch_axes(mesh))
        raise InputError(
            f"batch_size {size} can't be cut into the {batch_parts(mesh)} equal parts that the mesh axes {axes} ask for: "
            f"take a multiple of {batch_parts(mesh)}"
        )


def round_up(mesh: Mesh | None, size: int) -> int:
    """The next size of a batch that can be cut so."""
    return -(-size // batch_parts(mesh)) * batch_parts(mesh)


def batch_rows(mesh: Mesh | None, size: int) -> np.ndarray:
    """Which rows of a batch the devices of this process hold, in growing order; without a mesh, all.

    Args:
      mesh: a mesh, or `None`.
      size: the rows of all processes together.

    Returns:
      `(rows,)`: the numbers of this process's rows.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> batch_rows(make_mesh({"fsdp": 1}, jax.devices()[:1]), 4).tolist()
    [0, 1, 2, 3]
    """
    if mesh is None:
        return np.arange(size)
    parts = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def place_batch(mesh: Mesh | None, batch: Mapping[str, np.ndarray], size: int) -> dict[str, Any]:
    """The batch on the mesh, from the rows that `batch_rows` says, of which each process has its own; without a mesh, as it is.

    Args:
      mesh: its axes are among `AXES`.
      batch: arrays `(rows, ...)`.
      size: the rows of all processes together.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    >>> place_batch(mesh, {"ids": np.ones((4, 7), np.int32)}, 4)["ids"].sharding.spec
    P('fsdp',)
    """
    if mesh is None:
        return dict(batch)
    rows, sharding = batch_rows(mesh, size), batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return array[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: place(array) for name, array in batch.items()}

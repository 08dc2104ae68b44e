"""Meshes, and how the axes of an array lie along theirs."""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from lora_jax.core.errors import InputError

Spec = tuple[tuple[str, ...], ...]  # the mesh axes of each axis of an array


AXES = ("data", "fsdp", "model")  # what the mesh axes of the models here are called


def read_axes(text: str) -> dict[str, int]:
    """The axes of a mesh, the slowest first.

    >>> read_axes("data=2,model=4")
    {'data': 2, 'model': 4}
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in axes or not re.fullmatch("[1-9][0-9]*", size):
            form = f"each of {', '.join(AXES)} at most once and with a size, as in data=2,model=4"
            raise InputError(f"--mesh must have {form}; {part!r} in {text!r} can't be used")
        axes[name] = int(size)
    return axes


def make_mesh(axes: Mapping[str, int], devices: Any = None) -> Mesh:
    """A mesh of all devices whose axes the compiler propagates (`AxisType.Auto`).

    Args:
      axes: `{name: size}`, the slowest first; the sizes multiply to the number of devices.
      devices: which devices; all of them by default.

    Raises:
      InputError: the sizes do not multiply to the number of devices.

    >>> dict(make_mesh({"data": 1, "model": 1}, jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(axes.values()) != len(devices):
        raise InputError(f"axes: {dict(axes)} needs {math.prod(axes.values())} devices, and there are {len(devices)}")
    # A TPU's axes may be split: 4 x 4 chips as 8 x 2, too.
    grid = mesh_utils.create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def entries(partition: Any, ndim: int) -> Spec:
    """A partition spec with an entry for each axis."""
    return tuple(map(_names, partition)) + ((),) * (ndim - len(partition))


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def checked(path: str, mesh: Any, spec: Spec, shape: tuple[int, ...]) -> Spec:
    """The same, or an InputError where an array of this shape can't be cut so."""
    problem, used = "", collections.Counter(sum(spec, ()))
    if unknown := set(used) - set(mesh.shape):
        problem = f"the mesh has no axis {', '.join(sorted(unknown))}; its axes are {dict(mesh.shape)}"
    elif len(spec) > len(shape):
        problem = f"there are {len(spec)} entries for {len(shape)} axes"
    elif twice := [name for name, count in used.items() if count > 1]:
        problem = f"the mesh axis {twice[0]!r} is in it twice"
    elif uneven := [axis for axis, names in enumerate(spec) if shape[axis] % ways(mesh, names)]:
        problem = f"the axis {uneven[0]} can't be cut into {ways(mesh, spec[uneven[0]])} equal parts"
    if problem:
        raise InputError(f"{path} of the shape {shape} can't have the sharding {partition(spec)}: {problem}")
    return spec


def ways(mesh: Mesh, names: tuple[str, ...]) -> int:
    """Into how many parts these mesh axes together cut an axis."""
    return math.prod(mesh.shape[name] for name in names)


def partition(spec: Spec) -> jax.P:
    """The spec as the compiler writes it, without whole axes at the end: or the second step would be compiled again."""
    parts: list[Any] = [names if len(names) > 1 else names[0] if names else None for names in spec]
    while parts and parts[-1] is None:
        parts.pop()
    return jax.P(*parts)


def named(mesh: Any, spec: Spec) -> NamedSharding:
    """The sharding of a spec."""
    return NamedSharding(mesh, partition(spec))

"""Arrays and adapters as plain data: JSON that says what they are, and one vector per dtype that holds them end to end.

A parameter's path stands in the JSON alone, never in a file name or an array's key, so no character in it matters; and
many small adapters cost no more than a few large ones.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import sharding
from lora_jax.core.adapter import Adapter, Full, LowRank, Rows, from_json, static_fields, to_json
from lora_jax.core.errors import InputError

KINDS: dict[str, Any] = {"LowRank": LowRank, "Full": Full, "Rows": Rows}
Spec = Sequence[Any]


def is_key(leaf: Any) -> bool:
    """Whether an array holds typed random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def pack(named: Mapping[str, Any]) -> tuple[Sequence[Spec], dict[str, np.ndarray]]:
    """Arrays as vectors on the host.

    Args:
      named: arrays of any dtype, sharded or not, and typed random keys; those spread over several hosts are gathered.

    Returns:
      For each array (dtype, shape), and for random keys their generator's name as a third; and the vectors by dtype,
      which share no memory with the arrays.

    Raises:
      InputError: some of them are abstract.

    >>> specs, vectors = pack({"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.int32)})
    >>> specs, vectors["float32"].shape
    ([['float32', [2, 3]], ['int32', [2]]], (6,))
    """
    abstract = [name for name, leaf in named.items() if isinstance(leaf, jax.ShapeDtypeStruct)]
    if abstract:
        raise InputError(f"only arrays can be saved, but these are abstract: {', '.join(abstract)}")
    leaves = [leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for leaf in named.values()]
    generators = [[str(jax.random.key_impl(leaf))] if is_key(leaf) else [] for leaf in leaves]
    arrays = jax.device_get(sharding.gather([jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in leaves]))
    vectors: dict[str, list[np.ndarray]] = {}
    for array in arrays:
        vectors.setdefault(array.dtype.name, []).append(np.ravel(array))
    specs = [[array.dtype.name, list(array.shape), *generator] for array, generator in zip(arrays, generators)]
    return specs, {name: np.concatenate(parts) for name, parts in vectors.items()}


def unpack(specs: Sequence[Spec], vectors: Mapping[str, np.ndarray]) -> list[jax.Array]:
    """The inverse of `pack`: arrays on the default device.

    Raises:
      InputError: an array is missing, or has 64 bits where JAX has them switched off.
    """
    offsets = dict.fromkeys(vectors, 0)
    arrays = []
    for dtype, shape, *generator in specs:
        size, start = int(np.prod(shape)), offsets.get(dtype, 0)
        part = vectors.get(dtype, np.empty(0))[start : start + size]
        if part.size != size or dtype not in vectors:
            raise InputError(f"an array of the dtype {dtype} and the shape {tuple(shape)} is missing")
        if jax.dtypes.canonicalize_dtype(part.dtype) != part.dtype:
            raise InputError(f"there are {dtype} arrays: set jax_enable_x64 to read them as they are")
        offsets[dtype] = start + size
        array = jnp.array(part.reshape(shape))  # a copy, never a view of the vector: it may be donated
        arrays.append(jax.random.wrap_key_data(array, impl=generator[0]) if generator else array)
    return arrays


def pack_adapters(adapters: Mapping[str, Adapter]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An adapter set as (JSON table, vectors).

    The table has an entry in `kinds` for each combination of kind, static fields (layout, scale, dropout, ranks, roles)
    and array shapes that occurs, and `paths` says which one each path has.

    Raises:
      InputError: an adapter is abstract, or of an unknown kind.
    """
    named = {(path, name): getattr(adapter, name) for path, adapter in adapters.items() for name in adapter.children()}
    specs, vectors = pack({f"{path} ({name})": leaf for (path, name), leaf in named.items()})
    arrays: dict[str, dict[str, Spec]] = {path: {} for path in adapters}
    for (path, name), spec in zip(named, specs):
        arrays[path][name] = spec
    kinds: list[Any] = []
    index: dict[str, int] = {}
    for path, adapter in adapters.items():
        kind = {"kind": _kind(path, adapter), "arrays": arrays[path], "fields": to_json(static_fields(adapter))}
        if kind not in kinds:
            kinds.append(kind)
        index[path] = kinds.index(kind)
    return {"kinds": kinds, "paths": index}, vectors


def unpack_adapters(table: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> dict[str, Adapter]:
    """The inverse of `pack_adapters`.

    Raises:
      InputError: a kind or a field is unknown, or an array is missing.
    """
    kinds, index = table["kinds"], table["paths"]
    for path, number in index.items():
        _check_kind(path, kinds[number])
    arrays = iter(unpack([spec for number in index.values() for spec in kinds[number]["arrays"].values()], vectors))
    adapters = {}
    for path, number in index.items():
        kind = kinds[number]
        values = {name: next(arrays) for name in kind["arrays"]}
        adapters[path] = KINDS[kind["kind"]](**values, **from_json(kind["fields"]))
    return adapters


def _kind(path: str, adapter: Adapter) -> str:
    for name, kind in KINDS.items():
        if type(adapter) is kind:
            return name
    raise InputError(f"{path}: can't save an adapter of the kind {type(adapter).__name__}, only {', '.join(KINDS)}")


def _check_kind(path: str, kind: Mapping[str, Any]) -> None:
    if kind["kind"] not in KINDS:
        raise InputError(f"{path} is an adapter of the kind {kind['kind']!r}; this lora_jax knows {', '.join(KINDS)}")
    known = {field.name for field in dataclasses.fields(KINDS[kind["kind"]])}
    unknown = sorted({*kind["arrays"], *kind["fields"]} - known)
    if unknown:
        raise InputError(f"{path} has fields that this lora_jax does not know: {', '.join(unknown)}")

"""The two files of a PEFT adapter directory, read without trust and written in one go."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lora_jax.core import files
from lora_jax.core.errors import InputError, MissingError
from lora_jax.huggingface.checkpoint_files import complain, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
SHARED = "base_model.vera_"  # what belongs to no module: VeRA's random matrices
_FLOATS = ("F64", "F32", "F16", "BF16")


def locate(directory: str | pathlib.Path, adapter: str | None) -> pathlib.Path:
    """Where an adapter's files are: the directory itself, or the one below it that is called `adapter`.

    Raises:
      InputError: the adapter's name is not a plain file name.
    """
    directory = pathlib.Path(directory)
    if adapter is not None:
        if not isinstance(adapter, str) or not adapter or adapter.startswith(".") or set(adapter) & set('/\\:\0"'):
            raise InputError(f"adapter: {adapter!r} is not the name of a directory")
        directory = directory / adapter
    return directory


def read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields of the configuration, and the tensors by their names in the base model.

    Raises:
      MissingError: a file is missing; the message says where adapters are, or how to convert a pickle.
      InputError: a file is damaged, or a tensor's name, dtype or values are not those of an adapter.
    """
    if not directory.is_dir():
        raise MissingError(f"there is no directory {directory}")
    if not (directory / CONFIG).is_file():
        below = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))
        hint = f"; it holds adapters by name: choose one with adapter={below[0]!r} (of {', '.join(below)})" if below else ""
        raise MissingError(f"{directory} has no {CONFIG}{hint}")
    fields = read_json(directory, CONFIG)
    file = directory / WEIGHTS
    if not file.is_file():
        pickled = f"; its {PICKLE} is a pickle, which can run any code and is never opened: save it again with PEFT"
        raise MissingError(f"{directory} has no {WEIGHTS}{pickled if (directory / PICKLE).exists() else ''}")
    tensors = _tensors(file)
    outside = (name for name in tensors if not name.startswith((PREFIX, SHARED)))
    complain(f"{file} has tensors outside of {PREFIX!r}:", outside)
    bad = (name for name, tensor in tensors.items() if not np.isfinite(tensor).all())
    complain(f"{file} has NaN or infinite values in", bad, "(training diverged, or the file is damaged)")
    return fields, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def full_name(name: str) -> str:
    """What a file calls a tensor of the base model's adapters."""
    return name if name.startswith(SHARED) else PREFIX + name


def _tensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            dtypes = {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118  not a dict
            tensors = {name: opened.get_tensor(name) for name, dtype in dtypes.items() if dtype in _FLOATS}
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{file} is truncated or not a safetensors file ({error}): get it again") from None
    odd = (f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in _FLOATS)
    complain(f"{file}: an adapter is made of {', '.join(_FLOATS)} tensors, unlike", odd)
    return tensors


def write(directory: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write both files, each in one go; the configuration last, so that an adapter is there once it is."""
    directory.mkdir(parents=True, exist_ok=True)
    named = {full_name(name): np.ascontiguousarray(tensor) for name, tensor in sorted(tensors.items())}
    files.write(directory / WEIGHTS, safetensors.numpy.save(named, metadata={"format": "pt"}))
    files.write(directory / CONFIG, (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())

"""The files of a Hugging Face model directory, read with errors that name the file."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lora_jax.names import HFName


def read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the directory.

    Raises:
      FileNotFoundError: there is no such directory or file.
      ValueError: the file is not a JSON object.
    """
    file = _existing(directory, name)
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(fields).__name__}")
    return fields


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors` by name.

    Raises:
      FileNotFoundError: there is no such directory or file.
      ValueError: the file is truncated or not safetensors.
    """
    file = _existing(directory, "model.safetensors")
    try:
        return safetensors.numpy.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from None


def arrange(
    directory: pathlib.Path, tensors: Mapping[str, np.ndarray], wanted: Mapping[HFName, tuple[int, ...]]
) -> dict[HFName, np.ndarray]:
    """The wanted tensors, each with its parameter's orientation.

    Args:
      directory: where the tensors were read, for the errors.
      tensors: all that were read, but for those that nobody needs.
      wanted: the parameter's shape by name.

    Raises:
      ValueError: tensors are missing, unexpected, or of another shape; they are named.
    """
    file = directory / "model.safetensors"
    _complain(f"{file} lacks the tensors", {name.name for name in wanted} - set(tensors))
    _complain(f"{file} has unexpected tensors", set(tensors) - {name.name for name in wanted})
    found = {}
    for name, shape in wanted.items():
        tensor, want = tensors[name.name], name.shape(shape)
        if tensor.shape != want:
            raise ValueError(f"{file}: {name.name} has the shape {tensor.shape}; config.json asks for {want}")
        found[name] = name.restore(tensor, shape)
    return found


def _complain(problem: str, names: Iterable[str]) -> None:
    if names:
        raise ValueError(f"{problem} {', '.join(sorted(names))}")


def _existing(directory: pathlib.Path, name: str) -> pathlib.Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no directory {directory}")
    file = directory / name
    if not file.is_file():
        raise FileNotFoundError(f"{directory} has no {name}: a Hugging Face directory with safetensors is needed")
    return file

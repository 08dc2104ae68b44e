"""The files of a Hugging Face model directory, read with errors that name the file."""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
import safetensors

from lora_jax.core import files
from lora_jax.core.errors import InputError, MissingError
from lora_jax.huggingface.names import HFName, listing

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E8M0": jnp.float8_e8m0fnu}  # which safetensors has not for NumPy


class Tensors(Protocol):
    """A file's tensors, each read when it is asked for.

    Args:
      file: what to call them in errors.
      shapes: the shape of each by name.
    """

    file: pathlib.Path
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all."""
        ...


class _Stored(NamedTuple):
    """Where a tensor is: its file, its name there, its dtype and where its bytes begin, which is known of `_BYTES` alone."""

    file: pathlib.Path
    name: str
    dtype: str
    begin: int


class SafeTensors:
    """The tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` lists.

    Args:
      directory: the model's directory.
      rename: what to call a tensor instead of its name in the file.

    Raises:
      MissingError: there is no such directory or file.
      InputError: a file is truncated or not safetensors, or the index is wrong.
    """

    def __init__(self, directory: pathlib.Path, rename: Callable[[str], str] = str):
        sharded = (directory / INDEX).is_file() and not (directory / SINGLE).is_file()
        self.file = directory / (INDEX if sharded else SINGLE)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, _Stored] = {}
        placed = _listed(directory) if sharded else {SINGLE: None}
        for file, names in ((existing(directory, name), names) for name, names in placed.items()):
            try:
                self._open(file, names, rename)
            except (safetensors.SafetensorError, OSError) as error:
                raise InputError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from None

    def _open(self, file: pathlib.Path, names: list[str] | None, rename: Callable[[str], str]) -> None:
        opened: Any = safetensors.safe_open(file, framework="numpy")
        present = list(opened.keys())
        complain(f"{file} lacks the tensors", set(names or ()) - set(present), f"that {INDEX} places there")
        parts = {name: opened.get_slice(name) for name in (present if names is None else names)}
        begins = _begins(file) if any(part.get_dtype() in _BYTES for part in parts.values()) else {}
        for name, part in parts.items():
            new = rename(name)
            if new in self.shapes:
                raise InputError(f"{file} has two tensors for {new}, {self._stored[new].name} and {name}")
            self.shapes[new] = tuple(part.get_shape())
            self._stored[new] = _Stored(file, name, str(part.get_dtype()), begins.get(name, 0))

    def dtype(self, name: str) -> str:
        """What a tensor is stored as, in the words of the format: `BF16`, `U8`."""
        return self._stored[name].dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all, as it is stored.

        Raises:
          InputError: it does not hold floats.
        """
        stored = self._stored[name]
        if stored.dtype not in _FLOATS:
            raise InputError(f"{self.file}: {stored.name} is stored as {stored.dtype}; {', '.join(_FLOATS)} can be read")
        return self.read_raw(name, rows)

    def read_raw(self, name: str, *index: slice) -> np.ndarray:
        """A part of a tensor, or all, as it is stored, whatever it holds: the numbers of something that is packed, say."""
        stored = self._stored[name]
        # Opened each time: what was read of a file stays in this process's memory for as long as it is open.
        with files.reading(stored.file):
            if stored.dtype in _BYTES:
                return _read_bytes(stored, self.shapes[name], *index)
            opened: Any = safetensors.safe_open(stored.file, framework="numpy")
            return opened.get_slice(stored.name)[index] if index else opened.get_tensor(stored.name)


def _begins(file: pathlib.Path) -> dict[str, int]:
    """Where the bytes of each tensor begin."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _read_bytes(stored: _Stored, shape: tuple[int, ...], rows: slice = slice(None), *index: slice) -> np.ndarray:
    """A part of a tensor of one byte a value."""
    width = math.prod(shape[1:])
    first, last, _ = rows.indices(shape[0])
    with stored.file.open("rb") as stream:
        stream.seek(stored.begin + first * width)
        values = np.fromfile(stream, _BYTES[stored.dtype], (last - first) * width)
    return values.reshape(-1, *shape[1:])[(slice(None), *index)]


def weight_names(directory: pathlib.Path) -> list[str]:
    """The names of the files with a directory's weights: those that the index lists, or the only one, there or not.

    Raises:
      InputError: the index is wrong.
    """
    return [SINGLE] if (directory / SINGLE).is_file() or not (directory / INDEX).is_file() else list(_listed(directory))


def _listed(directory: pathlib.Path) -> dict[str, list[str]]:
    """The names of the files that the index lists, each with the names of its tensors."""
    placed = read_json(directory, INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise InputError(f"{directory / INDEX} must have a weight_map, an object of file names by tensor")
    bad = {name for name in placed.values() if not _is_plain(name)}
    complain(f"{directory / INDEX} has file names that are not plain ones ending in .safetensors:", map(repr, bad))
    listed: dict[str, list[str]] = {}
    for tensor, name in placed.items():
        listed.setdefault(name, []).append(tensor)
    return listed


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file of the directory itself, on every system."""
    return name.endswith(".safetensors") and not set(name) & set('/\\:\0"') and not name.startswith(".")


def read_json(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the directory.

    Raises:
      MissingError: there is no such directory or file.
      InputError: the file is not a JSON object.
    """
    return files.read_json_object(existing(directory, name))


def check(
    tensors: Tensors, wanted: Mapping[HFName, tuple[int, ...]], spare: Callable[[str], bool] = lambda name: False
) -> None:
    """Every wanted tensor is there with the right shape, and nothing else but spares.

    Args:
      tensors: what the file has.
      wanted: the parameter's shape by name.
      spare: whether a tensor may be left unread.

    Raises:
      InputError: tensors are missing, unexpected, or of another shape; they are named.
    """
    shapes = {tensor: name.shape(shape) for name, shape in wanted.items() for tensor in name.tensors(shape).values()}
    have = {name for name in tensors.shapes if name in shapes or not spare(name)}
    complain(f"{tensors.file} lacks the tensors", set(shapes) - have)
    complain(f"{tensors.file} has unexpected tensors", have - set(shapes))
    for name, want in shapes.items():
        if tensors.shapes[name] != want:
            raise InputError(f"{tensors.file}: {name} has the shape {tensors.shapes[name]}; the configuration asks for {want}")


def complain(problem: str, names: Iterable[str], tail: str = "") -> None:
    """Raise an InputError if there are any names, with the first few of them."""
    names = sorted(names)
    if names:
        raise InputError(f"{problem} {listing(names)}{' ' if tail else ''}{tail}")


def existing(directory: pathlib.Path, name: str) -> pathlib.Path:
    """A file of the directory.

    Raises:
      MissingError: there is no such directory or file.
    """
    if not directory.is_dir():
        raise MissingError(f"there is no directory {directory}")
    file = directory / name
    if file.is_file():
        return file
    if name == SINGLE and any(directory.glob("pytorch_model*.bin")):
        raise MissingError(
            f"{directory} has its weights in pytorch_model.bin only, a pickle, which can run any code and is never opened: "
            "get the model's safetensors, or convert it with save_pretrained(directory, safe_serialization=True)"
        )
    raise MissingError(f"{directory} has no {name}: a Hugging Face directory with safetensors is needed")

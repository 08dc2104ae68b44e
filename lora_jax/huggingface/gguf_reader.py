"""GGUF files: their metadata, and their tensors dequantised one at a time under their Hugging Face names.

The header is read here, since a file that lies about its sizes must end in an error; the `gguf` package dequantises.
"""

import math
import mmap
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.errors import InputError, MissingError
from lora_jax.core.files import reading
from lora_jax.huggingface import gguf_names

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_AXES, _MOST_EXPERTS = 4, 10_000  # a broken file must not ask for more work than any real one


class _Place(NamedTuple):
    """Where a tensor is: its name in the file, how it is quantised, where it begins, and which expert's part it is."""

    stored: str
    code: int
    offset: int
    part: int


class _Header:
    """Little-endian values from a file's start on."""

    def __init__(self, file: pathlib.Path, data: Any):
        self.file, self.data, self.at = file, data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise InputError(f"{self.file} is truncated or no GGUF file: it has {len(self.data)} bytes and promises more")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        raw = self.take(self.scalar("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{self.file}: a text in its header is not UTF-8: {raw[:40]!r}") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise InputError(f"{self.file}: its header has a value of the unknown type {kind}")
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _SCALARS:
            raise InputError(f"{self.file}: its header has an array of the type {kind}; only numbers and texts can be read")
        stored = np.dtype(_SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * stored.itemsize), stored).tolist()


class GgufFile:
    """The metadata and the tensors of a GGUF file; the tensors under their Hugging Face names.

    Args:
      file: the file, of GGUF version 2 or 3.

    Raises:
      MissingError: there is no such file.
      InputError: it is truncated, or no GGUF file.
    """

    def __init__(self, file: str | pathlib.Path):
        self.file = pathlib.Path(file)
        if not self.file.is_file():
            raise MissingError(f"there is no file {self.file}")
        self.metadata: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.read_names: set[str] = set()
        self._places: dict[str, _Place] = {}
        with reading(self.file), self.file.open("rb") as opened:
            self._size = opened.seek(0, 2)
            if not self._size:
                raise InputError(f"{self.file} is no GGUF file: it is empty")
            with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._read_header(_Header(self.file, data))

    def _read_header(self, header: _Header) -> None:
        if header.data[:4] != b"GGUF":
            raise InputError(f"{self.file} is no GGUF file")
        header.take(4)
        version, count, entries = header.scalar("I"), header.scalar("Q"), header.scalar("Q")
        if version not in (2, 3):
            raise InputError(f"{self.file} has the GGUF version {version}; 2 and 3 can be read, little-endian")
        for _ in range(entries):
            name = header.text()
            self.metadata[name] = header.value(header.scalar("I"))
        self._layout = gguf_names.of(self.architecture, bool(self.value("expert_count")))
        for _ in range(count):
            self._note_tensor(header)
        alignment = self.number("general.alignment", 32)
        self._start = -(-header.at // alignment) * alignment

    def _note_tensor(self, header: _Header) -> None:
        stored, axes = header.text(), header.scalar("I")
        if not 1 <= axes <= _MOST_AXES:
            raise InputError(f"{self.file}: {stored} has {axes} axes; 1 to {_MOST_AXES} can be read")
        shape = tuple(header.scalar("Q") for _ in range(axes))[::-1]
        code, offset = header.scalar("I"), header.scalar("Q")
        if len(shape) == 3 and shape[0] > _MOST_EXPERTS:
            raise InputError(f"{self.file}: {stored} is of {shape[0]} experts; at most {_MOST_EXPERTS} can be read")
        for i, name in enumerate(self._layout.names(stored, shape)):
            if name in self.shapes:
                raise InputError(f"{self.file} has two tensors for {name}")
            self.shapes[name] = shape[1:] if name != stored and len(shape) == 3 else shape
            self._places[name] = _Place(stored, code, offset, i)

    @property
    def architecture(self) -> Any:
        """What llama.cpp calls the family."""
        return self.metadata.get("general.architecture")

    def value(self, name: str) -> Any:
        """A value of the metadata of the architecture, which is noted in `read_names`; `None` without it."""
        self.read_names.add(f"{self.architecture}.{name}")
        return self.metadata.get(f"{self.architecture}.{name}")

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number of the metadata of the architecture.

        Raises:
          InputError: there is none.
        """
        self.value(name)
        return self.number(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: int | None = None) -> int:
        """A positive whole number of the metadata.

        Raises:
          InputError: there is none.
        """
        value = self.metadata.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{self.file}: {name} must be a positive whole number, not {value!r}")
        return value

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all, in float32.

        Raises:
          InputError: it lies outside of the file, or is quantised in a way that the `gguf` package does not undo.
        """
        gguf = package()
        stored, code, offset, part = self._places[name]
        shape = self.shapes[name]
        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError:
            raise InputError(f"{self.file}: {stored} is quantised in an unknown way, number {code}") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise InputError(f"{self.file}: {stored} has the shape {shape}, but is quantised in blocks of {block}")
        length = math.prod(shape) // block * size
        begin = self._start + offset + part * length
        if begin + length > self._size:
            raise InputError(f"{self.file} is truncated: {stored} ends at byte {begin + length} of {self._size}")
        order = self._order(stored, shape[0])[rows]
        try:
            if len(shape) == 1:
                values = gguf.quants.dequantize(self._bytes(begin, length), kind)[order]
                return values - np.float32(1) if self._layout.offset and stored.endswith("_norm.weight") else values
            row, first, last = length // shape[0], order.min(), order.max()
            raw = self._bytes(begin + row * first, row * (last + 1 - first)).reshape(-1, row)
            return gguf.quants.dequantize(raw[order - first], kind).reshape(-1, *shape[1:])
        except NotImplementedError as error:
            raise InputError(f"{self.file}: {stored} can't be read: {error}") from None

    def _bytes(self, begin: int, length: int) -> np.ndarray:
        """Not through a mapping, of which each page that was read counts as this process's memory."""
        with reading(self.file):
            return np.fromfile(self.file, np.uint8, length, offset=begin)

    def _order(self, stored: str, count: int) -> np.ndarray:
        """Where each row stands in the file, if the two halves of a rotated pair of queries or keys stand side by side."""
        if not self._layout.interleaves(stored):
            return np.arange(count)
        queries = self.size("attention.head_count")
        heads = queries if "attn_q." in stored else self.size("attention.head_count_kv", queries)
        if count % (2 * heads):
            raise InputError(f"{self.file}: {stored} has {count} rows, which {heads} heads can't share")
        return gguf_names.interleaved(count, heads)


def package() -> Any:
    """The package `gguf`.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ModuleNotFoundError("GGUF files need the package gguf: pip install 'lora-jax[gguf]'", name="gguf") from None
    return gguf

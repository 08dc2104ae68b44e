"""GGUF files: their metadata, and their tensors dequantised one at a time under their Hugging Face names.

The header is read here, since a file that lies about its sizes must end in an error; the `gguf` package dequantises.
"""

import math
import mmap
import pathlib
import re
import struct
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError, MissingError
from lora_jax.core.files import reading

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_AXES = 4
_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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
        self._places: dict[str, tuple[str, int, int]] = {}
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
        for _ in range(count):
            self._note_tensor(header)
        alignment = self.number("general.alignment", 32)
        self._start = -(-header.at // alignment) * alignment

    def _note_tensor(self, header: _Header) -> None:
        stored, axes = header.text(), header.scalar("I")
        if axes > _MOST_AXES:
            raise InputError(f"{self.file}: {stored} has {axes} axes; at most {_MOST_AXES} can be read")
        shape = tuple(header.scalar("Q") for _ in range(axes))[::-1]
        name = _hf_name(stored)
        if name in self.shapes:
            raise InputError(f"{self.file} has two tensors for {name}")
        self.shapes[name], self._places[name] = shape, (stored, header.scalar("I"), header.scalar("Q"))

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
        gguf = _package()
        stored, code, offset = self._places[name]
        shape = self.shapes[name]
        try:
            kind = gguf.GGMLQuantizationType(code)
        except ValueError:
            raise InputError(f"{self.file}: {stored} is quantised in an unknown way, number {code}") from None
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise InputError(f"{self.file}: {stored} has the shape {shape}, but is quantised in blocks of {block}")
        begin, length = self._start + offset, math.prod(shape) // block * size
        if begin + length > self._size:
            raise InputError(f"{self.file} is truncated: {stored} ends at byte {begin + length} of {self._size}")
        order = self._order(stored, shape[0])[rows]
        try:
            if len(shape) == 1:
                return gguf.quants.dequantize(self._bytes(begin, length), kind)[order]
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
        """Where each row stands in the file: llama.cpp puts the two halves of a rotated pair side by side.

        Only for queries and keys of its `llama` architecture; the others rotate as Hugging Face does.
        """
        order = np.arange(count)
        match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", stored)
        if self.metadata.get("general.architecture") != "llama" or match is None:
            return order
        queries = self.number("llama.attention.head_count")
        heads = queries if match[1] == "q" else self.number("llama.attention.head_count_kv", queries)
        if count % (2 * heads):
            raise InputError(f"{self.file}: {stored} has {count} rows, which {heads} heads can't share")
        return order.reshape(heads, -1, 2).swapaxes(1, 2).reshape(count)


def _hf_name(name: str) -> str:
    """The Hugging Face name of a tensor; one that has none keeps its own.

    >>> _hf_name("blk.3.attn_q.weight"), _hf_name("rope_freqs.weight")
    ('model.layers.3.self_attn.q_proj.weight', 'rope_freqs.weight')
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        return name
    prefix = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{prefix}{_MODULES[match[2]]}.{match[3]}"


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ModuleNotFoundError("GGUF files need the package gguf: pip install 'lora-jax[gguf]'", name="gguf") from None
    return gguf

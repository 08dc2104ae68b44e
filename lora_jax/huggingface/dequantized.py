"""Quantised checkpoints of the hub, shown as dense tensors under their plain names, of which a part at a time is made."""

import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from lora_jax.core.errors import InputError, within
from lora_jax.huggingface.checkpoint_files import SafeTensors, complain, read_json
from lora_jax.huggingface.formats import awq, bitsandbytes, fp8, gptq, mxfp4
from lora_jax.huggingface.formats.packed import Find, Packed

_METHODS: dict[str, Find] = {
    "fp8": fp8.find,
    "mxfp4": mxfp4.find,
    "bitsandbytes": bitsandbytes.find,
    "gptq": gptq.find,
    "awq": awq.find,
}


def open_tensors(directory: pathlib.Path, rename: Callable[[str], str] = str) -> "SafeTensors | Dequantized":
    """The tensors of a Hugging Face directory; those that its `quantization_config` is about as dense ones, in float32.

    Args:
      directory: the model's directory.
      rename: what to call a tensor instead of its name in the file.

    Raises:
      MissingError: there is no such directory or file.
      InputError: a file is truncated or not safetensors, or the weights are quantised in a way that can't be read.
    """
    stored = SafeTensors(directory, rename)
    config = read_json(directory, "config.json").get("quantization_config")
    if config is None:
        return stored
    with within(f"{directory / 'config.json'}: quantization_config"):
        return Dequantized(stored, _find(stored, config))


def _find(stored: SafeTensors, config: object) -> dict[str, Packed]:
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(method, str) or method not in _METHODS:
        known = ", ".join(map(repr, _METHODS))
        raise InputError(f"the quant_method is {method!r}; {known} can be read: dequantise the checkpoint, or take another one")
    found = _METHODS[method](stored, config)
    if not found:
        raise InputError(f"no tensor is stored as {method!r} has them: remove quantization_config if the weights are dense")
    return found


class Dequantized:
    """Tensors of which some are packed.

    Args:
      stored: the files' own.
      packed: the dense tensors that some of those stand for, by name.

    Raises:
      InputError: a packed tensor has the name of one that is stored beside it.
    """

    def __init__(self, stored: SafeTensors, packed: Mapping[str, Packed]):
        parts = {part for one in packed.values() for part in one.parts}
        plain = {name: shape for name, shape in stored.shapes.items() if name not in parts}
        complain(f"{stored.file} has both dense and packed", set(plain) & set(packed))
        self.file, self.shapes = stored.file, plain | {name: one.shape for name, one in packed.items()}
        self._stored, self._packed = stored, packed

    def dtype(self, name: str) -> str | None:
        """What a tensor is stored as, in the words of the format; `None`: it is packed."""
        return None if name in self._packed else self._stored.dtype(name)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all.

        Raises:
          InputError: it does not hold floats.
        """
        if name not in self._packed:
            return self._stored.read(name, rows)
        first, last, _ = rows.indices(self.shapes[name][0])
        return self._packed[name].read(first, last)

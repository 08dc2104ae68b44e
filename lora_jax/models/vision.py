"""Vision encoders (ViT, DINOv2) with a classification head, as one Linen model, and a loader for Hugging Face directories.

`load` gives a `Loaded`, whose `apply` is a function for `lora`.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import within
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.models import classifiers, stacking
from lora_jax.models.classifiers import Loaded, shardings, with_new_head
from lora_jax.models.stacking import Remat
from lora_jax.models.vision_config import FAMILIES, VisionConfig, read_config
from lora_jax.models.vision_encoder import Vision
from lora_jax.models.vision_names import file_names, hf_names, modern
from lora_jax.models.weights import Reader, Sharding

__all__ = ["FAMILY", "Loaded", "Vision", "VisionConfig", "file_names", "hf_names", "load", "shardings", "with_new_head"]

FAMILY = tuple(FAMILIES)  # the model types


def load(
    directory: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    num_labels: int | None = None,
    seed: int = 0,
    sharding: Sharding = None,
    quantize: str | None = None,
    block: int | None = None,
    scan_layers: bool = False,
    remat: Remat | None = None,
) -> Loaded:
    """Read a Hugging Face directory: `config.json` and `model.safetensors`, or an index of several files.

    A checkpoint without a head of `num_labels` outputs gets a new one, initialised from the seed; `Loaded.new` says so.

    Args:
      directory: the model's directory.
      dtype: the dtype of the parameters, and of the computation but for attention weights.
      num_labels: the number of classes; `None`: as many as the checkpoint says.
      seed: the seed of a new head.
      sharding: where the parameters go: one sharding for all, or a function of (path, shape).
      quantize: `"nf4"`, `"int4"`, `"int8"` or `"fp8"`: the kernels of the layers are quantised as they are read, as
        `lora_jax.quantize` does; embeddings, head, norms and biases are not. Such a model is for `lora(loaded.apply)`.
      block: how many values share a scale (64 by default); only with `quantize`.
      scan_layers: stack the layers' parameters along a leading axis and scan over them: compiles once for all layers.
      remat: what the backward pass computes again instead of keeping it: `None`: nothing; `"products"`: all but the outputs of
        products with weights; `"full"`: all of a layer but its input.

    Raises:
      MissingError: the directory or one of the two files is missing.
      InputError: another architecture, a field of `config.json` that is not known, a file that is truncated or not what its
        name says, tensors that are missing, unexpected or of the wrong shape, or kernels that can't be quantised so.
      ImportError: qwix is not installed.

    >>> import json, tempfile, safetensors.numpy
    >>> sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    >>> config, pixels = read_config({"model_type": "vit", **sizes}), jnp.ones((1, 8, 8, 3))
    >>> wanted, _ = classifiers.shapes(Vision(config), pixels)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = (pathlib.Path(directory) / "config.json").write_text(json.dumps({"model_type": "vit", **sizes}))
    ...     tensors = {name.name: name.export(np.ones(wanted[path].shape)) for path, name in hf_names(config).items()}
    ...     safetensors.numpy.save_file(tensors, pathlib.Path(directory) / "model.safetensors")
    ...     model = load(directory, num_labels=3)
    >>> jax.eval_shape(model.apply, model.variables, pixels).shape, sorted(model.new)
    ((1, 3), ['params/classifier/bias', 'params/classifier/kernel'])
    """
    stacking.check_remat(remat)
    directory = pathlib.Path(directory)
    fields = checkpoint_files.read_json(directory, "config.json")
    config = _config(directory, fields, num_labels)
    tensors = _Tensors(directory, config.family)
    names = hf_names(config, scan_layers)
    new = classifiers.new_paths(names, tensors.shapes, num_labels)
    reader = Reader(tensors, dtype, sharding, quantize, block)
    module = Vision(config, jnp.dtype(dtype), scan_layers, remat)
    image = jax.ShapeDtypeStruct((1, *config.image_size, config.num_channels), jnp.float32)
    spare = functools.partial(_is_spare, bool(new))
    return classifiers.read(module, classifiers.shapes(module, image), reader, names, names, new, spare, fields, seed)


class _Tensors:
    """The tensors of a directory by their names in transformers' memory, of which a file may hold two as one."""

    def __init__(self, directory: pathlib.Path, family: str):
        row = FAMILIES[family]
        self._stored = open_tensors(directory, functools.partial(modern, family=row))
        self.file, self.shapes = self._stored.file, dict(self._stored.shapes)
        self._parts: dict[str, tuple[str, int]] = {}  # the tensor that holds one, and its first row there
        for whole in self._stored.shapes:
            for joined, names in row.joined.items():
                if joined in whole:
                    self._split(whole, [whole.replace(joined, name) for name in names])

    def _split(self, whole: str, names: list[str]) -> None:
        rows, *rest = self.shapes.pop(whole)
        for name, begin, end in zip(names, (0, rows // 2), (rows // 2, rows)):
            self.shapes[name], self._parts[name] = (end - begin, *rest), (whole, begin)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of a tensor, or all, as it is stored."""
        whole, first = self._parts.get(name, (name, 0))
        begin, end, _ = rows.indices(self.shapes[name][0])
        return self._stored.read(whole, slice(first + begin, first + end))


def _config(directory: pathlib.Path, fields: Mapping[str, Any], num_labels: int | None) -> VisionConfig:
    with within(directory / "config.json"):
        return read_config(fields, num_labels)


def _is_spare(new_head: bool, name: str) -> bool:
    """What only pretraining, or the encoder without this head, needs."""
    unread = name.endswith("embeddings.mask_token") or ".pooler.dense." in name or name.startswith("decoder.")
    return unread or (new_head and name.startswith("classifier."))

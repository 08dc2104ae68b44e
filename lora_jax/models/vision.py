"""Vision encoders (ViT, DINOv2) with a classification head, as one Linen model, and a loader for Hugging Face directories."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.core.errors import InputError
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.huggingface.names import HFName
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.vision_config import FAMILIES, read_config
from lora_jax.models.vision_config import VisionConfig as VisionConfig
from lora_jax.models.vision_encoder import Vision as Vision
from lora_jax.models.vision_names import file_names as file_names
from lora_jax.models.vision_names import hf_names as hf_names
from lora_jax.models.vision_names import modern
from lora_jax.models.weights import Reader, Sharding, put
from lora_jax.sharding import model_shardings, on_mesh

FAMILY = tuple(FAMILIES)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model read from a directory.

    Args:
      apply: `apply(variables, pixel_values)` -> logits `(batch, num_labels)`. The pixels are floats `(batch, height, width,
        channels)`, normalised as the checkpoint's `preprocessor_config.json` says. Images of another size than the model's
        get interpolated position embeddings, as transformers makes them (for ViT: with `interpolate_pos_encoding=True`).
      variables: `{"params": ...}`.
      names: `{path: HFName}` for every parameter, as transformers' image classifier in memory, whatever the file's are.
      config: the model's sizes and parts.
      labels: the checkpoint's names of the labels, in the order of the logits; `LABEL_0`, ... where the head is new.
      new: paths of parameters that the checkpoint lacks, initialised from the seed (a new head).
    """

    apply: Callable[..., Any]
    variables: Any
    names: dict[str, HFName]
    config: VisionConfig
    labels: tuple[str, ...]
    new: tuple[str, ...]


def shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
    """Where each parameter goes on a mesh with some of the axes `data`, `fsdp` and `model`; see `sharding.model_shardings`.

    `model` cuts the heads and the MLP's inner width.
    """
    return model_shardings(mesh, variables, columns=("query", "key", "value", "up", "gate"), rows=("out", "down"))


def load(
    directory: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    num_labels: int | None = None,
    seed: int = 0,
    sharding: Sharding = None,
    quantize: str | None = None,
    block: int | None = None,
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

    Raises:
      MissingError: the directory or one of the two files is missing.
      InputError: another architecture, a field of `config.json` that is not known, a file that is truncated or not what its
        name says, tensors that are missing, unexpected or of the wrong shape, or kernels that can't be quantised so.
      ImportError: qwix is not installed.
    """
    directory = pathlib.Path(directory)
    fields = checkpoint_files.read_json(directory, "config.json")
    config = _config(directory, fields, num_labels)
    tensors = _Tensors(directory, config.family)
    stored_head = tensors.shapes.get("classifier.weight")
    has_head = stored_head is not None and num_labels in (None, stored_head[0])
    model = Vision(config, jnp.dtype(dtype))
    image = jax.ShapeDtypeStruct((1, *config.image_size, config.num_channels), jnp.float32)
    wanted, treedef = paths.flatten(jax.eval_shape(model.init, jax.random.key(0), image))
    names = hf_names(config)
    new = () if has_head else tuple(path for path in names if path.startswith("params/classifier/"))

    def spare(name: str) -> bool:
        return _is_spare(name) or (not has_head and name.startswith("classifier."))

    checkpoint_files.check(tensors, {names[path]: leaf.shape for path, leaf in wanted.items() if path not in new}, spare)
    head = _new_head(config, seed)
    reader = Reader(tensors, dtype, sharding, quantize, block)

    def read(path: str, shape: tuple[int, ...]) -> Any:
        if path in new:
            return put(np.asarray(head[path], dtype), reader.place(path, shape))
        return reader.read(path, names[path], shape)

    leaves = [read(path, leaf.shape) for path, leaf in wanted.items()]
    variables = jax.tree.unflatten(treedef, leaves)
    return Loaded(model.apply, variables, names, config, _labels(fields, config.num_labels, has_head), new)


def with_new_head(model: Loaded, seed: int) -> Loaded:
    """The model with the new head of another seed; a head of the checkpoint's own stays."""
    leaves, treedef = paths.flatten(model.variables)
    head = _new_head(model.config, seed)
    for path in model.new:
        old = leaves[path]
        leaves[path] = put(np.asarray(head[path], old.dtype), old.sharding if on_mesh(old) else None)
    return dataclasses.replace(model, variables=jax.tree.unflatten(treedef, list(leaves.values())))


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
    try:
        config = read_config(fields, num_labels)
        if config.hidden_act not in FUNCTIONS:
            raise InputError(f"hidden_act {config.hidden_act!r} is not one of {', '.join(sorted(FUNCTIONS))}")
    except InputError as error:
        raise InputError(f"{directory / 'config.json'}: {error}") from None
    return config


def _is_spare(name: str) -> bool:
    """What only pretraining, or the encoder without this head, needs."""
    return name.endswith("embeddings.mask_token") or ".pooler.dense." in name or name.startswith("decoder.")


def _new_head(config: VisionConfig, seed: int) -> dict[str, jax.Array]:
    width = config.hidden_size * (2 if config.patches_in_head else 1)
    kernel = config.initializer_range * jax.random.normal(jax.random.key(seed), (width, config.num_labels))
    return {"params/classifier/kernel": kernel, "params/classifier/bias": jnp.zeros(config.num_labels)}


def _labels(fields: Mapping[str, Any], num_labels: int, has_head: bool) -> tuple[str, ...]:
    named = (fields.get("id2label") or {}) if has_head else {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(num_labels))

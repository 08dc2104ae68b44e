"""Loaders of encoders from Hugging Face directories: BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA and ModernBERT.

`load` gives a `Loaded`, whose `apply` is a function for `lora`. `encoder` has the model, `encoder_config` its sizes and parts,
and `encoder_families` what each family has.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core import files
from lora_jax.core.errors import InputError, within
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.huggingface.names import HFName
from lora_jax.models import classifiers, stacking
from lora_jax.models.classifiers import HEAD, LAST, Loaded, new_paths, shapes, shardings, with_new_head
from lora_jax.models.encoder import Bert
from lora_jax.models.encoder_config import BertConfig
from lora_jax.models.encoder_config import Pooling as Pooling
from lora_jax.models.encoder_families import FAMILIES, Family, name_of, read_config
from lora_jax.models.stacking import Remat
from lora_jax.models.weights import Reader, Sharding

__all__ = ["FAMILY", "Bert", "BertConfig", "Loaded", "hf_names", "load", "shardings", "with_new_head"]

FAMILY = tuple(FAMILIES)  # the model types
_IDS = jax.ShapeDtypeStruct((1, 1), jnp.int32)


def hf_names(config: BertConfig, prefix: str = "bert.", scan_layers: bool = False) -> dict[str, HFName]:
    """The Hugging Face name of each parameter of the model, by path.

    Args:
      config: the model's sizes and parts.
      prefix: `"bert."`, which stands for the family's own, or `""` as in checkpoints of the encoder alone. The head has none.
      scan_layers: whether the layers' parameters are stacked.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> names = hf_names(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    >>> names["params/encoder/layer_0/mlp/up/kernel"]
    HFName(name='bert.encoder.layer.0.intermediate.dense.weight', axes='i o -> o i', kind='linear', order=0, tied='')
    """
    found, _ = shapes(Bert(config, scan_layers=scan_layers), _IDS)
    return _names(found, config, FAMILIES[config.model_type].prefix if prefix == "bert." else prefix)


def _names(found: Iterable[str], config: BertConfig, prefix: str) -> dict[str, HFName]:
    family, number = FAMILIES[config.model_type], stacking.number(config.apart, config.num_hidden_layers)
    return {path: name_of(path, family, prefix, number) for path in found}


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

    The head is the family's own, or a last layer alone on what a sentence model (a directory with a `modules.json`) pools. A
    checkpoint without a head of `num_labels` outputs gets a new one, initialised from the seed; `Loaded.new` says so.

    Args:
      directory: the model's directory.
      dtype: the dtype of the parameters.
      num_labels: the number of classes; `None`: as many as the checkpoint says; 0: no head. A sentence model then gives the
        vectors that `SentenceTransformer.encode` does.
      seed: the seed of a new head.
      sharding: where the parameters go: one sharding for all, or a function of (path, shape).
      quantize: `"nf4"`, `"int4"`, `"int8"` or `"fp8"`: the kernels of the layers are quantised as they are read, as
        `lora_jax.quantize` does; embeddings, pooler, head, norms and biases are not. Such a model is for `lora(loaded.apply)`.
      block: how many values share a scale (64 by default); only with `quantize`.
      scan_layers: stack the layers' parameters along a leading axis and scan over them: compiles once for all layers.
        ModernBERT's first one, which has a norm less, stays apart.
      remat: what the backward pass computes again instead of keeping it: `None`: nothing; `"products"`: all but the outputs of
        products with weights; `"full"`: all of a layer but its input.

    Raises:
      MissingError: the directory or one of its files is missing.
      InputError: another architecture, a field that can't be read, a file that is truncated or not what its name says, tensors
        that are missing, unexpected or of the wrong shape, or kernels that can't be quantised so.
      ImportError: qwix is not installed.

    >>> import json, tempfile, numpy as np, safetensors.numpy
    >>> sizes = dict(vocab_size=8, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> sizes |= dict(hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    >>> config, ids = BertConfig(num_labels=2, **sizes), jnp.ones((1, 5), jnp.int32)
    >>> wanted, _ = shapes(Bert(config), ids)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = (pathlib.Path(directory) / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    ...     tensors = {name.name: name.export(np.ones(wanted[path].shape)) for path, name in hf_names(config).items()}
    ...     safetensors.numpy.save_file(tensors, pathlib.Path(directory) / "model.safetensors")
    ...     model = load(directory, num_labels=3)
    >>> jax.eval_shape(model.apply, model.variables, ids).shape, sorted(model.new)
    ((1, 3), ['params/classifier/bias', 'params/classifier/kernel'])
    """
    stacking.check_remat(remat)
    directory = pathlib.Path(directory)
    fields = checkpoint_files.read_json(directory, "config.json")
    tensors = open_tensors(directory, _modern)
    config = _config(directory, fields, tensors.shapes, num_labels)
    family = FAMILIES[config.model_type]
    module = Bert(config, jnp.dtype(dtype), scan_layers, remat)
    found = shapes(module, _IDS)
    wanted = found[0]
    has_prefix = any(name.startswith(family.prefix) for name in tensors.shapes)
    stored = _names(wanted, config, family.prefix if has_prefix else "")
    names = _names(wanted, config, family.prefix if config.num_labels else "")
    new = new_paths(stored, tensors.shapes, num_labels)
    spare = functools.partial(_is_spare, family, bool(new) or not config.num_labels)
    reader = Reader(tensors, dtype, sharding, quantize, block)
    return classifiers.read(module, found, reader, stored, names, new, spare, fields, seed)


def _modern(name: str) -> str:
    """Old checkpoints call a norm's weight and bias gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _config(
    directory: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, Any], num_labels: int | None
) -> BertConfig:
    """The family's classifier, or what a sentence model has in place of its head."""
    with within(directory / "config.json"):
        config = read_config(fields)
    chosen: dict[str, Any] = {} if num_labels is None else {"num_labels": num_labels}
    last = FAMILIES[config.model_type].modules[LAST if config.head_act else HEAD]
    if (directory / "modules.json").exists() and (num_labels == 0 or f"{last}.weight" not in tensors):
        chosen |= {**_sentence(directory), "head_act": None, "head_norm": False}
    elif config.pooling == "pooler" and not any(name.endswith("pooler.dense.weight") for name in tensors):
        chosen["pooling"] = "mean"
    return dataclasses.replace(config, **chosen)


def _sentence(directory: pathlib.Path) -> dict[str, Any]:
    """How a sentence model pools, and whether it scales what it gives to length 1."""
    file = directory / "modules.json"
    listed = files.read_json(file)
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise InputError(f"{file} must hold a list of objects")
    folders = {str(module.get("type")).rpartition(".")[2]: module.get("path") for module in listed}
    unknown = folders.keys() - {"Transformer", "Pooling", "Normalize"}
    checkpoint_files.complain(f"{file}: Transformer, Pooling and Normalize can be read, not", unknown)
    name = f"{folders.get('Pooling', '1_Pooling')}/config.json"
    modes = checkpoint_files.read_json(directory, name)
    chosen = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on is True]
    readable: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) == 1 and chosen[0] in readable:
        return {"pooling": readable[chosen[0]], "normalize": "Normalize" in folders}
    raise InputError(f"{directory / name}: mean or first-token pooling can be read, not {chosen}")


def _is_spare(family: Family, without_head: bool, name: str) -> bool:
    """Whether a tensor may be left unread: a buffer, another head, or the checkpoint's own beside a new one."""
    bare = name.removeprefix(family.prefix)
    own = tuple(f"{theirs}." for ours, theirs in family.modules.items() if ours.startswith((HEAD, "pooler")))
    other = bare.startswith(family.spare) or (without_head and bare.startswith(own))
    return other or bare.endswith((".position_ids", ".token_type_ids"))

"""Loaders of encoders from Hugging Face directories: BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ELECTRA and ModernBERT.

`encoder` has the model, `encoder_config` its sizes and parts, and `encoder_families` what each family has.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import files, paths
from lora_jax.core.errors import InputError
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.huggingface.names import HFName
from lora_jax.models.encoder import Bert as Bert
from lora_jax.models.encoder_config import BertConfig as BertConfig
from lora_jax.models.encoder_config import Pooling as Pooling
from lora_jax.models.encoder_families import FAMILIES, HEAD, LAST, Family, name_of, read_config
from lora_jax.models.weights import Reader, Sharding, put
from lora_jax.sharding import model_shardings, on_mesh

FAMILY = tuple(FAMILIES)  # the model types


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model read from a directory.

    Args:
      apply: `apply(variables, input_ids=, attention_mask=None, token_type_ids=None)` -> logits `(batch, num_labels)`, or
        pooled vectors `(batch, hidden)` where `num_labels` is 0.
        Token ids and masks are `(batch, length)`; without a mask nothing is padding.
      variables: `{"params": ...}`.
      names: `{path: HFName}` for every parameter, as in the family's class in transformers (`BertForSequenceClassification`,
        `BertModel` for a model without a head), whatever the file's are.
      config: the model's sizes and parts.
      labels: the checkpoint's names of the labels, in the order of the logits; `LABEL_0`, ... where the head is new.
      new: paths of parameters that the checkpoint lacks, initialised from the seed (a new head).
    """

    apply: Callable[..., Any]
    variables: Any
    names: dict[str, HFName]
    config: BertConfig
    labels: tuple[str, ...]
    new: tuple[str, ...]


def hf_names(config: BertConfig, prefix: str = "bert.") -> dict[str, HFName]:
    """The Hugging Face name of each parameter of the model, by path.

    Args:
      prefix: `"bert."`, which stands for the family's own, or `""` as in checkpoints of the encoder alone. The head has none.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> names = hf_names(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    >>> names["params/encoder/layer_0/mlp/up/kernel"]
    HFName(name='bert.encoder.layer.0.intermediate.dense.weight', axes='i o -> o i', kind='linear', order=0, tied='')
    """
    family = FAMILIES[config.model_type]
    return _names(_abstract(config)[0], family, family.prefix if prefix == "bert." else prefix)


def _names(found: Iterable[str], family: Family, prefix: str) -> dict[str, HFName]:
    return {path: name_of(path, family, prefix) for path in found}


def _abstract(config: BertConfig) -> tuple[dict[str, Any], Any]:
    """Each parameter's shape, by path, and the tree's structure."""
    return paths.flatten(jax.eval_shape(Bert(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))


def shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
    """Where each parameter goes on a mesh with some of the axes `data`, `fsdp` and `model`; see `sharding.model_shardings`.

    `model` cuts the heads and the MLP's inner width.
    """
    columns = ("query", "key", "value", "qkv", "up")
    return model_shardings(mesh, variables, columns=columns, rows=("out", "down"))


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

    Raises:
      MissingError: the directory or one of its files is missing.
      InputError: another architecture, a field that can't be read, a file that is truncated or not what its name says, tensors
        that are missing, unexpected or of the wrong shape, or kernels that can't be quantised so.
      ImportError: qwix is not installed.
    """
    directory = pathlib.Path(directory)
    fields = checkpoint_files.read_json(directory, "config.json")
    tensors = open_tensors(directory, _modern)
    config = _config(directory, fields, tensors.shapes, num_labels)
    family = FAMILIES[config.model_type]
    wanted, treedef = _abstract(config)
    has_prefix = any(name.startswith(family.prefix) for name in tensors.shapes)
    stored = _names(wanted, family, family.prefix if has_prefix else "")
    new = tuple(path for path, name in stored.items() if _is_new(path, name, tensors.shapes, num_labels))
    held = {stored[path]: leaf.shape for path, leaf in wanted.items() if path not in new}
    checkpoint_files.check(tensors, held, functools.partial(_is_spare, family, bool(new) or not config.num_labels))
    reader = Reader(tensors, dtype, sharding, quantize, block)

    def read(path: str, shape: tuple[int, ...]) -> Any:
        if path in new:
            return put(np.asarray(_begin(path, shape, seed), dtype), reader.place(path, shape))
        return reader.read(path, stored[path], shape)

    variables = jax.tree.unflatten(treedef, [read(path, leaf.shape) for path, leaf in wanted.items()])
    names = _names(wanted, family, family.prefix if config.num_labels else "")
    return Loaded(Bert(config, jnp.dtype(dtype)).apply, variables, names, config, _labels(fields, config, new), new)


def with_new_head(model: Loaded, seed: int) -> Loaded:
    """The model with the new head of another seed; a head of the checkpoint's own stays."""
    leaves, treedef = paths.flatten(model.variables)
    for path in model.new:
        old = leaves[path]
        leaves[path] = put(np.asarray(_begin(path, old.shape, seed), old.dtype), old.sharding if on_mesh(old) else None)
    return dataclasses.replace(model, variables=jax.tree.unflatten(treedef, list(leaves.values())))


def _modern(name: str) -> str:
    """Old checkpoints call a norm's weight and bias gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _config(
    directory: pathlib.Path, fields: Mapping[str, Any], tensors: Mapping[str, Any], num_labels: int | None
) -> BertConfig:
    """The family's classifier, or what a sentence model has in place of its head."""
    try:
        config = read_config(fields)
    except InputError as error:
        raise InputError(f"{directory / 'config.json'}: {error}") from None
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


# --- the head ---------------------------------------------------------------------------------------------------------


def _is_last(path: str) -> bool:
    """Whether a parameter is of the layer that gives the logits."""
    return path.rpartition("/")[0] in (f"params/{HEAD}", f"params/{LAST}")


def _is_new(path: str, name: HFName, tensors: Mapping[str, tuple[int, ...]], num_labels: int | None) -> bool:
    """Whether a parameter is of a layer of the head that the checkpoint lacks, or has for another number of labels."""
    found = tensors.get(f"{name.name.rpartition('.')[0]}.weight")
    other = _is_last(path) and found is not None and num_labels not in (None, found[0])
    return path.startswith(f"params/{HEAD}/") and (found is None or other)


def _is_spare(family: Family, without_head: bool, name: str) -> bool:
    """Whether a tensor may be left unread: a buffer, another head, or the checkpoint's own beside a new one."""
    bare = name.removeprefix(family.prefix)
    own = tuple(f"{theirs}." for ours, theirs in family.modules.items() if ours.startswith((HEAD, "pooler")))
    other = bare.startswith(family.spare) or (without_head and bare.startswith(own))
    return other or bare.endswith((".position_ids", ".token_type_ids"))


def _begin(path: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    """What a parameter of a new head begins with."""
    if not path.endswith("/kernel"):
        return jnp.ones(shape) if path.endswith("/scale") else jnp.zeros(shape)
    key = jax.random.key(seed)
    return 0.02 * jax.random.normal(key if _is_last(path) else paths.fold_in(key, path), shape)


def _labels(fields: Mapping[str, Any], config: BertConfig, new: tuple[str, ...]) -> tuple[str, ...]:
    named = {} if any(map(_is_last, new)) else fields.get("id2label") or {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(config.num_labels))

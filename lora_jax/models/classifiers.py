"""What the loaders of classifiers share, of texts and of images: what they give, and heads that a checkpoint lacks."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.names import HFName
from lora_jax.models.weights import Reader, put
from lora_jax.sharding import model_shardings, on_mesh

HEAD = "classifier"
LAST = f"{HEAD}/out_proj"  # the last layer of a head of several


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A classifier read from a directory.

    Args:
      apply: `apply(variables, *inputs)` -> logits `(batch, num_labels)`, or pooled vectors `(batch, hidden)` of an encoder of
        texts where `num_labels` is 0. The inputs are those of `models.bert.Bert`, or of `models.vision.Vision`.
      variables: `{"params": ...}`.
      names: `{path: HFName}` for every parameter, as in the memory of the family's class in transformers, whatever the file's
        are: the classifier's (`BertForSequenceClassification`), or for a model without a head the encoder's (`BertModel`).
      config: the model's sizes and parts.
      labels: the checkpoint's names of the labels, in the order of the logits; `LABEL_0`, ... where the head is new.
      new: paths of parameters that the checkpoint lacks, initialised from the seed (a new head).

    >>> from lora_jax.models import bert
    >>> sizes = dict(vocab_size=8, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> config = bert.BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, **sizes)
    >>> module, ids = bert.Bert(config), jnp.ones((2, 5), jnp.int32)
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), ids)
    >>> model = Loaded(module.apply, variables, bert.hf_names(config), config, ("no", "yes"), ())
    >>> jax.eval_shape(model.apply, model.variables, ids).shape
    (2, 2)
    """

    apply: Callable[..., Any]
    variables: Any
    names: dict[str, HFName]
    config: Any
    labels: tuple[str, ...]
    new: tuple[str, ...]


def shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
    """Where each parameter goes on a mesh with some of the axes `data`, `fsdp` and `model`; see `sharding.model_shardings`.

    `model` cuts the heads and the MLP's inner width.

    Args:
      mesh: a mesh.
      variables: the parameters, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The same tree of `NamedSharding`s.

    Raises:
      InputError: the mesh has another axis, or one that does not divide a parameter's.

    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "model"), devices=jax.devices()[:1])
    >>> variables = {"params": {"mlp": {"up": {"kernel": jnp.ones((4, 16))}}}}
    >>> shardings(mesh, variables)["params"]["mlp"]["up"]["kernel"].spec
    P('fsdp', 'model')
    """
    columns = ("query", "key", "value", "qkv", "up", "gate")
    return model_shardings(mesh, variables, columns=columns, rows=("out", "down"))


def shapes(module: nn.Module, *inputs: Any) -> tuple[dict[str, Any], Any]:
    """Each parameter's shape, by path, and the tree's structure."""
    return paths.flatten(jax.eval_shape(module.init, jax.random.key(0), *inputs))


def new_paths(stored: Mapping[str, HFName], tensors: Mapping[str, tuple[int, ...]], num_labels: int | None) -> tuple[str, ...]:
    """The parameters of layers of the head that a checkpoint lacks, or has for another number of labels."""

    def is_new(path: str, name: HFName) -> bool:
        found = tensors.get(f"{name.name.rpartition('.')[0]}.weight")
        other = _is_last(path) and found is not None and num_labels not in (None, found[0])
        return path.startswith(f"params/{HEAD}/") and (found is None or other)

    return tuple(path for path, name in stored.items() if is_new(path, name))


def read(
    module: Any,
    shapes: tuple[dict[str, Any], Any],
    reader: Reader,
    stored: Mapping[str, HFName],
    names: dict[str, HFName],
    new: tuple[str, ...],
    spare: Callable[[str], bool],
    fields: Mapping[str, Any],
    seed: int,
) -> Loaded:
    """The model with its parameters from the files and, for those that are new, from the seed.

    Args:
      module: the Linen module.
      shapes: those of its parameters, as `shapes` tells them.
      reader: of the files' tensors.
      stored: what the tensors are called there.
      names: what they are called in transformers' memory.
      new: the paths that are not read.
      spare: whether a tensor may be left unread.
      fields: of `config.json`, for the names of the labels.
      seed: of what is new.

    Raises:
      InputError: tensors are missing, unexpected, or of another shape.
    """
    wanted, treedef = shapes
    held = {stored[path]: leaf.shape for path, leaf in wanted.items() if path not in new}
    checkpoint_files.check(reader.tensors, held, spare)

    def one(path: str, shape: tuple[int, ...]) -> Any:
        if path not in new:
            return reader.read(path, stored[path], shape)
        begun = _begin(path, shape, module.config.initializer_range, seed)
        return put(np.asarray(begun, reader.dtype), reader.place(path, shape))

    variables = jax.tree.unflatten(treedef, [one(path, leaf.shape) for path, leaf in wanted.items()])
    named = {} if any(map(_is_last, new)) else fields.get("id2label") or {}
    labels = tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(module.config.num_labels))
    return Loaded(module.apply, variables, names, module.config, labels, new)


def with_new_head(model: Loaded, seed: int) -> Loaded:
    """The model with the new head of another seed; a head of the checkpoint's own stays.

    Args:
      model: what `load` returned.
      seed: the seed of the head.

    Raises:
      InputError: two leaves of the tree have one path.

    >>> from lora_jax.models import bert
    >>> sizes = dict(vocab_size=8, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> config = bert.BertConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=2, **sizes)
    >>> module, head = bert.Bert(config), "params/classifier/kernel"
    >>> variables = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((2, 5), jnp.int32))
    >>> model = Loaded(module.apply, variables, bert.hf_names(config), config, ("no", "yes"), (head,))
    >>> one, other = (paths.flatten(with_new_head(model, seed).variables)[0][head] for seed in (0, 1))
    >>> bool((one != other).any())
    True
    """
    leaves, treedef = paths.flatten(model.variables)
    for path in model.new:
        old = leaves[path]
        begun = _begin(path, old.shape, model.config.initializer_range, seed)
        leaves[path] = put(np.asarray(begun, old.dtype), old.sharding if on_mesh(old) else None)
    return dataclasses.replace(model, variables=jax.tree.unflatten(treedef, list(leaves.values())))


def _is_last(path: str) -> bool:
    """Whether a parameter is of the layer that gives the logits."""
    return path.rpartition("/")[0] in (f"params/{HEAD}", f"params/{LAST}")


def _begin(path: str, shape: tuple[int, ...], deviation: float, seed: int) -> jax.Array:
    """What a parameter of a new head begins with."""
    if not path.endswith("/kernel"):
        return jnp.ones(shape) if path.endswith("/scale") else jnp.zeros(shape)
    key = jax.random.key(seed)
    return deviation * jax.random.normal(key if _is_last(path) else paths.fold_in(key, path), shape)

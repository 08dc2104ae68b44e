"""BERT encoders with a classification head, as a Linen model, and a loader for Hugging Face directories."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.core.errors import InputError
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.names import HFName
from lora_jax.models.weights import Reader, Sharding, put
from lora_jax.sharding import model_shardings, on_mesh

Pooling = Literal["mean", "cls", "pooler"]
FAMILY = ("bert",)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes of a BERT classifier.

    Args:
      pooling: what the head reads: the `"mean"` of the tokens that are not padding, the first token (`"cls"`), or
        BERT's own `"pooler"`, a dense layer with tanh on the first token.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    num_labels: int = 2
    pooling: Pooling = "pooler"

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            raise InputError(f"config.json: the heads must divide the hidden size, but it has {sizes}")
        if self.hidden_act not in _ACTIVATIONS:
            known = ", ".join(sorted(_ACTIVATIONS))
            raise InputError(f"config.json: hidden_act {self.hidden_act!r} is not one of {known}")


class BertAttention(nn.Module):
    """Multi-head self-attention, its output projection, the residual and the norm: `(batch, length, hidden)`."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x, bias):
        config, dense = self.config, functools.partial(nn.Dense, self.config.hidden_size, param_dtype=self.param_dtype)
        heads = config.num_attention_heads
        by_head = (*x.shape[:-1], heads, config.hidden_size // heads)
        query, key, value = (dense(name=name)(x).reshape(by_head) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores / math.sqrt(query.shape[-1]) + bias).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        return _norm(self, "norm")(x + dense(name="out")(mixed))


class BertMLP(nn.Module):
    """The two dense layers after attention, the residual and the norm: `(batch, length, hidden)`."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        config, dense = self.config, functools.partial(nn.Dense, param_dtype=self.param_dtype)
        hidden = _ACTIVATIONS[config.hidden_act](dense(config.intermediate_size, name="up")(x))
        return _norm(self, "norm")(x + dense(config.hidden_size, name="down")(hidden))


class BertLayer(nn.Module):
    """One encoder layer."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x, bias):
        x = BertAttention(self.config, self.param_dtype, name="attention")(x, bias)
        return BertMLP(self.config, self.param_dtype, name="mlp")(x)


class BertEncoder(nn.Module):
    """All encoder layers."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x, bias):
        for i in range(self.config.num_hidden_layers):
            x = BertLayer(self.config, self.param_dtype, name=f"layer_{i}")(x, bias)
        return x


class BertEmbeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    config: BertConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, input_ids, token_type_ids):
        config = self.config
        embed = functools.partial(nn.Embed, features=config.hidden_size, param_dtype=self.param_dtype)
        x = embed(config.vocab_size, name="word")(input_ids)
        x = x + embed(config.max_position_embeddings, name="position")(jnp.arange(input_ids.shape[-1])[None])
        x = x + embed(config.type_vocab_size, name="token_type")(token_type_ids)
        return _norm(self, "norm")(x)


class Bert(nn.Module):
    """BERT with a classification head: `(batch, length)` token ids -> `(batch, num_labels)` logits."""

    config: BertConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, token_type_ids=None):
        config = self.config
        if input_ids.shape[-1] > config.max_position_embeddings:
            positions = config.max_position_embeddings
            raise InputError(
                f"input_ids has the shape {input_ids.shape}, but the model has {positions} positions: cut the texts"
            )
        mask = jnp.ones(input_ids.shape, bool) if attention_mask is None else jnp.asarray(attention_mask, bool)
        types = jnp.zeros(input_ids.shape, jnp.int32) if token_type_ids is None else token_type_ids
        bias = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        x = BertEmbeddings(config, self.param_dtype, name="embeddings")(input_ids, types)
        x = BertEncoder(config, self.param_dtype, name="encoder")(x, bias)
        if config.pooling == "mean":
            weights = mask.astype(x.dtype)
            pooled = jnp.einsum("bl,blh->bh", weights, x) / jnp.maximum(weights.sum(-1, keepdims=True), 1)
        else:
            pooled = x[:, 0]
        if config.pooling == "pooler":
            pooled = jnp.tanh(nn.Dense(config.hidden_size, param_dtype=self.param_dtype, name="pooler")(pooled))
        return nn.Dense(config.num_labels, param_dtype=self.param_dtype, name="classifier")(pooled)


def _norm(module: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=module.config.layer_norm_eps, param_dtype=module.param_dtype, name=name)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model read from a directory.

    Args:
      apply: `apply(variables, input_ids=, attention_mask=None, token_type_ids=None)` -> logits `(batch, num_labels)`.
        Token ids and masks are `(batch, length)`; without a mask nothing is padding.
      variables: `{"params": ...}`.
      names: `{path: HFName}` for every parameter, as in transformers' `BertForSequenceClassification`, whatever the file's are.
      config: the model's sizes.
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
      prefix: `"bert."`, or `""` as in checkpoints of the encoder alone. The head has no prefix.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, max_position_embeddings=8, type_vocab_size=2)
    >>> names = hf_names(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    >>> names["params/encoder/layer_0/mlp/up/kernel"]
    HFName(name='bert.encoder.layer.0.intermediate.dense.weight', axes='i o -> o i', kind='linear', order=0, tied='')
    """
    table = {f"embeddings/{name}/embedding": HFName(f"{prefix}embeddings.{name}_embeddings.weight", kind="embedding")
             for name in ("word", "position", "token_type")}  # fmt: skip
    dense = {"pooler": f"{prefix}pooler.dense"} if config.pooling == "pooler" else {}
    norms = {"embeddings/norm": f"{prefix}embeddings.LayerNorm"}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"encoder/layer_{i}", f"{prefix}encoder.layer.{i}"
        dense |= {f"{ours}/attention/{name}": f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")}
        dense[f"{ours}/attention/out"] = f"{theirs}.attention.output.dense"
        dense[f"{ours}/mlp/up"] = f"{theirs}.intermediate.dense"
        dense[f"{ours}/mlp/down"] = f"{theirs}.output.dense"
        norms[f"{ours}/attention/norm"] = f"{theirs}.attention.output.LayerNorm"
        norms[f"{ours}/mlp/norm"] = f"{theirs}.output.LayerNorm"
    for ours, theirs in {**dense, "classifier": "classifier"}.items():
        table[f"{ours}/kernel"] = HFName(f"{theirs}.weight", "i o -> o i")
        table[f"{ours}/bias"] = HFName(f"{theirs}.bias")
    for ours, theirs in norms.items():
        table[f"{ours}/scale"] = HFName(f"{theirs}.weight")
        table[f"{ours}/bias"] = HFName(f"{theirs}.bias")
    return {f"params/{path}": name for path, name in table.items()}


def shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
    """Where each parameter goes on a mesh with some of the axes `data`, `fsdp` and `model`; see `sharding.model_shardings`.

    `model` cuts the heads and the MLP's inner width.
    """
    return model_shardings(mesh, variables, columns=("query", "key", "value", "up"), rows=("out", "down"))


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

    The head reads BERT's pooler, or what a sentence model (a directory with a `modules.json`) pools itself. A
    checkpoint without a head of `num_labels` outputs gets a new one, initialised from the seed; `Loaded.new` says so.

    Args:
      directory: the model's directory.
      dtype: the dtype of the parameters.
      num_labels: the number of classes; `None`: as many as the checkpoint says.
      seed: the seed of a new head.
      sharding: where the parameters go: one sharding for all, or a function of (path, shape).
      quantize: `"nf4"`, `"int4"`, `"int8"` or `"fp8"`: the kernels of the layers are quantised as they are read, as
        `lora_jax.quantize` does; embeddings, pooler, head, norms and biases are not. Such a model is for `lora(loaded.apply)`.
      block: how many values share a scale (64 by default); only with `quantize`.

    Raises:
      MissingError: the directory or one of the two files is missing.
      InputError: another architecture, a file that is truncated or not what its name says, tensors that are missing,
        unexpected or of the wrong shape, or kernels that can't be quantised so.
      ImportError: qwix is not installed.
    """
    directory = pathlib.Path(directory)
    fields = checkpoint_files.read_json(directory, "config.json")
    tensors = checkpoint_files.SafeTensors(directory, _modern)
    has_head = "classifier.weight" in tensors.shapes
    config = _config(directory, fields, _pooling(directory, tensors.shapes, has_head), num_labels)
    replaced = has_head and num_labels not in (None, tensors.shapes["classifier.weight"][0])
    has_head = has_head and not replaced
    model = Bert(config, jnp.dtype(dtype))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    wanted, treedef = paths.flatten(shapes)
    stored = hf_names(config, "bert." if any(name.startswith("bert.") for name in tensors.shapes) else "")
    new = () if has_head else tuple(path for path in stored if path.startswith("params/classifier/"))

    def spare(name: str) -> bool:
        return _is_spare(name, config.pooling) or (replaced and name.startswith("classifier."))

    checkpoint_files.check(tensors, {stored[path]: leaf.shape for path, leaf in wanted.items() if path not in new}, spare)
    head = _new_head(config, seed)
    reader = Reader(tensors, dtype, sharding, quantize, block)

    def read(path: str, shape: tuple[int, ...]) -> Any:
        if path in new:
            return put(np.asarray(head[path], dtype), reader.place(path, shape))
        return reader.read(path, stored[path], shape)

    leaves = [read(path, leaf.shape) for path, leaf in wanted.items()]
    variables = jax.tree.unflatten(treedef, leaves)
    return Loaded(model.apply, variables, hf_names(config), config, _labels(fields, config.num_labels, has_head), new)


def with_new_head(model: Loaded, seed: int) -> Loaded:
    """The model with the new head of another seed; a head of the checkpoint's own stays."""
    leaves, treedef = paths.flatten(model.variables)
    head = _new_head(model.config, seed)
    for path in model.new:
        old = leaves[path]
        leaves[path] = put(np.asarray(head[path], old.dtype), old.sharding if on_mesh(old) else None)
    return dataclasses.replace(model, variables=jax.tree.unflatten(treedef, list(leaves.values())))


def _modern(name: str) -> str:
    """Old checkpoints call a norm's weight and bias gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _config(directory: pathlib.Path, fields: Mapping[str, Any], pooling: Pooling, num_labels: int | None) -> BertConfig:
    file = directory / "config.json"
    if fields.get("model_type") != "bert":
        raise InputError(f"{file}: the model_type is {fields.get('model_type')!r}; this loader reads 'bert' only")
    if fields.get("position_embedding_type", "absolute") != "absolute" or fields.get("is_decoder", False):
        raise InputError(f"{file}: only encoders with absolute position embeddings can be read")
    sizes = [f.name for f in dataclasses.fields(BertConfig) if f.default is dataclasses.MISSING]
    missing = [name for name in sizes if not isinstance(fields.get(name), int)]
    if missing:
        raise InputError(f"{file} lacks a whole number for: {', '.join(missing)}")
    kept = {f.name: fields[f.name] for f in dataclasses.fields(BertConfig) if f.name in fields}
    if num_labels is None:
        num_labels = len(fields["id2label"]) if "id2label" in fields else fields.get("num_labels", 2)
    return BertConfig(**{**kept, "pooling": pooling, "num_labels": num_labels})


def _pooling(directory: pathlib.Path, tensors: Mapping[str, Any], has_head: bool) -> Pooling:
    if has_head or not (directory / "modules.json").exists():
        return "pooler" if any(name.endswith("pooler.dense.weight") for name in tensors) else "mean"
    modes = checkpoint_files.read_json(directory, "1_Pooling/config.json")
    chosen = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on is True]
    readable: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) == 1 and chosen[0] in readable:
        return readable[chosen[0]]
    raise InputError(f"{directory / '1_Pooling/config.json'}: mean or first-token pooling can be read, not {chosen}")


def _is_spare(name: str, pooling: Pooling) -> bool:
    """Buffers, pretraining heads, and a pooler that a sentence model does not use."""
    unused_pooler = pooling != "pooler" and "pooler.dense" in name
    return name.endswith(".position_ids") or name.startswith("cls.") or unused_pooler


def _new_head(config: BertConfig, seed: int) -> dict[str, jax.Array]:
    kernel = 0.02 * jax.random.normal(jax.random.key(seed), (config.hidden_size, config.num_labels))
    return {"params/classifier/kernel": kernel, "params/classifier/bias": jnp.zeros(config.num_labels)}


def _labels(fields: Mapping[str, Any], num_labels: int, has_head: bool) -> tuple[str, ...]:
    named = fields.get("id2label", {}) if has_head else {}
    return tuple(str(named.get(str(i), f"LABEL_{i}")) for i in range(num_labels))

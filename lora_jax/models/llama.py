"""Decoders (Llama, Qwen, Gemma, Phi, GPT-2, mixtures of experts, ...) from Hugging Face directories and GGUF files.

`load` reads a model and its weights, `init` and `abstract` make one of a configuration, with random weights or none. What they
give is a `Loaded`, whose `apply` and `losses` are functions for `lora`; `generate` and `stream` continue texts.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.core.errors import InputError, within
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.huggingface.gguf_reader import GgufFile
from lora_jax.huggingface.names import HFName
from lora_jax.models import gguf_config, gguf_files
from lora_jax.models.decoder import COLUMNS, ROWS, Cache, init_cache, shaped_logits
from lora_jax.models.decoder import Decoder as Llama
from lora_jax.models.decoder_config import DecoderConfig as LlamaConfig
from lora_jax.models.decoder_parameters import parameters, stored
from lora_jax.models.experts import balance_loss
from lora_jax.models.families import FAMILIES, FAMILY, hf_config, read_config, rename, token_ids
from lora_jax.models.generation import Generated, RowAdapters, generate, stream
from lora_jax.models.stacking import Remat, check_remat
from lora_jax.models.weights import Reader, Sharding, parts
from lora_jax.sharding import batch_sharding, model_shardings
from lora_jax.training.losses import LOGITS_AT_ONCE, token_cross_entropy

__all__ = [
    "FAMILY",
    "Cache",
    "Generated",
    "Llama",
    "LlamaConfig",
    "Loaded",
    "RowAdapters",
    "abstract",
    "file_names",
    "generate",
    "gguf_fields",
    "hf_config",
    "init",
    "load",
    "parameters",
    "shardings",
    "sizes",
    "stream",
]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that `jax.jit(loaded.apply)` works
class Loaded:
    """A model with its weights.

    Args:
      model: the Linen module.
      variables: `{"params": ...}`.
      names: the Hugging Face name of each parameter, by path.
      config: its sizes.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> tiny, ids, labels = abstract(config), jnp.array([[1, 2, 3]]), jnp.array([[2, 3, 4]])
    >>> def measure(variables):
    ...     losses, hits = tiny.losses_and_hits(variables, ids, labels)
    ...     logits = tiny.head(variables, tiny.apply(variables, ids, hidden=True))
    ...     more, cache = tiny.apply_cached(variables, ids, tiny.init_cache(batch=1, max_length=8))
    ...     return tiny.losses(variables, ids, labels), hits, logits, more
    >>> [found.shape for found in jax.eval_shape(measure, tiny.variables)]
    [(1, 3), (1, 3), (1, 3, 8), (1, 3, 8)]
    >>> more = {name: jnp.ones((10, 4)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    >>> tiny.with_vocabulary(more).config.vocab_size
    10
    >>> tiny.on_mesh(jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])).model.activations.spec
    P('fsdp',)
    """

    model: Llama
    variables: Any
    names: dict[str, HFName]
    config: LlamaConfig

    def apply(
        self,
        variables: Any,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        segment_ids: Any = None,
        positions: Any = None,
        last_only: bool = False,
        hidden: bool = False,
    ) -> jax.Array:
        """The logits `(batch, length, vocab)` of token ids `(batch, length)`.

        Args:
          variables: the parameters.
          input_ids: `(batch, length)`.
          attention_mask: `(batch, length)`: 0 for padding, on the left or the right.
          segment_ids: `(batch, length)`: tokens see only tokens of the same id, so that packed documents stay apart.
          positions: `(batch, length)`; without them they count what is not padding, and start again with each segment.
          last_only: logits for the last token of each row only, `(batch, 1, vocab)`.
          hidden: in place of the logits, what `head` makes them of, `(batch, length, hidden)`.
        """
        options = {"segment_ids": segment_ids, "positions": positions, "last_only": last_only, "hidden": hidden}
        return self.model.apply(variables, input_ids, attention_mask, **options)  # type: ignore[return-value]

    def head(self, variables: Any, hidden: jax.Array) -> jax.Array:
        """The logits `(*batch, vocab)` of hidden states.

        Args:
          variables: the parameters.
          hidden: what `apply(..., hidden=True)` gives, or some tokens of it, `(*batch, hidden)`.
        """
        params = variables["params"]
        tied = self.config.tie_word_embeddings
        kernel = params["embed_tokens"]["embedding"].T if tied else params["lm_head"]["kernel"]
        return shaped_logits(self.config, hidden @ kernel)

    def losses(self, variables: Any, input_ids: Any, labels: Any, **options: Any) -> jax.Array:
        """The cross-entropy of each label `(batch, length)`, never with the logits of all tokens at once.

        For training: `lora(loaded.losses)(params, input_ids, labels)`, with the head adapted or quantised or neither.

        Args:
          variables: the parameters.
          input_ids: `(batch, length)`.
          labels: `(batch, length)`: for each token the one that should follow.
          options: of `apply`, but for `last_only` and `hidden`.
        """
        return self._losses(variables, self.apply(variables, input_ids, hidden=True, **options), labels)

    def losses_and_hits(self, variables: Any, input_ids: Any, labels: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        """The `losses`, and 1 where a label is the most likely token and 0 elsewhere, `(batch, length)` each.

        Args:
          variables: the parameters.
          input_ids: `(batch, length)`.
          labels: `(batch, length)`: for each token the one that should follow.
          options: of `apply`, but for `last_only` and `hidden`.
        """
        hidden = self.apply(variables, input_ids, hidden=True, **options)
        rows, at_once = hidden.reshape(-1, hidden.shape[-1]), max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        whole = variables if self.model.activations is None else self._gather_head(variables)
        found = jax.lax.map(lambda row: self.head(whole, row).argmax(-1), rows, batch_size=min(at_once, len(rows)))
        return self._losses(variables, hidden, labels), (found.reshape(labels.shape) == labels).astype(jnp.float32)

    def balanced_losses(
        self, variables: Any, input_ids: Any, labels: Any, *, counted: Any = None, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The `losses` of a mixture of experts, and how unevenly its experts are used: `experts.balance_loss`.

        In training its multiple is added to the mean loss, `config.experts.balance` times in the model's own. The first is
        `(batch, length)`, the second a scalar.

        Args:
          variables: the parameters.
          input_ids: `(batch, length)`.
          labels: `(batch, length)`: for each token the one that should follow.
          counted: `(batch, length)`: the tokens whose experts count; `None`: all but padding (`attention_mask`).
          options: of `apply`, but for `last_only` and `hidden`.

        Raises:
          InputError: the model has no experts.

        >>> from lora_jax.models.experts import Experts
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
        >>> heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=2)
        >>> experts = Experts(count=4, chosen=2, width=3, layers=(0,))
        >>> model = abstract(LlamaConfig(model_type="qwen3_moe", experts=experts, **heads, **sizes))
        >>> ids, labels = jnp.array([[1, 2, 3]]), jnp.array([[2, 3, 4]])
        >>> [found.shape for found in jax.eval_shape(model.balanced_losses, model.variables, ids, labels)]
        [(1, 3), ()]
        """
        if self.config.experts is None:
            raise InputError(f"a {self.config.model_type!r} without experts has no balance loss: take losses")
        found: Any = self.model.apply(variables, input_ids, hidden=True, routing=True, **options)
        hidden, routing = found
        counted = options.get("attention_mask") if counted is None else counted
        uneven = balance_loss(routing, self.config.experts.chosen, counted)
        return self._losses(variables, hidden, labels), uneven

    def _losses(self, variables: Any, hidden: jax.Array, labels: Any) -> jax.Array:
        rows = self.model.activations
        if rows is None:
            return token_cross_entropy(functools.partial(self.head, variables), hidden, labels)
        parts = labels.shape[0] // rows.shard_shape(labels.shape)[0]
        head = functools.partial(self.head, self._gather_head(variables))
        return token_cross_entropy(head, hidden, labels, parts=parts)

    def _gather_head(self, variables: Any) -> Any:
        """The parameters with the head whole along fsdp: or it would be gathered for each chunk of tokens."""
        mesh, tied = self.model.activations.mesh, self.config.tie_word_embeddings
        module, name = ("embed_tokens", "embedding") if tied else ("lm_head", "kernel")
        vocabulary = "model" if "model" in mesh.shape else None
        spec = jax.P(vocabulary) if tied else jax.P(None, vocabulary)
        params = variables["params"]
        head = jax.lax.with_sharding_constraint(params[module][name], jax.sharding.NamedSharding(mesh, spec))
        return {**variables, "params": {**params, module: {**params[module], name: head}}}

    def on_mesh(self, mesh: jax.sharding.Mesh) -> "Loaded":
        """The same for batches that `sharding.batch_sharding(mesh)` cuts: each device keeps its rows in all layers.

        Without it the compiler may cut the hidden states as an fsdp axis cuts the embedding, and then moves activations, not
        kernels. Quantised kernels are gathered as what they are made of, and made dense where they are used.

        Args:
          mesh: a mesh with some of the axes `data`, `fsdp` and `model`.

        Raises:
          InputError: two leaves of the parameters have one path.
        """
        some = any(map(paths.is_quantized, paths.flatten(self.variables)[0].values()))
        model = self.model.clone(activations=batch_sharding(mesh), gather=mesh if some else None)
        return dataclasses.replace(self, model=model)

    def with_vocabulary(self, tensors: Mapping[str, Any]) -> "Loaded":
        """The same with an embedding and a head of another number of tokens.

        Args:
          tensors: `(vocab, hidden)` by their names in the family's files, which in Llama's are `model.embed_tokens.weight` and,
            unless the two are tied, `lm_head.weight`.

        Raises:
          InputError: one is missing, or of a shape that does not fit.
        """
        config = dataclasses.replace(self.config, vocab_size=max(map(len, tensors.values())))
        params = dict(self.variables["params"])
        for path, (shape, name) in parameters(config).items():
            _, module, leaf = path.split("/", 2)
            if module in ("embed_tokens", "lm_head"):
                tensor = tensors.get(name.name)
                wanted = name.shape(shape)
                if tensor is None or tensor.shape != wanted:
                    found = "none" if tensor is None else f"one of the shape {tensor.shape}"
                    raise InputError(f"{name.name} must be of the shape {wanted}, but there is {found}")
                params[module] = {leaf: jnp.asarray(name.restore(tensor, shape), self.model.param_dtype)}
        variables = {**self.variables, "params": params}
        return dataclasses.replace(self, model=self.model.clone(config=config), variables=variables, config=config)

    def apply_cached(
        self, variables: Any, input_ids: Any, cache: Cache, attention_mask: Any = None, *, last_only: bool = False
    ) -> tuple[jax.Array, Cache]:
        """The logits `(batch, length, vocab)` of tokens that follow those of a cache, and the cache with them added.

        Args:
          variables: the parameters.
          input_ids: `(batch, length)`.
          cache: from `init_cache`, or a call before; once it is full, the logits are NaN.
          attention_mask: `(batch, length)`: 0 for padding.
          last_only: logits for the last token of each row only.
        """
        return self.model.apply(variables, input_ids, attention_mask, cache=cache, last_only=last_only)  # type: ignore[return-value]

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache.

        Args:
          batch: how many rows.
          max_length: the most tokens of each, padding included.
        """
        return init_cache(self.model, batch, max_length)


def shardings(mesh: jax.sharding.Mesh, variables: Any) -> Any:
    """Where each parameter goes on a mesh with some of the axes `data`, `fsdp` and `model`; see `sharding.model_shardings`.

    `model` cuts the heads, the MLP's inner width and the vocabulary.

    Args:
      mesh: a mesh.
      variables: the parameters, arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The same tree of `NamedSharding`s.

    Raises:
      InputError: the mesh has another axis, or one that does not divide a parameter's.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> mesh = jax.make_mesh((1, 1), ("fsdp", "model"), devices=jax.devices()[:1])
    >>> shardings(mesh, abstract(config).variables)["params"]["lm_head"]["kernel"].spec
    P('fsdp', 'model')
    """
    return model_shardings(mesh, variables, columns=COLUMNS, rows=ROWS)


def sizes(source: str | pathlib.Path) -> LlamaConfig:
    """The sizes of a Hugging Face directory's or GGUF file's model, without its weights.

    Args:
      source: the directory, or a file that ends in `.gguf`.

    Raises:
      MissingError: the source, or its `config.json`, is missing.
      InputError: another architecture, or a file that can't be read.

    >>> import json, tempfile
    >>> tiny = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **tiny)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = (pathlib.Path(directory) / "config.json").write_text(json.dumps(hf_config(config)))
    ...     sizes(directory).hidden_size
    4
    """
    source = pathlib.Path(source)
    return gguf_files.read_config(GgufFile(source)) if source.suffix == ".gguf" else _read_directory(source)


def load(
    source: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: Remat | None = None,
    attention_block: int | None = None,
    tie: bool | None = None,
    sharding: Sharding = None,
    quantize: str | None = None,
    block: int | None = None,
    dense_experts: bool = False,
) -> Loaded:
    """Read a Hugging Face directory (`config.json`, and `model.safetensors` or an index of several) or a GGUF file.

    Each parameter is read, cast, quantised and put on its devices before the next, so that no second copy of the model is ever
    held, nor a dense one of a quantised model; stacked kernels layer by layer.

    The ids that end a text are those of `generation_config.json` or, where it names none, of `config.json`.

    Args:
      source: the directory, or a file that ends in `.gguf`.
      dtype: the dtype of the parameters, and of the computation but for norms and attention weights.
      scan_layers: stack the layers' parameters along a leading axis and scan over them: compiles once for all layers.
      remat: what the backward pass computes again instead of keeping it: `None`: nothing; `"products"`: all but the outputs of
        products with weights; `"full"`: all of a layer but its input.
      attention_block: compute the attention of at most so many queries at a time, and its scores again in the backward pass:
        no scores of all tokens are held then.
      tie: whether the head is the embedding; `None`: as in the checkpoint. `False` gives a tied checkpoint a head of its own.
      sharding: where the parameters go: one sharding for all, or a function of (path, shape).
      quantize: `"nf4"`, `"int4"`, `"int8"` or `"fp8"`: the kernels of the layers are quantised, as `lora_jax.quantize` does;
        embedding, head, norms and biases are not. Such a model is for `lora(loaded.apply)`.
      block: how many values share a scale (64 by default); only with `quantize`.
      dense_experts: let every expert see every token, which pays off where a layer has few more than a token goes through.

    Raises:
      MissingError: the source, or one of its files, is missing.
      InputError: another architecture, a file that is truncated or not what its name says, tensors that are missing,
        unexpected or of the wrong shape, a head that can't be tied, a dtype that is no float, or kernels that can't be
        quantised so.
      ImportError: a package for GGUF files or quantised kernels is missing.

    >>> import json, tempfile, safetensors.numpy
    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = (pathlib.Path(directory) / "config.json").write_text(json.dumps(hf_config(config)))
    ...     tensors = {name.name: name.export(np.ones(shape)) for shape, name in parameters(config).values()}
    ...     safetensors.numpy.save_file(tensors, pathlib.Path(directory) / "model.safetensors")
    ...     loaded = load(directory, quantize="int8", block=2)
    >>> loaded.variables["params"]["layer_0"]["mlp"]["up_proj"]["kernel"].qvalue.dtype.name
    'int8'
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be a float dtype, not {jnp.dtype(dtype).name}")
    check_remat(remat)
    source = pathlib.Path(source)
    config = sizes(source)
    tensors: Any = GgufFile(source) if source.suffix == ".gguf" else open_tensors(source, rename(config.model_type))
    _check_layers(tensors, config)
    tied = config.tie_word_embeddings
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    embedding, head = (parameters(untied)[f"params/{path}"][1] for path in ("embed_tokens/embedding", "lm_head/kernel"))
    if tied or tie:
        _check_tied(tensors, tied, head.name, embedding.name)
    config = dataclasses.replace(config, tie_word_embeddings=tied if tie is None else tie)
    table = parameters(config, scan_layers)
    names = {path: name for path, (_, name) in table.items()}
    one_by_one = stored(config, scan_layers)
    if not any(name in tensors.shapes for path in one_by_one for name in names[path].tensors(table[path][0]).values()):
        names |= one_by_one
    if tied and not config.tie_word_embeddings:
        names["params/lm_head/kernel"] = HFName(embedding.name, head.axes)
    wanted = {names[path]: shape for path, (shape, _) in table.items()}
    checkpoint_files.check(tensors, wanted, functools.partial(_is_spare, head.name, FAMILIES[config.model_type].spare))
    reader = Reader(tensors, jnp.dtype(dtype), sharding, quantize, block)
    leaves = {path: reader.read(path, names[path], shape) for path, (shape, _) in table.items()}
    return _loaded(config, dtype, scan_layers, remat, attention_block, dense_experts, leaves)


def file_names(model: Loaded) -> dict[str, HFName]:
    """What the parameters are called in files, where transformers joins tensors of experts in memory.

    Args:
      model: what `load` returned.

    Returns:
      `{path: HFName}`; the same as `model.names` of a model without experts.

    Raises:
      InputError: layers that are not alike can't be stacked.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> model = abstract(config)
    >>> file_names(model) == model.names
    True
    """
    return model.names | stored(model.config, model.model.scan_layers)


def gguf_fields(model: Loaded) -> dict[str, Any]:
    """What `lora_jax.peft.save_gguf` wants to know of the base, by its arguments: `names`, `architecture` and `heads`.

    Args:
      model: what `load` returned, from a directory or a `.gguf` file.

    Raises:
      InputError: the model is of a family that can't be written for llama.cpp.

    >>> import tempfile, lora_jax as lj
    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> model, lora = init(config, jax.random.key(0)), lj.LoraConfig(rank=2, targets="attention")
    >>> adapters = lj.init(jax.random.key(1), lora, model.apply, model.variables, jnp.ones((1, 4), jnp.int32))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     lj.peft.save_gguf(f"{directory}/adapter.gguf", adapters, **lj.models.llama.gguf_fields(model))
    """
    heads = model.config.num_attention_heads, model.config.num_key_value_heads
    return {"names": file_names(model), "architecture": gguf_config.architecture(model.config), "heads": heads}


def init(
    config: LlamaConfig,
    key: jax.Array,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: Remat | None = None,
    attention_block: int | None = None,
    dense_experts: bool = False,
) -> Loaded:
    """A model with random weights: kernels and embeddings from a normal distribution of deviation 0.02.

    Args:
      config: its sizes and parts.
      key: a PRNG key.
      dtype: as in `load`, like all that follow.
      scan_layers: stack the layers' parameters and scan over them.
      remat: what the backward pass computes again.
      attention_block: compute the attention of at most so many queries at a time.
      dense_experts: let every expert see every token.

    Raises:
      InputError: an option is unknown, or layers that are not alike are to be stacked.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=3, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> tiny = init(config, jax.random.key(0))
    >>> jax.jit(tiny.apply)(tiny.variables, jnp.ones((2, 5), jnp.int32)).shape
    (2, 5, 8)
    """

    check_remat(remat)

    def leaf(path: str, shape: tuple[int, ...]) -> jax.Array:
        if path.endswith("/scale"):
            return jnp.ones(shape, dtype)
        if path.endswith("/bias"):
            return jnp.zeros(shape, dtype)
        return (0.02 * jax.random.normal(paths.fold_in(key, path), shape)).astype(dtype)

    leaves = {path: leaf(path, shape) for path, (shape, _) in parameters(config, scan_layers).items()}
    return _loaded(config, dtype, scan_layers, remat, attention_block, dense_experts, leaves)


def abstract(
    config: LlamaConfig,
    *,
    dtype: Any = jnp.float32,
    scan_layers: bool = False,
    remat: Remat | None = None,
    attention_block: int | None = None,
    dense_experts: bool = False,
) -> Loaded:
    """A model without weights, with a `jax.ShapeDtypeStruct` for each parameter: to trace and to compile.

    Args:
      config: its sizes and parts.
      dtype: as in `load`, like all that follow.
      scan_layers: stack the layers' parameters and scan over them.
      remat: what the backward pass computes again.
      attention_block: compute the attention of at most so many queries at a time.
      dense_experts: let every expert see every token.

    Raises:
      InputError: an option is unknown, or layers that are not alike are to be stacked.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> model = abstract(config, dtype="bfloat16")
    >>> jax.eval_shape(model.apply, model.variables, jnp.ones((2, 5), jnp.int32))
    ShapeDtypeStruct(shape=(2, 5, 8), dtype=bfloat16)
    """
    check_remat(remat)
    leaves = {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, _) in parameters(config, scan_layers).items()}
    return _loaded(config, dtype, scan_layers, remat, attention_block, dense_experts, leaves)


def _loaded(
    config: LlamaConfig,
    dtype: Any,
    scan_layers: bool,
    remat: Remat | None,
    attention_block: int | None,
    dense_experts: bool,
    leaves: dict[str, Any],
) -> Loaded:
    variables: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = variables
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    names = {path: name for path, (_, name) in parameters(config, scan_layers).items()}
    model = Llama(config, jnp.dtype(dtype), scan_layers, remat, attention_block, dense_experts=dense_experts)
    return Loaded(model, variables, names, config)


def _read_directory(directory: pathlib.Path) -> LlamaConfig:
    config, generation = _parsed(directory / "config.json", read_config), directory / "generation_config.json"
    ends = _parsed(generation, lambda fields: token_ids(fields, "eos_token_id")) if generation.is_file() else ()
    return dataclasses.replace(config, eos_token_ids=ends or config.eos_token_ids)


def _parsed(file: pathlib.Path, parse: Callable[[Mapping[str, Any]], Any]) -> Any:
    fields = checkpoint_files.read_json(file.parent, file.name)
    with within(file):
        return parse(fields)


def _check_layers(tensors: Any, config: LlamaConfig) -> None:
    """As many layers as the configuration says, before anything is made for each."""
    one = parameters(dataclasses.replace(config, num_hidden_layers=1))
    template = one["params/layer_0/self_attn/o_proj/kernel"][1].name
    before, after = template.split(".0.", 1)
    count = sum(name.startswith(f"{before}.") and name.endswith(f".{after}") for name in tensors.shapes)
    if count != config.num_hidden_layers:
        bare = one["params/embed_tokens/embedding"][1].name.partition(".")
        headless = f": it holds the decoder alone (no `{bare[0]}.` in its names); save the model with its head"
        reason = headless if bare[2] in tensors.shapes else ""
        raise InputError(f"{tensors.file} has {count} layers; the configuration asks for {config.num_hidden_layers}{reason}")


def _check_tied(tensors: Any, tied: bool, head: str, embedding: str) -> None:
    """A head that is stored although it is tied, or is to be tied, must be the embedding."""
    if head not in tensors.shapes or embedding not in tensors.shapes:
        return
    same = tensors.shapes[head] == tensors.shapes[embedding]
    if same and all(np.array_equal(a, b) for (_, a), (_, b) in zip(parts(tensors, head), parts(tensors, embedding))):
        return
    reason = "tie_word_embeddings is true" if tied else "tie=True asks for one matrix"
    advice = "correct the configuration" if tied else "leave tie out"
    raise InputError(f"{tensors.file}: {reason}, but {head} differs from {embedding}: {advice}")


_DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def _is_spare(head: str, parts: tuple[str, ...], name: str) -> bool:
    """Other parts of a larger model, buffers of old checkpoints, a head beside tied embeddings, llama.cpp's rope scaling."""
    buffers = "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"
    return name.startswith(parts) or name.endswith(buffers) or name in (head, *_DIVISORS)

"""Loading a model of any family: which it is, its `config.json` says."""

import inspect
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp

from lora_jax.core.errors import InputError
from lora_jax.huggingface import checkpoint_files, hub
from lora_jax.huggingface.names import HFName
from lora_jax.models import bert, llama, vision
from lora_jax.models.stacking import Remat
from lora_jax.models.weights import Sharding


class Loaded(Protocol):
    """What all models have that are loaded; a decoder's `losses` and more are in `models.llama.Loaded`.

    Args:
      apply: `apply(variables, *inputs)`: the logits.
      variables: `{"params": ...}`.
      names: the Hugging Face name of each parameter, by path.
      config: the model's sizes.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = llama.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> model: Loaded = llama.abstract(config)
    >>> model.names["params/norm/scale"].name, model.config.vocab_size
    ('model.norm.weight', 8)
    """

    @property
    def apply(self) -> Callable[..., Any]:
        """`apply(variables, *inputs)`: the logits."""
        ...

    @property
    def variables(self) -> Any:
        """`{"params": ...}`."""
        ...

    @property
    def names(self) -> dict[str, HFName]:
        """The Hugging Face name of each parameter, by path."""
        ...

    @property
    def config(self) -> Any:
        """The model's sizes."""
        ...


# Each module's FAMILY are the model types that its `load` reads.
_LOADERS: dict[str, Callable[..., Loaded]] = {
    **dict.fromkeys(llama.FAMILY, llama.load),
    **dict.fromkeys(bert.FAMILY, bert.load),
    **dict.fromkeys(vision.FAMILY, vision.load),
}
_GGUF = "llama"


def load(
    source: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    quantize: str | None = None,
    block: int | None = None,
    sharding: Sharding = None,
    scan_layers: bool | None = None,
    remat: Remat | None = None,
    attention_block: int | None = None,
    dense_experts: bool | None = None,
    tie: bool | None = None,
    num_labels: int | None = None,
    seed: int | None = None,
) -> Loaded:
    """Read a model of any family that there is a loader for, as that loader does.

    Args:
      source: a Hugging Face directory, a `.gguf` file, or the name of a model on the hub, `owner/name` or
        `owner/name@revision`, which is fetched into the hub's cache. A directory of that name goes first.
      dtype: the dtype of the parameters.
      quantize: `"nf4"`, `"int4"`, `"int8"` or `"fp8"`: the kernels of the layers are quantised as they are read.
      block: how many values share a scale (64 by default); only with `quantize`.
      sharding: where the parameters go: one sharding for all, or a function of (path, shape).
      scan_layers: stack the layers' parameters along a leading axis and scan over them: compiles once for all layers.
      remat: what the backward pass computes again instead of keeping it: `None`: nothing; `"products"`: all but the outputs of
        products with weights; `"full"`: all of a layer but its input.
      attention_block: of decoders: see `models.llama.load`, as for the next two.
      dense_experts: of decoders.
      tie: of decoders.
      num_labels: of classifiers: the number of classes; see `models.bert.load`.
      seed: of classifiers: the seed of a new head.

    Returns:
      What the family's own loader does, `models.llama.Loaded` for a decoder.

    Raises:
      MissingError: the source, or one of its files, is missing.
      InputError: another architecture, an option that its family does not have, or what the family's own loader refuses.
      ImportError: a package for the hub, GGUF files or quantised kernels is missing.

    >>> import json, tempfile, jax, numpy as np, safetensors.numpy
    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, max_position_embeddings=8)
    >>> config = llama.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     _ = (pathlib.Path(directory) / "config.json").write_text(json.dumps(llama.hf_config(config)))
    ...     tensors = {name.name: name.export(np.ones(shape)) for shape, name in llama.parameters(config).values()}
    ...     safetensors.numpy.save_file(tensors, pathlib.Path(directory) / "model.safetensors")
    ...     model = load(directory)
    >>> jax.jit(model.apply)(model.variables, jnp.ones((2, 5), jnp.int32)).shape
    (2, 5, 8)
    """
    source = hub.find(source)
    kind, loader = _loader(source)
    options = {
        "scan_layers": scan_layers,
        "remat": remat,
        "attention_block": attention_block,
        "dense_experts": dense_experts,
        "tie": tie,
        "num_labels": num_labels,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    known = inspect.signature(loader).parameters
    if odd := [name for name in given if name not in known]:
        taken = ", ".join(name for name in options if name in known)
        raise InputError(
            f"{', '.join(odd)}: a model of the type {kind!r} has no such option; beside those of all it has {taken}"
        )
    return loader(source, dtype=dtype, quantize=quantize, block=block, sharding=sharding, **given)


def _loader(source: pathlib.Path) -> tuple[str, Callable[..., Loaded]]:
    """A model's type, and what reads it; in a GGUF file it is a decoder's."""
    if source.suffix == ".gguf":
        return _GGUF, _LOADERS[_GGUF]
    kind = checkpoint_files.read_json(source, "config.json").get("model_type")
    if not isinstance(kind, str) or kind not in _LOADERS:
        known = ", ".join(map(repr, _LOADERS))
        raise InputError(f"{source / 'config.json'}: the model_type is {kind!r}; these can be read: {known}")
    return kind, _LOADERS[kind]

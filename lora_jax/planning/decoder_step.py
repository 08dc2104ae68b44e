"""The step that trains a decoder's adapters, described once: `lora-jax finetune` runs it, and `lora-jax plan` compiles it."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_jax import sharding
from lora_jax.adapters.config import LoraConfig
from lora_jax.adapters.init import init
from lora_jax.adapters.quant import quantize
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.core.weighted import Weighted
from lora_jax.models import llama
from lora_jax.models.weights import KERNELS
from lora_jax.training import train

Remat = Literal["none", "products", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a base is held and computed.

    Args:
      dtype: of its parameters, and of the computation but for norms and attention weights.
      quantize: how the kernels of its layers are quantised, if they are.
      block: how many quantised values share a scale; `None`: 64.
      scan_layers: whether the layers' parameters are stacked, and scanned over.
      remat: what the backward pass computes again: nothing, all but the outputs of products with weights, or all of a layer
        but its input.
      attention_block: compute the attention of at most so many queries at a time; `None`: of all.
    """

    dtype: str = "float32"
    quantize: str | None = None
    block: int | None = None
    scan_layers: bool = False
    remat: Remat = "none"
    attention_block: int | None = None

    def load(self, source: pathlib.Path, mesh: Any = None, tie: bool | None = None) -> llama.Loaded:
        """The base with its weights, as `models.llama.load` reads it, on the mesh if there is one."""
        place = None if mesh is None else sharding.by_path(functools.partial(llama.shardings, mesh))
        stored: Any = {"quantize": self.quantize, "block": self.block, "tie": tie, "sharding": place}
        return _on(mesh, llama.load(source, **stored, **self._computed()))

    def shapes(self, config: llama.LlamaConfig, mesh: Any = None) -> llama.Loaded:
        """The same without weights, each parameter a `jax.ShapeDtypeStruct`, from the model's sizes."""
        model = llama.abstract(config, **self._computed())
        variables = model.variables
        if self.quantize is not None:
            made = functools.partial(quantize, targets=[KERNELS], dtype=self.quantize, block=self.block or 64)
            variables = jax.eval_shape(made, variables)
        if mesh is not None:
            variables = sharding.place_shapes(variables, llama.shardings(mesh, variables))
        return _on(mesh, dataclasses.replace(model, variables=variables))

    def dense(self) -> "ModelOptions":
        """The same, its kernels as they are."""
        return dataclasses.replace(self, quantize=None, block=None)

    def _computed(self) -> dict[str, Any]:
        return {
            "dtype": jnp.dtype(self.dtype),
            "scan_layers": self.scan_layers,
            "remat": None if self.remat == "none" else self.remat,
            "attention_block": self.attention_block,
        }


def _on(mesh: Any, model: llama.Loaded) -> llama.Loaded:
    return model if mesh is None else model.on_mesh(mesh)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderStep:
    """A train step.

    Args:
      model: how the base is held and computed.
      lora: the adapters; `None` where they are there already.
      rows: of packed documents in a batch, on all devices.
      length: tokens in a row.
      accumulate: into how many microbatches the rows are cut, one after the other.
      max_grad_norm: what the gradient is clipped to, if it is.
      balance: of a mixture of experts, how many times the balance loss is added to the loss.
      mesh: where it is; `None`: on one device.

    Raises:
      InputError: the rows can't be cut so.
    """

    model: ModelOptions
    lora: LoraConfig | None
    rows: int
    length: int
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    balance: float = 0.0
    mesh: Any = None

    def __post_init__(self) -> None:
        check_rows(self.rows, self.accumulate, self.mesh)

    @property
    def queries(self) -> int:
        """How many queries' attention is computed at a time."""
        return min(self.model.attention_block or self.length, self.length)

    def adapters(self, model: llama.Loaded, seed: int) -> dict[str, Adapter]:
        """The adapters that training begins with; of a model without weights, their shapes."""
        assert self.lora is not None
        ids = jax.ShapeDtypeStruct((self.rows, self.length), jnp.int32)
        return init(jax.random.key(seed), self.lora, model.apply, model.variables, ids)

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch, as `data.packing` makes it."""
        place = None if self.mesh is None else sharding.batch_sharding(self.mesh)
        dtypes = {"input_ids": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32, "targets": jnp.bool}
        shape = self.rows, self.length
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}

    def loss(self, model: llama.Loaded) -> train.LossFn:
        """`(params, batch, key) -> loss`: the mean over the learnt tokens of the batch.

        Of a mixture of experts `(loss, {"balance_loss": ...})`.
        """

        def loss(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> Weighted:
            return mean_loss(lora(model.losses, key=key), params, batch)

        def with_balance(params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> tuple[Weighted, dict[str, Weighted]]:
            return balanced_loss(lora(model.balanced_losses, key=key), params, batch, self.balance)

        return loss if model.config.experts is None else with_balance


def projections(config: llama.LlamaConfig) -> tuple[str, ...]:
    """The modules of a model's layers whose kernels adapters are usually for: all but the routers of experts.

    >>> from lora_jax.models import presets
    >>> projections(presets.named("phi-4"))
    ('qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj')
    """
    modules = [path.split("/")[-2] for path in llama.parameters(config) if path.endswith("_proj/kernel")]
    return tuple(dict.fromkeys(modules))


def check_rows(rows: int, accumulate: int, mesh: Any = None) -> None:
    """Raise an InputError unless a batch can be cut into microbatches, and these as the mesh cuts rows.

    >>> check_rows(4, 3)
    Traceback (most recent call last):
    lora_jax.core.errors.InputError: a batch of 4 rows can't be cut into 3 equal microbatches (accumulate): take a multiple of 3
    """
    parts = sharding.batch_parts(mesh)
    if rows % (accumulate * parts):
        each = "" if parts == 1 else f", each in {parts} equal parts along data and fsdp"
        raise InputError(
            f"a batch of {rows} rows can't be cut into {accumulate} equal microbatches (accumulate){each}: take a multiple of "
            f"{accumulate * parts}"
        )


# --- the loss ---------------------------------------------------------------------------------------------------------


def mean_loss(losses: Callable[..., jax.Array], params: Any, batch: Mapping[str, jax.Array]) -> Weighted:
    """The mean over the learnt tokens of a batch; the arguments are those of `token_losses`."""
    found, learnt = token_losses(losses, params, batch)
    return Weighted(found.sum(), learnt.sum())


def balanced_loss(
    losses: Callable[..., tuple[jax.Array, jax.Array]], params: Any, batch: Mapping[str, jax.Array], coefficient: float
) -> tuple[Weighted, dict[str, Weighted]]:
    """The mean over the learnt tokens with so many times the balance loss of all tokens, and that loss by its name.

    Of microbatches it is the mean by their learnt tokens.

    Args:
      losses: `Loaded.balanced_losses`, adapted or not.
      params: its parameters.
      batch: as in `token_losses`.
      coefficient: of the balance loss.
    """
    inputs, places, learnt = _inputs(batch)
    found, uneven = losses(params, *inputs, counted=batch["segment_ids"] > 0, **places)
    weight = learnt.sum()
    balance, total = Weighted(uneven * weight, weight), (found * learnt).sum()
    return Weighted(total + coefficient * balance.total if coefficient else total, weight), {"balance_loss": balance}


def token_losses(losses: Callable[..., Any], params: Any, batch: Mapping[str, jax.Array]) -> tuple[Any, jax.Array]:
    """-log p of each learnt token given those before it, 0 elsewhere, and which these are: both `(batch, length)`, float32.

    Both stand at the place before the token.

    Args:
      losses: `Loaded.losses`, adapted or not, or `Loaded.losses_and_hits`, of which both are given.
      params: its parameters.
      batch: `input_ids`, `segment_ids`, `positions` and `targets`, `(batch, length)`.
    """
    inputs, places, learnt = _inputs(batch)
    return jax.tree.map(lambda found: found * learnt, losses(params, *inputs, **places)), learnt


def _inputs(batch: Mapping[str, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], dict[str, jax.Array], jax.Array]:
    """The tokens and those that follow, the options of `Loaded.apply`, and where what follows is learnt."""
    learnt = _following(batch["targets"]).astype(jnp.float32)
    places = {"segment_ids": batch["segment_ids"], "positions": batch["positions"]}
    return (batch["input_ids"], _following(batch["input_ids"])), places, learnt


def _following(array: jax.Array) -> jax.Array:
    """What comes one place later, and a zero at the end: `(batch, length)`."""
    return jnp.pad(array[:, 1:], ((0, 0), (0, 1)))

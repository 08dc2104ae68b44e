"""Functional LoRA for JAX and Flax: low-rank adapters for any JAX function, without ever forming W + AB.

`init` makes adapters of a `LoraConfig`, `attach` puts them beside their parameters, and `lora(fn)` runs `fn` on that tree;
`merge` folds them in. `explain` says what can be adapted, and `summary` what is.

Training: `train`, `optim`, `losses`, `checkpoint`. Several sets: `many`, `algebra`, `combine`. Other starts: `initializers`.
Quantised bases: `quant`. Flax NNX: `nnx`. Hugging Face: `models`, `peft`. Meshes: `sharding`. Below: `paths`, `rules`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_jax import models as models
    from lora_jax import peft as peft
    from lora_jax import sharding as sharding
    from lora_jax.adapters import algebra as algebra
    from lora_jax.adapters import initializers as initializers
    from lora_jax.adapters import quant as quant
    from lora_jax.adapters.combine import combine as combine
    from lora_jax.adapters.config import LoraConfig as LoraConfig
    from lora_jax.adapters.init import init as init
    from lora_jax.adapters.initializers.moments import moments as moments
    from lora_jax.adapters.merging import merge as merge
    from lora_jax.adapters.merging import unmerge as unmerge
    from lora_jax.adapters.quant import quantize as quantize
    from lora_jax.adapters.summary import summary as summary
    from lora_jax.core import nnx as nnx
    from lora_jax.core import paths as paths
    from lora_jax.core import rules as rules
    from lora_jax.core.adapter import Adapter as Adapter
    from lora_jax.core.adapter import Full as Full
    from lora_jax.core.adapter import Layout as Layout
    from lora_jax.core.adapter import LowRank as LowRank
    from lora_jax.core.adapter import Rows as Rows
    from lora_jax.core.adapter import attach as attach
    from lora_jax.core.adapter import detach as detach
    from lora_jax.core.adapter import labels as labels
    from lora_jax.core.errors import InputError as InputError
    from lora_jax.core.errors import NotLowRankError as NotLowRankError
    from lora_jax.core.methods.alora import active_from as active_from
    from lora_jax.core.transform import lora as lora
    from lora_jax.core.usage import explain as explain
    from lora_jax.training import checkpoint as checkpoint
    from lora_jax.training import losses as losses
    from lora_jax.training import many as many
    from lora_jax.training import optim as optim
    from lora_jax.training import train as train
    from lora_jax.training.optim import optimizer as optimizer

__version__ = "0.2.0"
_PLACES = {
    "active_from": "lora_jax.core.methods.alora:active_from",
    "Adapter": "lora_jax.core.adapter:Adapter",
    "algebra": "lora_jax.adapters.algebra",
    "attach": "lora_jax.core.adapter:attach",
    "checkpoint": "lora_jax.training.checkpoint",
    "combine": "lora_jax.adapters.combine:combine",
    "detach": "lora_jax.core.adapter:detach",
    "explain": "lora_jax.core.usage:explain",
    "Full": "lora_jax.core.adapter:Full",
    "init": "lora_jax.adapters.init:init",
    "initializers": "lora_jax.adapters.initializers",
    "InputError": "lora_jax.core.errors:InputError",
    "labels": "lora_jax.core.adapter:labels",
    "Layout": "lora_jax.core.adapter:Layout",
    "lora": "lora_jax.core.transform:lora",
    "LoraConfig": "lora_jax.adapters.config:LoraConfig",
    "losses": "lora_jax.training.losses",
    "LowRank": "lora_jax.core.adapter:LowRank",
    "many": "lora_jax.training.many",
    "merge": "lora_jax.adapters.merging:merge",
    "models": "lora_jax.models",
    "moments": "lora_jax.adapters.initializers.moments:moments",
    "nnx": "lora_jax.core.nnx",
    "NotLowRankError": "lora_jax.core.errors:NotLowRankError",
    "optim": "lora_jax.training.optim",
    "optimizer": "lora_jax.training.optim:optimizer",
    "paths": "lora_jax.core.paths",
    "peft": "lora_jax.peft",
    "quant": "lora_jax.adapters.quant",
    "quantize": "lora_jax.adapters.quant:quantize",
    "Rows": "lora_jax.core.adapter:Rows",
    "rules": "lora_jax.core.rules",
    "sharding": "lora_jax.sharding",
    "summary": "lora_jax.adapters.summary:summary",
    "train": "lora_jax.training.train",
    "unmerge": "lora_jax.adapters.merging:unmerge",
}
__all__ = list(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Load what a name stands for when it is first used: JAX, flax, orbax and the rest come with it."""
    if name not in _PLACES:
        raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found: Any = importlib.import_module(module)
    globals()[name] = getattr(found, attribute) if attribute else found
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})

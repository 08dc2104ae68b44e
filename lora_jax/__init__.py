"""Functional LoRA for JAX and Flax: low-rank adapters for any JAX function, without ever forming W + AB."""

import importlib
from typing import TYPE_CHECKING, Any

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
from lora_jax.training import losses as losses
from lora_jax.training import optim as optim
from lora_jax.training.optim import optimizer as optimizer

if TYPE_CHECKING:
    from lora_jax import models as models
    from lora_jax import peft as peft
    from lora_jax.core import nnx as nnx
    from lora_jax.training import checkpoint as checkpoint
    from lora_jax.training import many as many
    from lora_jax.training import train as train

__version__ = "0.1.0"
_MODULES = {
    "checkpoint": "lora_jax.training.checkpoint",
    "many": "lora_jax.training.many",
    "models": "lora_jax.models",
    "nnx": "lora_jax.core.nnx",
    "peft": "lora_jax.peft",
    "train": "lora_jax.training.train",
}


def __getattr__(name: str) -> Any:
    """Load a module when it is first used: flax, orbax and the rest come with it, not with `import lora_jax`."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")

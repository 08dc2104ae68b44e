"""Functional LoRA for JAX and Flax: low-rank adapters for any JAX function, without ever forming W + AB."""

import importlib
from typing import TYPE_CHECKING, Any

from lora_jax import algebra as algebra
from lora_jax import initializers as initializers
from lora_jax import losses as losses
from lora_jax import optim as optim
from lora_jax import quant as quant
from lora_jax import sharding as sharding
from lora_jax.adapter import Adapter as Adapter
from lora_jax.adapter import Full as Full
from lora_jax.adapter import Layout as Layout
from lora_jax.adapter import LowRank as LowRank
from lora_jax.adapter import Rows as Rows
from lora_jax.adapter import attach as attach
from lora_jax.adapter import detach as detach
from lora_jax.adapter import labels as labels
from lora_jax.alora import active_from as active_from
from lora_jax.config import LoraConfig as LoraConfig
from lora_jax.init import init as init
from lora_jax.merging import merge as merge
from lora_jax.merging import unmerge as unmerge
from lora_jax.mixing import combine as combine
from lora_jax.moments import moments as moments
from lora_jax.optim import optimizer as optimizer
from lora_jax.quant import quantize as quantize
from lora_jax.report import summary as summary
from lora_jax.transform import NotLowRankError as NotLowRankError
from lora_jax.transform import lora as lora
from lora_jax.usage import explain as explain

if TYPE_CHECKING:
    from lora_jax import checkpoint as checkpoint
    from lora_jax import many as many
    from lora_jax import models as models
    from lora_jax import nnx as nnx
    from lora_jax import peft as peft
    from lora_jax import train as train

__version__ = "0.1.0"
_SUBMODULES = ("checkpoint", "many", "models", "nnx", "peft", "train")


def __getattr__(name: str) -> Any:
    """Load a submodule when it is first used: flax, orbax and the rest come with it, not with `import lora_jax`."""
    if name in _SUBMODULES:
        return importlib.import_module(f"lora_jax.{name}")
    raise AttributeError(f"module 'lora_jax' has no attribute {name!r}")

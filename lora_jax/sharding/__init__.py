"""Meshes: where parameters, adapters, their training state and batches lie.

`make_mesh` makes a mesh, `parameter_shardings` and `model_shardings` say where parameters go, and `batch_sharding` where a
batch does. Adapters and their training state follow the parameters: `init` and `train.init_state` make them in their places.
"""

from lora_jax.sharding.adapters import adapter_shardings, gather, put, state_shardings
from lora_jax.sharding.adapters import devices as devices
from lora_jax.sharding.adapters import is_abstract as is_abstract
from lora_jax.sharding.adapters import make as make
from lora_jax.sharding.adapters import on_mesh as on_mesh
from lora_jax.sharding.adapters import place_shapes as place_shapes
from lora_jax.sharding.adapters import put_beside as put_beside
from lora_jax.sharding.batches import batch_parts as batch_parts
from lora_jax.sharding.batches import batch_rows, batch_sharding, place_batch
from lora_jax.sharding.batches import check_batch as check_batch
from lora_jax.sharding.batches import round_up as round_up
from lora_jax.sharding.mesh import AXES, make_mesh
from lora_jax.sharding.mesh import read_axes as read_axes
from lora_jax.sharding.parameters import by_path, model_shardings, parameter_shardings
from lora_jax.sharding.parameters import part_shardings as part_shardings

__all__ = [
    "AXES",
    "adapter_shardings",
    "batch_rows",
    "batch_sharding",
    "by_path",
    "gather",
    "make_mesh",
    "model_shardings",
    "parameter_shardings",
    "place_batch",
    "put",
    "state_shardings",
]

"""Meshes: where parameters, adapters, their training state and batches lie."""

from lora_jax.sharding.adapters import adapter_shardings as adapter_shardings
from lora_jax.sharding.adapters import devices as devices
from lora_jax.sharding.adapters import gather as gather
from lora_jax.sharding.adapters import is_abstract as is_abstract
from lora_jax.sharding.adapters import make as make
from lora_jax.sharding.adapters import on_mesh as on_mesh
from lora_jax.sharding.adapters import place_shapes as place_shapes
from lora_jax.sharding.adapters import put as put
from lora_jax.sharding.adapters import put_beside as put_beside
from lora_jax.sharding.adapters import state_shardings as state_shardings
from lora_jax.sharding.batches import batch_parts as batch_parts
from lora_jax.sharding.batches import batch_rows as batch_rows
from lora_jax.sharding.batches import batch_sharding as batch_sharding
from lora_jax.sharding.batches import check_batch as check_batch
from lora_jax.sharding.batches import place_batch as place_batch
from lora_jax.sharding.batches import round_up as round_up
from lora_jax.sharding.mesh import AXES as AXES
from lora_jax.sharding.mesh import make_mesh as make_mesh
from lora_jax.sharding.mesh import read_axes as read_axes
from lora_jax.sharding.parameters import by_path as by_path
from lora_jax.sharding.parameters import model_shardings as model_shardings
from lora_jax.sharding.parameters import parameter_shardings as parameter_shardings
from lora_jax.sharding.parameters import part_shardings as part_shardings

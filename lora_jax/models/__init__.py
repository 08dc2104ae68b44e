"""Small Linen models with loaders for Hugging Face weights."""

from lora_jax.models import bert as bert
from lora_jax.models import gguf_files as gguf_files
from lora_jax.models import llama as llama
from lora_jax.models import vision as vision
from lora_jax.models.loading import Loaded as Loaded
from lora_jax.models.loading import load as load

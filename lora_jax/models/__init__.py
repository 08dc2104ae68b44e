"""Small Linen models with loaders for Hugging Face weights."""

from lora_jax.models import bert as bert

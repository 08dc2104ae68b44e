"""Small Linen models with loaders for Hugging Face weights and GGUF files: decoders, encoders of texts and of images.

`load` reads a model of any family; `llama`, `bert` and `vision` have the models, and what else each kind can do.
"""

from lora_jax.models import bert, gguf_files, llama, vision
from lora_jax.models.loading import Loaded, load

__all__ = ["Loaded", "bert", "gguf_files", "llama", "load", "vision"]

"""Adapters to and from Hugging Face PEFT's format, which vLLM and others read as well.

`save`, `save_gguf` (for llama.cpp) and `load` need the Hugging Face name of each parameter: a model of `lora_jax.models` has
them (`loaded.names`), for those of other libraries there are ready tables (`rules`), and for your own model `match` makes them
of a few patterns.
"""

from lora_jax.huggingface.names import HFName, match
from lora_jax.peft import rules
from lora_jax.peft.gguf_writing import save_gguf
from lora_jax.peft.reading import load
from lora_jax.peft.writing import save

__all__ = ["HFName", "load", "match", "rules", "save", "save_gguf"]

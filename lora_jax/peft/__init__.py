"""Adapters to and from Hugging Face PEFT."""

from lora_jax.huggingface.names import HFName as HFName
from lora_jax.huggingface.names import match as match
from lora_jax.peft import rules as rules
from lora_jax.peft.reading import load as load
from lora_jax.peft.writing import save as save

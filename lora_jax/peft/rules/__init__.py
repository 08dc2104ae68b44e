"""Ready rules for `lora_jax.peft.match`: where other libraries' models keep what Hugging Face checkpoints have.

Each table takes a model with or without the collection `params/` on top, and with its layers one by one or stacked: then the
path has no layer number, and the arrays have the layers as their first axis (MaxText's: second). Paths don't show whether an
embedding is also the head, so models that leave it open have a second table `..._TIED`; by the first one, what is adapted is
the look-up alone.

Each file says which versions its tables are for; `tests/data/rules/make_trees.py` checks them on the real models.

>>> import numpy as np
>>> from lora_jax.huggingface.names import match
>>> name = match({"layers": {"0": {"attn": {"q_proj": {"w": np.ones((6, 2, 3))}}}}}, TUNIX_LLAMA3)["layers/0/attn/q_proj/w"]
>>> name.tensors((6, 2, 3)), name.shape((6, 2, 3))
({(): 'model.layers.0.self_attn.q_proj.weight'}, (6, 6))
>>> name = match({"layers": {"attn": {"q_proj": {"w": np.ones((2, 6, 2, 3))}}}}, TUNIX_LLAMA3)["layers/attn/q_proj/w"]
>>> list(name.tensors((2, 6, 2, 3)).values())
['model.layers.0.self_attn.q_proj.weight', 'model.layers.1.self_attn.q_proj.weight']
"""

from lora_jax.peft.rules.easydel import EASYDEL, EASYDEL_TIED
from lora_jax.peft.rules.gemma import GEMMA2, GEMMA2_2B, GEMMA3
from lora_jax.peft.rules.keras_hub import (
    KERAS_BERT,
    KERAS_BERT_BACKBONE,
    KERAS_BERT_TIED,
    KERAS_GEMMA3,
    KERAS_LLAMA,
    KERAS_LLAMA_TIED,
    KERAS_QWEN3,
    KERAS_QWEN3_TIED,
)
from lora_jax.peft.rules.maxtext import MAXTEXT_LLAMA, MAXTEXT_QWEN, MAXTEXT_QWEN_TIED, maxtext_gemma2, maxtext_gemma3
from lora_jax.peft.rules.transformers import FLAX_BERT, FLAX_BERT_TIED, FLAX_GPT2, FLAX_LLAMA, FLAX_VIT, FLAX_VIT_5
from lora_jax.peft.rules.tunix import (
    TUNIX_GEMMA,
    TUNIX_GEMMA2,
    TUNIX_GEMMA3,
    TUNIX_LLAMA3,
    TUNIX_LLAMA3_TIED,
    TUNIX_QWEN2,
    TUNIX_QWEN2_TIED,
    TUNIX_QWEN3,
    TUNIX_QWEN3_TIED,
)

__all__ = [
    "EASYDEL",
    "EASYDEL_TIED",
    "FLAX_BERT",
    "FLAX_BERT_TIED",
    "FLAX_GPT2",
    "FLAX_LLAMA",
    "FLAX_VIT",
    "FLAX_VIT_5",
    "GEMMA2",
    "GEMMA2_2B",
    "GEMMA3",
    "KERAS_BERT",
    "KERAS_BERT_BACKBONE",
    "KERAS_BERT_TIED",
    "KERAS_GEMMA3",
    "KERAS_LLAMA",
    "KERAS_LLAMA_TIED",
    "KERAS_QWEN3",
    "KERAS_QWEN3_TIED",
    "MAXTEXT_LLAMA",
    "MAXTEXT_QWEN",
    "MAXTEXT_QWEN_TIED",
    "TUNIX_GEMMA",
    "TUNIX_GEMMA2",
    "TUNIX_GEMMA3",
    "TUNIX_LLAMA3",
    "TUNIX_LLAMA3_TIED",
    "TUNIX_QWEN2",
    "TUNIX_QWEN2_TIED",
    "TUNIX_QWEN3",
    "TUNIX_QWEN3_TIED",
    "maxtext_gemma2",
    "maxtext_gemma3",
]

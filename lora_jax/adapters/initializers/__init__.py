"""Initialisers beyond random ones: `(variables, adapters, ...) -> (variables, adapters)` over whole sets, after `init`.

`init` gives layouts, ranks, scales and dtypes; an initialiser gives the values of the low-rank pairs, and the base that goes
with them. Trained adapters belong to that base. `convert` makes plain ones on the original base of them, for which it needs the
adapters before training: keep these, since another machine's singular vectors may have other signs.
"""

from lora_jax.adapters.initializers.activations import corda, eva
from lora_jax.adapters.initializers.gradient import gradients, lora_ga
from lora_jax.adapters.initializers.quantized import loftq
from lora_jax.adapters.initializers.spectral import convert, milora, olora, pissa

__all__ = ["convert", "corda", "eva", "gradients", "loftq", "lora_ga", "milora", "olora", "pissa"]

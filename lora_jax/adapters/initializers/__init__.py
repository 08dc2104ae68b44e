"""Initialisers over whole sets, `(variables, adapters, ...) -> (variables, adapters)`, applied after `init`.

`init` gives layouts, ranks, scales and dtypes; an initialiser gives the values of the low-rank pairs, and the base that goes
with them. Trained adapters belong to that base. `convert` makes plain ones on the original base of them, for which it needs the
adapters before training: keep these, since another machine's singular vectors may have other signs.
"""

from lora_jax.adapters.initializers.activations import corda as corda
from lora_jax.adapters.initializers.activations import eva as eva
from lora_jax.adapters.initializers.gradient import gradients as gradients
from lora_jax.adapters.initializers.gradient import lora_ga as lora_ga
from lora_jax.adapters.initializers.quantized import loftq as loftq
from lora_jax.adapters.initializers.spectral import convert as convert
from lora_jax.adapters.initializers.spectral import milora as milora
from lora_jax.adapters.initializers.spectral import olora as olora
from lora_jax.adapters.initializers.spectral import pissa as pissa

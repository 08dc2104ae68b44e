"""What each JAX primitive does with a weight: a table from its name to `rule(context, eqn, *operands) -> results`.

`register` adds rules for functions that are no primitives of JAX: kernels of Pallas, say.
"""

from lora_jax.core.interpreter import Rule
from lora_jax.core.rules.control_flow import CONTROL_FLOW
from lora_jax.core.rules.convolution import conv_general_dilated
from lora_jax.core.rules.elementwise import ELEMENTWISE
from lora_jax.core.rules.kernels import custom_call, register
from lora_jax.core.rules.moves import MOVES
from lora_jax.core.rules.products import dot_general
from lora_jax.core.rules.ragged_dot import ragged_dot_general

__all__ = ["register"]

PRODUCTS: dict[str, Rule] = {
    "dot_general": dot_general,
    "conv_general_dilated": conv_general_dilated,
    "ragged_dot_general": ragged_dot_general,
}
CUSTOM: dict[str, Rule] = dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), custom_call)
RULES: dict[str, Rule] = MOVES | ELEMENTWISE | PRODUCTS | CONTROL_FLOW | CUSTOM

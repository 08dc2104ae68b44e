"""Activation functions by transformers' names for them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax

Activation = Callable[[jax.Array], jax.Array]
_exact_gelu = functools.partial(nn.gelu, approximate=False)
FUNCTIONS: dict[str, Activation] = {
    "gelu": _exact_gelu,
    "gelu_python": _exact_gelu,
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), nn.gelu),
    "hardswish": nn.hard_swish,
    "leaky_relu": nn.leaky_relu,
    "linear": lambda x: x,
    "mish": lambda x: x * nn.tanh(nn.softplus(x)),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu6": nn.relu6,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": nn.tanh,
}

"""Each kind of adapter as the term that it adds to its parameter's `Weight`: a new method is a new file and a line here."""

from typing import Any

import jax.numpy as jnp

from lora_jax.core.adapter import LowRank, Rows
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.methods.alora import Invocation
from lora_jax.core.methods.bias import Bias
from lora_jax.core.methods.dora import Magnitude, magnitude_gain
from lora_jax.core.methods.dropout import dropout
from lora_jax.core.methods.token_rows import rows_term
from lora_jax.core.methods.vera import VeraScales
from lora_jax.core.weight import LowRankTerm, Method


def term(path: str, base: Any, adapter: Any, key: Any, active: Any) -> LowRankTerm:
    """The term of an adapter beside its parameter.

    Args:
      path: the parameter's path.
      base: the parameter.
      adapter: a pair, or trained rows.
      key: turns dropout on where it is not None.
      active: where adapters with an invocation sequence act.
    """
    return rows_term(path, base, adapter) if isinstance(adapter, Rows) else _pair_term(path, base, adapter, key, active)


def _pair_term(path: str, base: Any, adapter: LowRank, key: Any, active: Any) -> LowRankTerm:
    adapter = adapter.widened()
    (a_axes, b_axes), layout = adapter.axes(), adapter.layout
    static = isinstance(adapter.scale, float)
    b = adapter.b if static else adapter.scaled(adapter.b)
    along_outputs = lambda array: Factor(array, (*layout.batch, *layout.outputs))
    methods: list[Method | None] = [dropout(path, adapter.dropout, key)]
    if adapter.lambda_d is not None:
        methods.append(VeraScales((Factor(adapter.lambda_d, (*layout.batch, RANK)), along_outputs(adapter.lambda_b))))
    if adapter.magnitude is not None:
        gain = magnitude_gain(base, adapter)
        b = b * jnp.expand_dims(gain, len(layout.batch)).astype(b.dtype)
        methods.append(Magnitude((along_outputs(gain - 1),)))
    if adapter.bias is not None:
        methods.append(Bias(along_outputs(adapter.where_adapted(adapter.scaled(adapter.bias), 0.0))))
    if adapter.invocation is not None:
        methods.append(Invocation(active))
    factors = Factor(adapter.a, a_axes), Factor(b, b_axes)
    scale = adapter.scale if static else 1.0
    return LowRankTerm(factors, path, scale, tuple(filter(None, methods)), adapter.branch_dtype)

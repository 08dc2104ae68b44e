"""Each kind of adapter as the term that it adds to its parameter's `Weight`."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.core.adapter import LowRank, Rows, wide_dtype
from lora_jax.core.methods.dora import gain
from lora_jax.core.weight import RANK, Factor, Log, Term, use


def term(path: str, base: Any, adapter: Any, log: Log) -> Term:
    """An adapter beside its parameter as a term of the weight; dropout and rows as the log's options say."""
    return _rows_term(path, base, adapter, log) if isinstance(adapter, Rows) else _pair_term(path, base, adapter, log)


def _pair_term(path: str, base: Any, adapter: LowRank, log: Log) -> Term:
    adapter = adapter.widened()
    (a_axes, b_axes), layout = adapter.axes(), adapter.layout
    per_output = lambda array: Factor(array, (*layout.batch, *layout.outputs))
    static = isinstance(adapter.scale, float)
    b = adapter.b if static else adapter.scaled(adapter.b)
    parts: dict[str, Any] = {}
    if adapter.magnitude is not None:
        g = gain(base, adapter)
        b = b * jnp.expand_dims(g, len(layout.batch)).astype(b.dtype)
        parts["excess"] = (per_output(g - 1),)
    if adapter.lambda_d is not None:
        parts["gains"] = Factor(adapter.lambda_d, (*layout.batch, RANK)), per_output(adapter.lambda_b)
    if adapter.bias is not None:
        parts["bias"] = per_output(adapter.where_adapted(adapter.scaled(adapter.bias), 0.0))
    if adapter.invocation is not None:
        parts["active"] = log.active
    if log.key is not None and adapter.dropout:
        parts |= {"dropout": adapter.dropout, "key": paths.fold_in(log.key, path)}
    factors = Factor(adapter.a, a_axes), Factor(b, b_axes)
    return Term(factors, path, log, adapter.scale if static else 1.0, **parts)


def _rows_term(path: str, base: Any, rows: Rows, log: Log) -> Term:
    """Rows v in the place of w are a pair: A picks them out, `B = v - w`."""
    layout, wide = rows.layout, wide_dtype(base, rows.values)
    change = rows.values.astype(wide) - use(rows.pick, base).astype(wide)
    picks = jnp.arange(base.shape[layout.inputs[0]])[:, None] == np.array(rows.indices)[None]
    return Term((Factor(picks.astype(wide), (*layout.inputs, RANK)), Factor(change, (RANK, *layout.outputs))), path, log)

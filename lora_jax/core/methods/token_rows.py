"""Trained rows of a table (PEFT's `trainable_token_indices`) as a pair."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.adapter import Rows, wide_dtype
from lora_jax.core.deferred import use
from lora_jax.core.factor import RANK, Factor
from lora_jax.core.weight import LowRankTerm


def rows_term(path: str, base: Any, rows: Rows) -> LowRankTerm:
    """Rows v in the place of w are a pair: A picks them out, `B = v - w`."""
    layout, wide = rows.layout, wide_dtype(base, rows.values)
    change = rows.values.astype(wide) - use(rows.pick, base).astype(wide)
    picks = jnp.arange(base.shape[layout.inputs[0]])[:, None] == np.array(rows.indices)[None]
    factors = Factor(picks.astype(wide), (*layout.inputs, RANK)), Factor(change, (RANK, *layout.outputs))
    return LowRankTerm(factors, path)

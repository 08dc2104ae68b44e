"""Optimisers that update the adapters and nothing else."""

import optax

from lora_jax.adapter import ADAPTER, FROZEN, labels


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` for the trained leaves of an attached tree or an adapter set, zero updates for the frozen ones.

    `optax.multi_transform` by `labels`: no optimiser state is made for a frozen leaf, and under `jit` the whole tree costs no
    more than the adapters alone. Donate the parameters there, or they are copied.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = lj.attach({"w": jnp.ones(3), "head": jnp.ones(2)}, {"head": lj.Full(jnp.ones(2))})
    >>> tx = optimizer(optax.sgd(0.1))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> updates["head"].adapter.value, updates["w"]
    (Array([-0.1, -0.1], dtype=float32), Array([0., 0., 0.], dtype=float32))
    """
    return optax.multi_transform({ADAPTER: tx, FROZEN: optax.set_to_zero()}, labels)

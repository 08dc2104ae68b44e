"""Initialisers from the gradient of the kernels."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.algebra import kernel_matrices, kernel_stack, true_ranks
from lora_jax.adapters.initializers.common import Adapters, by_matrix, sides, split_off, svd, with_kernels
from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, LowRank, wide_dtype
from lora_jax.core.errors import InputError
from lora_jax.core.weighted import Weighted, as_weighted, widened

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def gradients(
    loss_fn: Callable[[Any, Any], jax.Array | Weighted], variables: Any, adapters: Adapters, batches: Iterable[Any]
) -> dict[str, jax.Array]:
    """The mean gradient of a loss with respect to the kernels that have a pair, and to no other parameter.

    Args:
      loss_fn: `(variables, batch) -> loss`, of the plain parameters: the function itself, not `lora(fn)`, which stops the
        gradient at the base. A scalar, of which all batches count alike, or a `lora_jax.train.Weighted`.
      variables: the base tree.
      adapters: what `init` made.
      batches: at least one; batches of one shape share one compiled program.

    Returns:
      `{path: gradient}`, each of its kernel's shape.

    Raises:
      InputError: there is no batch, or no pair, or the batches have the weight 0 in all.

    >>> import lora_jax as lj
    >>> base, fn = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, lambda p, x: x @ p["w"] + p["b"]
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), fn, base, jnp.ones((4, 3)))
    >>> gradients(lambda p, x: fn(p, x).mean(), base, adapters, [jnp.ones((4, 3))])["w"].tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """
    leaves, treedef = paths.flatten(variables)
    kernels = {path: kernel for path, (kernel, _) in with_kernels(variables, adapters).items()}
    others = {path: leaf for path, leaf in leaves.items() if path not in kernels}

    @jax.jit
    def add(sums: Any, kernels: Any, others: Any, batch: Any) -> Any:
        def loss(kernels: dict[str, jax.Array]) -> tuple[Any, Any]:
            tree = jax.tree.unflatten(treedef, [(kernels | others)[path] for path in leaves])
            found = as_weighted(loss_fn(tree, batch))
            return found.total, jnp.asarray(found.weight, jnp.float32)

        return jax.tree.map(jnp.add, sums, widened(jax.grad(loss, has_aux=True)(kernels)))

    zeros = {path: jnp.zeros(kernel.shape, wide_dtype(kernel)) for path, kernel in kernels.items()}
    sums = zeros, jnp.zeros((), jnp.float32)
    for batch in batches:
        sums = add(sums, kernels, others, batch)
    grads, weight = sums
    if not weight:
        raise InputError("batches: there is none, or none with anything to learn, so there is no gradient")
    return {path: grad / weight.astype(grad.dtype) for path, grad in grads.items()}


def lora_ga(
    variables: Any,
    adapters: Adapters,
    gradients: Mapping[str, jax.Array],
    *,
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r",
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable",
    gamma: float | None = None,
    key: jax.Array | None = None,
) -> tuple[Any, dict[str, Adapter]]:
    """Pairs whose first steps follow the gradient of the whole kernel (LoRA-GA, https://arxiv.org/abs/2407.05000).

    Of the gradient `G = U diag(s) V^T`, A gets r columns of U and B r rows of `diag(s) V^T` among the first 2r, chosen and
    scaled as in PEFT (whose B has the factor s, which the paper's has not); base `W - scale A B`.

    Args:
      variables: the base tree.
      adapters: what `init` made.
      gradients: `{path: gradient}`, each of its kernel's shape, as the function `gradients` makes them.
      direction: which of the first 2r A and B get: `"ArB2r"` (A the first r, B the second), `"A2rBr"` (the other way round),
        `"ArBr"` (B the 1st, 3rd, ..., A the 2nd, 4th, ...) or `"random"` (the same r of them).
      scale: `"stable"` (B times `out^(1/4) / sqrt(gamma)`), `"weight_svd"` (B times W's largest singular value over the first
        of s in B), `"gd_scale"` (A and B over the pair's scale) or `"unit"`.
      gamma: of `"stable"`; 16 if it is not given.
      key: a PRNG key, for `"random"`.

    Raises:
      InputError: an adapter can't be initialised so; a gradient is missing, is of another shape or is zero; 2r is above the
        kernel's smaller side; an option is unknown, missing, or given where it is not used.

    >>> import lora_jax as lj
    >>> fn, base, x = lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.array([[1.0, 0.0, 5.0], [2.0, 1.0, -5.0]])
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), fn, base, x)
    >>> slopes = gradients(lambda p, x: (fn(p, x) ** 2).mean(), base, adapters, [x])
    >>> changed, adapters = lora_ga(base, adapters, slopes)
    >>> bool(jnp.allclose(lj.merge(changed, adapters)["w"], base["w"], atol=1e-5))
    True
    """
    _check_options(direction, scale, gamma, key)

    def make(path: str, kernel: jax.Array, pair: LowRank) -> LowRank:
        _check_gradient(path, kernel, pair, gradients.get(path))
        chosen = _places(direction, pair, None if key is None else paths.fold_in(key, path))
        return _lora_ga(kernel, pair, gradients[path], *chosen, scale, 16.0 if gamma is None else gamma)

    return split_off(variables, adapters, make)


def _check_options(direction: str, scale: str, gamma: float | None, key: jax.Array | None) -> None:
    for name, value, choices in (("direction", direction, DIRECTIONS), ("scale", scale, SCALES)):
        if value not in choices:
            raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    if (direction == "random") != (key is not None):
        raise InputError("direction='random' and key belong together: give both or neither")
    if gamma is not None and (scale != "stable" or not gamma > 0):
        raise InputError(f"gamma is a positive number for scale='stable'; it is {gamma!r} with scale={scale!r}")


def _check_gradient(path: str, kernel: jax.Array, pair: LowRank, gradient: jax.Array | None) -> None:
    if gradient is None:
        raise InputError(
            f"{path}: there is no gradient for it: make them with gradients(loss_fn, variables, adapters, batches)"
        )
    if gradient.shape != kernel.shape:
        raise InputError(f"{path}: the gradient has the shape {gradient.shape}, the kernel {kernel.shape}")
    side = min(sides(pair))
    if 2 * pair.rank > side:
        raise InputError(
            f"{path}: LoRA-GA takes 2 x {pair.rank} directions, and the kernel's smaller side is {side}: lower the rank"
        )
    if not bool(jnp.any(gradient)):
        raise InputError(f"{path}: the gradient is zero; lora(fn) stops it at the base, so differentiate the function itself")


def _places(direction: str, pair: LowRank, key: jax.Array | None) -> tuple[np.ndarray, np.ndarray]:
    """Which singular vectors A and B get in each matrix, `(count, r)`; what lies beyond a true rank is not used."""
    ranks = true_ranks(pair)
    if key is not None:
        keys = jax.random.split(key, len(ranks))
        drawn = np.stack([np.resize(jax.random.permutation(k, max(1, 2 * r)), pair.rank) for k, r in zip(keys, ranks)])
        return drawn, drawn
    place = np.tile(np.arange(pair.rank), (len(ranks), 1))
    after = place + ranks[:, None]
    return {"ArB2r": (place, after), "A2rBr": (after, place), "ArBr": (2 * place + 1, 2 * place)}[direction]


@functools.partial(jax.jit, static_argnums=(5, 6))
def _lora_ga(
    kernel: jax.Array, pair: LowRank, gradient: jax.Array, of_a: jax.Array, of_b: jax.Array, scale: str, gamma: float
) -> LowRank:
    def one(kernel: jax.Array, pair: LowRank, gradient: jax.Array, of_a: jax.Array, of_b: jax.Array) -> LowRank:
        u, s, vt = (x[0] for x in svd(kernel_matrices(gradient, pair.layout)))
        a, b = u[:, of_a], vt[of_b] * s[of_b, None]
        if scale == "stable":
            b = b * (kernel.shape[1] ** 0.25 / math.sqrt(gamma))
        elif scale == "weight_svd":
            first = s[of_b[0]]
            factor = jnp.linalg.norm(kernel.astype(wide_dtype(kernel)), 2) / jnp.where(first > 0, first, 1)
            b = b * jnp.where(first > 0, factor, 1)
        elif scale == "gd_scale":
            a, b = (x / pair.scale.astype(x.dtype) for x in (a, b))
        return dataclasses.replace(pair, a=a, b=b)

    return by_matrix(one, kernel, pair, kernel_stack(gradient, pair.layout), of_a, of_b)

"""Initialisers from the inputs that the kernels meet, as `moments` sums them up."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.algebra import fit, from_matrices, kernel_matrices, true_ranks
from lora_jax.adapters.initializers.common import Adapters, by_matrix, sides, smallest_first, split_off, svd, with_kernels
from lora_jax.adapters.initializers.moments import Moments, check_reached
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import InputError

DAMPING = 0.01


def _moments_of(path: str, pair: LowRank, moments: Mapping[str, Moments]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The moments of a pair's kernel as stacks: second `(count, in, in)`, total `(count, in)`, count `(count,)`."""
    if path not in moments:
        raise InputError(f"{path}: there are no moments of its inputs: make them with moments(fn, variables, adapters, ...)")
    check_reached({path: moments[path]})
    found = moments[path]
    batch = pair.a.shape[: len(pair.layout.batch)]
    fan_in, _ = sides(pair)
    if found.second.shape != (*batch, fan_in, fan_in):
        raise InputError(
            f"{path}: the second moments have the shape {found.second.shape}; the kernel needs {(*batch, fan_in, fan_in)}"
        )
    return found.second.reshape(-1, fan_in, fan_in), found.total.reshape(-1, fan_in), found.count.reshape(-1)


# --- EVA --------------------------------------------------------------------------------------------------------------


def eva(
    variables: Any, adapters: Adapters, moments: Mapping[str, Moments], *, rho: float = 2.0
) -> tuple[Any, dict[str, Adapter]]:
    """A with the directions in which the inputs vary most, B zero, and ranks where they explain most (EVA).

    The principal components of a kernel's inputs x are the eigenvectors of `sum (x - mean)(x - mean)^T`, and each explains the
    share `eigenvalue / trace` of their variance. The budget, the sum of all ranks, goes to the components that explain most,
    over all kernels and all matrices of a stack; a matrix of rank r gets at most `rho r`, and never more than its smaller side.
    The scales stay. A kernel that gets none leaves the set. (https://arxiv.org/abs/2410.07170)

    The base is returned as it is, and a trained adapter belongs to it as it is: `convert` is not needed.

    Args:
      variables: the base tree, quantised or not.
      adapters: what `init` made.
      moments: `{path: Moments}` of some batches.
      rho: how far ranks may move; 1 leaves them where they are.

    Raises:
      InputError: an adapter can't be initialised so, moments are missing or of another shape, or rho is below 1.

    >>> import lora_jax as lj
    >>> fn, base, x = lambda p, x: x @ p["w"], {"w": jnp.ones((3, 2))}, jnp.array([[1.0, 0.0, 5.0], [1.0, 0.0, -5.0]])
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), fn, base, x)
    >>> _, adapters = eva(base, adapters, lj.moments(fn, base, adapters, x))
    >>> abs(adapters["w"].a[:, 0]).round(5).tolist(), adapters["w"].b.tolist()  # the third input varies
    ([0.0, 0.0, 1.0], [[0.0, 0.0]])
    """
    if not rho >= 1:
        raise InputError(f"rho must be at least 1, not {rho!r}")
    pairs = {path: pair for path, (_, pair) in with_kernels(variables, adapters, quantized=True).items()}
    most = {path: min(round(pair.rank * rho), sides(pair)[0]) for path, pair in pairs.items()}
    found = {path: _components(*_moments_of(path, pair, moments), most[path]) for path, pair in pairs.items()}
    ranks = _redistributed(pairs, {path: np.asarray(share) for path, (share, _) in found.items()}, rho)
    fresh = {path: _with_components(pair, found[path][1], ranks[path]) for path, pair in pairs.items() if any(ranks[path])}
    return variables, {path: fresh.get(path, a) for path, a in adapters.items() if path in fresh or path not in pairs}


@functools.partial(jax.jit, static_argnums=3)
def _components(second: jax.Array, total: jax.Array, count: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The share of the variance that each of the first components explains, `(count, most)`, and these as columns."""

    def one(sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        second, total, count = sums
        mean = total / jnp.maximum(count, 1).astype(total.dtype)
        values, vectors = jnp.linalg.eigh(second - total[:, None] * mean[None])
        values = jnp.maximum(values, 0)[::-1]
        trace = values.sum()
        return values[:most] / jnp.where(trace > 0, trace, 1), vectors[:, ::-1][:, :most]

    return jax.lax.map(one, (second, total, count))


def _redistributed(pairs: Mapping[str, LowRank], shares: Mapping[str, np.ndarray], rho: float) -> dict[str, tuple[int, ...]]:
    """The ranks of each path's matrices; of components that explain the same, an earlier path's go first."""
    owners, explained, budget = [], [], 0
    for path, pair in pairs.items():
        for i, rank in enumerate(map(int, true_ranks(pair))):
            most = min(round(rank * rho), *sides(pair))
            owners += [(path, i)] * most
            explained.append(shares[path][i, :most])
            budget += rank
    kept = np.argsort(-np.concatenate(explained), kind="stable")[:budget]
    counts = {path: [0] * len(shares[path]) for path in pairs}
    for k in kept:
        path, i = owners[k]
        counts[path][i] += 1
    return {path: tuple(numbers) for path, numbers in counts.items()}


def _with_components(pair: LowRank, vectors: jax.Array, ranks: tuple[int, ...]) -> LowRank:
    """The pair of these ranks with the first components in A."""
    rank = max(ranks)
    on = np.arange(rank)[None] < np.array(ranks)[:, None]
    a = jnp.where(on[:, None], vectors[..., :rank], 0)
    b = jnp.zeros((len(ranks), rank, sides(pair)[1]), a.dtype)
    return from_matrices(pair, a, b, None if set(ranks) == {rank} else ranks)


# --- CorDA ------------------------------------------------------------------------------------------------------------


def corda(
    variables: Any, adapters: Adapters, moments: Mapping[str, Moments], *, mode: Literal["ipm", "kpm"]
) -> tuple[Any, dict[str, Adapter]]:
    """The part of each kernel that matters most, or least, to given inputs in its pair (CorDA).

    With `C = sum x x^T` over the inputs x, `C W = U diag(s) V^T`, `A = C^-1 U_r diag(sqrt(s_r / scale))`,
    `B = diag(sqrt(s_r / scale)) V_r^T`, base `W - scale A B`. C is divided by the mean of its diagonal, which leaves `A B` as
    it is, and 0.01 is added to the diagonal, as in PEFT (which adds more where its inverse comes out inexact). PEFT divides
    each batch by its largest input before it sums; here all inputs count the same. (https://arxiv.org/abs/2406.05223)

    Args:
      variables: the base tree.
      adapters: what `init` made.
      moments: `{path: Moments}` of some batches.
      mode: `"ipm"` (instruction-previewed: the largest singular values, of inputs like those to train on) or `"kpm"`
        (knowledge-preserved: the smallest, of inputs whose answers are to stay).

    Raises:
      InputError: an adapter can't be initialised so, moments are missing or of another shape, or the mode is unknown.

    >>> import lora_jax as lj
    >>> fn, base, x = lambda p, x: x @ p["w"], {"w": jnp.eye(3)}, jnp.array([[1.0, 0.0, 5.0], [2.0, 1.0, -5.0]])
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), fn, base, x)
    >>> changed, adapters = corda(base, adapters, lj.moments(fn, base, adapters, x), mode="ipm")
    >>> bool(jnp.allclose(lj.merge(changed, adapters)["w"], base["w"], atol=1e-5))
    True
    """
    if mode not in ("ipm", "kpm"):
        raise InputError(f"mode must be 'ipm' or 'kpm', not {mode!r}")

    def make(path: str, kernel: jax.Array, pair: LowRank) -> LowRank:
        return _corda(kernel, pair, _moments_of(path, pair, moments)[0], mode)

    return split_off(variables, adapters, make)


@functools.partial(jax.jit, static_argnums=3)
def _corda(kernel: jax.Array, pair: LowRank, second: jax.Array, mode: str) -> LowRank:
    def one(kernel: jax.Array, pair: LowRank, second: jax.Array) -> LowRank:
        flat = kernel_matrices(kernel, pair.layout)
        second = second.astype(flat.dtype)
        mean = jnp.diagonal(second).mean()
        c = second / jnp.where(mean > 0, mean, 1) + DAMPING * jnp.eye(len(second), dtype=flat.dtype)
        u, s, vt = svd(jnp.matmul(c[None], flat, precision="highest"))
        if mode == "kpm":
            u, s, vt = smallest_first(u, s, vt)
        return fit(pair, jnp.linalg.solve(c[None], u[..., : pair.rank]), s, vt)

    return by_matrix(one, kernel, pair, second)

"""Initialisers from the kernel alone: a part of W in the pair, the rest in the base."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import algebra
from lora_jax.adapters.algebra import fit, kernel_matrices, true_ranks, within_ranks
from lora_jax.adapters.initializers.common import Adapters, by_matrix, sides, smallest_first, split_off, svd
from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, LowRank, wide_dtype
from lora_jax.core.errors import InputError

_OVERSAMPLE = 8


def pissa(
    variables: Any, adapters: Adapters, *, iterations: int | None = None, key: jax.Array | None = None
) -> tuple[Any, dict[str, Adapter]]:
    """The largest singular values of each kernel in its pair (PiSSA, https://arxiv.org/abs/2404.02948).

    `W = U diag(s) V^T`, `A = U_r diag(sqrt(s_r / scale))`, `B = diag(sqrt(s_r / scale)) V_r^T`, base `W - scale A B`.

    Args:
      variables: the base tree.
      adapters: what `init` made.
      iterations: use a randomised SVD with this many power iterations (Halko et al., https://arxiv.org/abs/0909.4061); `None`
        for the exact one. Even 4 come close, and it is far cheaper for a large kernel.
      key: a PRNG key for the randomised one.

    Returns:
      The changed base and the new adapters, which together act as the base did.

    Raises:
      InputError: an adapter can't be initialised so, or only one of `iterations` and `key` is given.

    >>> import lora_jax as lj
    >>> base = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), lambda p, x: x @ p["w"], base, jnp.ones((2, 3)))
    >>> changed, adapters = pissa(base, adapters)
    >>> jnp.diag(changed["w"]).round(5).tolist(), jnp.diag(lj.merge(changed, adapters)["w"]).round(5).tolist()
    ([0.0, 2.0, 1.0], [3.0, 2.0, 1.0])
    """
    if (iterations is None) != (key is None):
        raise InputError("iterations and key belong together: the randomised SVD needs both, the exact one neither")
    if iterations is not None and iterations < 0:
        raise InputError(f"iterations must be at least 0, not {iterations}")
    own = lambda path: None if key is None else paths.fold_in(key, path)
    return split_off(variables, adapters, lambda path, kernel, pair: _pissa(kernel, pair, own(path), iterations))


@functools.partial(jax.jit, static_argnums=3)
def _pissa(kernel: jax.Array, pair: LowRank, key: jax.Array | None, iterations: int | None) -> LowRank:
    if key is None or iterations is None:
        return by_matrix(lambda kernel, pair: fit(pair, *svd(_matrices(kernel, pair))), kernel, pair)
    (fan_in, fan_out), count = sides(pair), len(true_ranks(pair))
    sample = jax.random.normal(key, (count, fan_out, min(pair.rank + _OVERSAMPLE, fan_in, fan_out)), wide_dtype(kernel))

    def one(kernel: jax.Array, pair: LowRank, sample: jax.Array) -> LowRank:
        return fit(pair, *_randomized_svd(sample[None], _matrices(kernel, pair), iterations))

    return by_matrix(one, kernel, pair, sample)


def _matrices(kernel: jax.Array, pair: LowRank) -> jax.Array:
    return kernel_matrices(kernel, pair.layout)


def _randomized_svd(sample: jax.Array, flat: jax.Array, iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values, from the range of `(W W^T)^iterations W` times a normal matrix."""
    product = functools.partial(jnp.matmul, precision="highest")
    orthonormal = lambda x: jnp.linalg.qr(x)[0]

    def power(_: Any, q: jax.Array) -> jax.Array:
        return orthonormal(product(flat, orthonormal(product(flat.mT, q))))

    q = jax.lax.fori_loop(0, iterations, power, orthonormal(product(flat, sample)))
    u, s, vt = svd(product(q.mT, flat))
    return product(q, u), s, vt


def milora(variables: Any, adapters: Adapters) -> tuple[Any, dict[str, Adapter]]:
    """The smallest singular values of each kernel in its pair (MiLoRA, https://arxiv.org/abs/2406.09044).

    As `pissa` with the last r singular values and vectors, so that training starts where the base does least. A singular value
    of zero gives zeros in both A and B, which then don't train: a kernel of low rank wants another initialiser.

    Args:
      variables: the base tree.
      adapters: what `init` made.

    Returns:
      The changed base and the new adapters, which together act as the base did.

    Raises:
      InputError: an adapter can't be initialised so.

    >>> import lora_jax as lj
    >>> base = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), lambda p, x: x @ p["w"], base, jnp.ones((2, 3)))
    >>> changed, adapters = milora(base, adapters)
    >>> jnp.diag(changed["w"]).round(5).tolist(), float(adapters["w"].delta()[2, 2].round(5))
    ([3.0, 2.0, 0.0], 1.0)
    """
    return split_off(variables, adapters, lambda path, kernel, pair: _milora(kernel, pair))


@jax.jit
def _milora(kernel: jax.Array, pair: LowRank) -> LowRank:
    return by_matrix(lambda kernel, pair: fit(pair, *smallest_first(*svd(_matrices(kernel, pair)))), kernel, pair)


def olora(variables: Any, adapters: Adapters) -> tuple[Any, dict[str, Adapter]]:
    """The first part of each kernel's QR decomposition in its pair (OLoRA, https://arxiv.org/abs/2406.01775).

    `W^T = Q R`, A the transpose of R's first r rows, B that of Q's first r columns (so B has orthonormal rows), base
    `W - scale A B`. As in PEFT the factors don't depend on the scale.

    Args:
      variables: the base tree.
      adapters: what `init` made.

    Returns:
      The changed base and the new adapters, which together act as the base did.

    Raises:
      InputError: an adapter can't be initialised so.

    >>> import lora_jax as lj
    >>> base = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), lambda p, x: x @ p["w"], base, jnp.ones((2, 3)))
    >>> changed, adapters = olora(base, adapters)
    >>> float(jnp.linalg.norm(adapters["w"].b)), bool(jnp.allclose(lj.merge(changed, adapters)["w"], base["w"], atol=1e-5))
    (1.0, True)
    """
    return split_off(variables, adapters, lambda path, kernel, pair: _olora(kernel, pair))


@jax.jit
def _olora(kernel: jax.Array, pair: LowRank) -> LowRank:
    def one(kernel: jax.Array, pair: LowRank) -> LowRank:
        q, r = jnp.linalg.qr(_matrices(kernel, pair).mT)
        return within_ranks(pair, r[:, : pair.rank].mT, q[..., : pair.rank].mT)

    return by_matrix(one, kernel, pair)


def convert(adapters: Adapters, initial: Adapters) -> dict[str, Adapter]:
    """The trained adapters as plain ones of twice the rank on the original base, exactly.

    A pair trained on the base `W - s A0 B0` changes the original W by `s (A B - A0 B0) = [A, A0] [s B; -s B0]`. Adapters of
    other kinds stay as they were trained. Two initialisers don't take the start off the base:

    * `loftq`: the result belongs to `merge(base, initial)`, which comes near the original base and is not quantised. On the
      quantised base use the trained adapters as they are.
    * `eva`: the base did not change, so the trained adapters belong to it as they are, at their own rank.

    Args:
      adapters: after training.
      initial: before it, as the initialiser returned them.

    Raises:
      InputError: the two have not the same pairs, or pairs that can't be added.

    >>> import dataclasses, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> trained = dataclasses.replace(pair, b=3 * pair.b)
    >>> found = convert({"w": trained}, {"w": pair})["w"]
    >>> found.rank, float(found.delta()[0, 0])
    (2, 1.0)
    """
    after, before = ({path: a for path, a in one.items() if isinstance(a, LowRank)} for one in (adapters, initial))
    lone = sorted(after.keys() ^ before.keys())
    if lone:
        raise InputError(
            f"{', '.join(lone)}: a low-rank pair in one of the two sets only; convert needs the set before training"
        )
    return {**adapters, **algebra.add(after, algebra.negate(before))}

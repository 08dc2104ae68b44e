"""Many adapters made one, by the methods of Hugging Face PEFT's `add_weighted_adapter`, to their papers' definitions.

PEFT mixes A with A and B with B in the methods without `_svd`, so that products of one adapter's A with another's B come in;
those with `_svd` mix the changes `s A B` themselves and truncate the result.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from lora_jax.adapters import algebra
from lora_jax.adapters.words import Majority, Method
from lora_jax.core import paths
from lora_jax.core.adapter import LowRank
from lora_jax.core.errors import InputError

Mix = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (arrays (sets, ...), weights (sets,), key) -> (...)


def combine(
    sets: Sequence[algebra.Adapters],
    weights: Sequence[float],
    method: Method = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority: Majority = "total",
    key: jax.Array | None = None,
) -> dict[str, LowRank]:
    """One adapter set from several, each with a weight.

    - `"cat"`: the pairs side by side; exactly the weighted sum of the changes, of the sum of the ranks.
    - `"svd"`: that sum, truncated to a rank by its singular values, exactly and without forming it. (PEFT up to 0.20 applied
      the scaling twice here.)
    - `"linear"`: `A = sum sign(w s) sqrt|w s| A_i`, `B = sum sqrt|w s| B_i`, as PEFT does: products of A_i with B_j come in.
    - `"ties"`: trims each to its largest values, elects a sign for each value, and averages those that agree
      (https://arxiv.org/abs/2306.01708). `"dare_linear"`, `"dare_ties"`: drop values at random and scale the others up first
      (https://arxiv.org/abs/2311.03099). `"magnitude_prune"`: trims, and adds.
    - with `_svd`: the same on `s A B`, which is formed, then truncated.

    Args:
      sets: adapter sets; a parameter need not be in all of them.
      weights: one for each.
      method: how, as above.
      rank: of the result, for `svd` and the `_svd` methods; `None`: the highest of the sets.
      density: the share of values to keep, for the methods that trim or drop.
      majority: by what a sign is elected, the `"total"` of the values or the `"frequency"` of their signs.
      key: a PRNG key, for the methods that drop at random.

    Returns:
      `{path: pair}` of scale 1.

    Raises:
      InputError: an option is missing, not used by the method, or out of range; pairs of different ranks are to be mixed; an
        adapter is more than a pair.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)))
    >>> both = combine([{"w": pair}, {"w": pair}], [0.5, 1.0], "svd")
    >>> both["w"].rank, bool(jnp.allclose(both["w"].delta(), 1.5, atol=1e-5))
    (1, True)
    """
    _check(sets, weights, method, rank, density, majority, key)
    if method in ("cat", "svd"):
        total = algebra.add(*(algebra.scale(one, weight) for one, weight in zip(sets, weights)))
        return total if method == "cat" else {path: _truncated(path, pair, sets, rank) for path, pair in total.items()}
    mix = _mix(method.removesuffix("_svd"), 1.0 if density is None else density, majority)
    found = {}
    for path, listed in _listed(sets, weights).items():
        own_key = jax.random.key(0) if key is None else paths.fold_in(key, path)
        if method.endswith("_svd"):
            found[path] = _mixed_changes(path, listed, mix, own_key, sets, rank)
        else:
            found[path] = _mixed_factors(path, listed, mix, own_key)
    return found


def _check(sets: Any, weights: Any, method: str, rank: Any, density: Any, majority: str, key: Any) -> None:
    if method not in get_args(Method):
        raise InputError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, not {method!r}")
    if not sets or len(sets) != len(weights):
        raise InputError(f"there are {len(sets)} adapter sets and {len(weights)} weights: give a weight for each set")
    if majority not in get_args(Majority):
        raise InputError(f"majority must be 'total' or 'frequency', not {majority!r}")
    trims, drops = "ties" in method or "prune" in method or "dare" in method, "dare" in method
    for name, value, used in (("density", density, trims), ("key", key, drops), ("rank", rank, method.endswith("svd"))):
        if value is not None and not used:
            raise InputError(f"the method {method!r} has no use for {name}: leave it out")
    if trims and not (density is not None and 0 < density <= 1):
        raise InputError(f"the method {method!r} needs a density above 0 and at most 1, not {density}")
    if drops and key is None:
        raise InputError(f"the method {method!r} drops values at random: give it a key")


def _listed(sets: Sequence[Any], weights: Sequence[float]) -> dict[str, list[tuple[LowRank, float]]]:
    """The pairs of each parameter, with their weights."""
    found: dict[str, list[tuple[LowRank, float]]] = {}
    for one, weight in zip(sets, weights):
        for path, pair in algebra.scale(one, 1.0).items():  # which also checks that it is a pair
            found.setdefault(path, []).append((pair, weight))
    return found


def _rank_of(path: str, sets: Sequence[Any], rank: int | None) -> int:
    return rank or max(one[path].rank for one in sets if path in one)


def _truncated(path: str, pair: LowRank, sets: Sequence[Any], rank: int | None) -> LowRank:
    found = algebra.truncate({path: pair}, rank=_rank_of(path, sets, rank))[path]
    assert isinstance(found, LowRank)
    return found


def _weights(pair: LowRank, weight: float) -> jax.Array:
    """`w s` for each matrix of a stack."""
    batch = pair.a.shape[: len(pair.layout.batch)]
    return weight * jnp.broadcast_to(jnp.asarray(pair.scale, jnp.float32), batch).reshape(-1)


def _mixed_factors(path: str, listed: Sequence[tuple[LowRank, float]], mix: Mix, key: jax.Array) -> LowRank:
    first = listed[0][0]
    ranks = sorted({pair.rank for pair, _ in listed})
    if len(ranks) > 1:
        raise InputError(f"{path}: pairs of the ranks {ranks} can't be mixed value by value: use cat, svd or an _svd method")
    total = jnp.stack([_weights(pair, weight) for pair, weight in listed], 1)  # (count, sets)
    root = jnp.sqrt(jnp.abs(total))
    factors = zip(*(algebra.matrices(pair) for pair, _ in listed))
    keys = jax.random.split(key)
    mixed: list[jax.Array] = []
    for arrays, scales, own in zip(factors, (jnp.where(total < 0, -root, root), root), keys):
        stacked = jnp.stack(arrays, 1)  # (count, sets, ...)
        mixed.append(jax.vmap(mix)(stacked, scales, jax.random.split(own, stacked.shape[0])))
    return _unscaled(algebra.from_matrices(first, mixed[0], mixed[1], None))


def _mixed_changes(path: str, listed: Any, mix: Mix, key: jax.Array, sets: Sequence[Any], rank: int | None) -> LowRank:
    first = listed[0][0]
    changes = jnp.stack([algebra.delta_matrices(pair) for pair, _ in listed], 1)
    weights = jnp.broadcast_to(jnp.array([weight for _, weight in listed], jnp.float32)[None], changes.shape[:2])
    mixed = jax.vmap(mix)(changes, weights, jax.random.split(key, changes.shape[0]))
    u, s, vt = jnp.linalg.svd(mixed, full_matrices=False)
    kept = min(_rank_of(path, sets, rank), s.shape[-1])
    return _unscaled(algebra.from_matrices(first, *algebra.balanced(u, s, vt, kept), None))


def _unscaled(pair: LowRank) -> LowRank:
    return dataclasses.replace(pair, scale=1.0)


# --- the methods on arrays (sets, ...) ----------------------------------------------------------------------------------


def _mix(method: str, density: float, majority: str) -> Mix:
    thin = _drop if "dare" in method else _trim
    join = _disjoint if "ties" in method else lambda arrays, weights, majority: _weighted(arrays, weights).sum(0)

    def mix(arrays: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
        if density < 1:
            arrays = jax.vmap(lambda x, k: thin(x, density, k))(arrays, jax.random.split(key, len(arrays)))
        return join(arrays, weights, majority)

    return mix


def _weighted(arrays: jax.Array, weights: jax.Array) -> jax.Array:
    return arrays * weights.reshape(-1, *(1,) * (arrays.ndim - 1)).astype(arrays.dtype)


def _trim(array: jax.Array, density: float, _: jax.Array) -> jax.Array:
    """The share of values that are largest in size; the others zero."""
    flat = array.reshape(-1)
    _, places = jax.lax.top_k(jnp.abs(flat), math.floor(density * flat.size))
    return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(array.shape)


def _drop(array: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """A random share of the values, scaled up to keep the mean; the others zero."""
    kept = jax.random.bernoulli(key, density, array.shape)
    return jnp.where(kept, array / density, jnp.zeros_like(array))


def _disjoint(arrays: jax.Array, weights: jax.Array, majority: str) -> jax.Array:
    """The mean of the weighted values whose sign is the elected one."""
    signs = jnp.sign(arrays)
    elected = jnp.where((arrays if majority == "total" else signs).sum(0) >= 0, 1, -1).astype(arrays.dtype)
    agrees = (signs == elected[None]).astype(arrays.dtype)
    return (_weighted(arrays, weights) * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)

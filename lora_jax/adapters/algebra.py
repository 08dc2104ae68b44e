"""Arithmetic of adapters as changes `scale A B`: they can be added, scaled, truncated, and found from a full fine-tune.

What is done with them is done on their factors; only `delta_matrices` forms an `A B`, for those who need the kernel's changes
themselves.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.core.adapter import PARTS, Adapter, Full, Layout, LowRank, attach, is_adapted, wide_dtype
from lora_jax.core.errors import InputError

__all__ = [
    "add",
    "difference",
    "effective_rank",
    "fold_scale",
    "interpolate",
    "needed_rank",
    "negate",
    "pad_rank",
    "scale",
    "singular_values",
    "truncate",
]

Adapters = Mapping[str, Adapter]


def scale(adapters: Adapters, factor: float) -> dict[str, LowRank]:
    """`factor` times each change.

    Args:
      adapters: plain pairs, by path.
      factor: any number.

    Raises:
      InputError: an adapter is not a plain pair: a multiple of a `Full`, of a magnitude or of a bias is no adapter of its kind.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=2.0)
    >>> scale({"w": pair}, 0.5)["w"].scale
    1.0
    """
    pairs = _plain(adapters, "scaled")
    return {path: dataclasses.replace(pair, scale=pair.scale * factor) for path, pair in pairs.items()}


def negate(adapters: Adapters) -> dict[str, LowRank]:
    """Minus each change: forgetting by negation, as in task arithmetic (https://arxiv.org/abs/2212.04089).

    Args:
      adapters: plain pairs, by path.

    Raises:
      InputError: an adapter is not a plain pair.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=2.0)
    >>> float(abs(add({"w": pair}, negate({"w": pair}))["w"].delta()).max())
    0.0
    """
    return scale(adapters, -1.0)


def add(*sets: Adapters) -> dict[str, LowRank]:
    """The sum of the changes, exactly: the pairs of a parameter side by side, so that their ranks add up.

    Args:
      sets: adapter sets; a parameter need not be in all of them.

    Raises:
      InputError: an adapter is not a plain pair, or the pairs of a parameter differ in layout, dropout or branch dtype.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=2.0)
    >>> total = add({"w": pair}, {"w": pair})["w"]
    >>> total.rank, float(total.delta()[0, 0])
    (2, 4.0)
    """
    return {path: _side_by_side(pairs) for path, pairs in _by_path(sets, "added").items()}


def interpolate(first: Adapters, second: Adapters, t: float) -> dict[str, LowRank]:
    """`(1 - t)` times the first set's changes and t times the second's.

    Args:
      first: plain pairs, by path.
      second: likewise; a parameter need not be in both.
      t: 0 for the first set, 1 for the second; any number.

    Raises:
      InputError: as `add`.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lambda scale: lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=scale)
    >>> float(interpolate({"w": pair(2.0)}, {"w": pair(6.0)}, 0.25)["w"].delta()[0, 0])
    3.0
    """
    return add(scale(first, 1.0 - t), scale(second, t))


def fold_scale(adapters: Adapters) -> dict[str, Adapter]:
    """The same adapters for inference: what training alone sees is gone, so that sets of different methods share one program.

    Each scale is moved into B, VeRA's vectors into A and B; there is no dropout, and nothing is marked frozen. Not for
    training: B's gradient is then not multiplied with the scale, and what the method keeps as it is would be trained.

    Args:
      adapters: `{path: adapter}`, of any kinds.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=2.0)
    >>> fa = dataclasses.replace(pair, scale=0.5, dropout=0.1, frozen=("a",))  # LoRA-FA
    >>> jax.tree.structure(fold_scale({"w": pair})) == jax.tree.structure(fold_scale({"w": fa}))
    True
    """
    return {path: _for_inference(adapter) for path, adapter in adapters.items()}


def _for_inference(adapter: Adapter) -> Adapter:
    if not isinstance(adapter, LowRank):
        return dataclasses.replace(adapter, frozen=())
    pair = scale_folded(adapter.folded())
    return dataclasses.replace(pair, dropout=0.0, frozen=())


def scale_folded(pair: LowRank) -> LowRank:
    """The same pair with its scale moved into B."""
    bias = None if pair.bias is None else pair.scaled(pair.bias)
    return dataclasses.replace(pair, b=pair.scaled(pair.b), bias=bias, scale=1.0)


def pad_rank(adapters: Adapters, rank: int) -> dict[str, Adapter]:
    """Every pair with zeros up to a rank, so that sets of different ranks share one compiled program, or can be stacked.

    Args:
      adapters: `{path: adapter}`; what is no pair stays as it is.
      rank: the new rank of each.

    Raises:
      InputError: a pair has a higher rank; it is named.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)))
    >>> pad_rank({"w": pair}, 4)["w"].a.shape
    (2, 4)
    """
    return {path: _padded(path, a, rank) if isinstance(a, LowRank) else a for path, a in adapters.items()}


def _padded(path: str, pair: LowRank, rank: int) -> LowRank:
    if pair.rank > rank:
        raise InputError(f"{path}: the pair has rank {pair.rank}, above {rank}: truncate it first, or pad to more")
    arrays = {}
    for name in pair.children():
        if "rank" in PARTS[name]:
            array, before = getattr(pair, name), PARTS[name][: PARTS[name].index("rank")]
            axis = sum(len(getattr(pair.layout, role)) for role in before)
            arrays[name] = jnp.pad(array, [(0, rank - pair.rank if i == axis else 0) for i in range(array.ndim)])
    return dataclasses.replace(pair, **arrays, ranks=_marks(pair, rank))


def _marks(pair: LowRank, rank: int) -> tuple[int, ...] | None:
    """Which matrices of a stack are adapted at all, where more than A and B depends on that."""
    if pair.ranks is None or all(pair.ranks) or (pair.magnitude is None and pair.bias is None):
        return None
    return tuple(rank if own else 0 for own in pair.ranks)


def truncate(adapters: Adapters, *, rank: int | None = None, energy: float | None = None) -> dict[str, Adapter]:
    """Each change by the nearest one of lower rank: the best approximation in the Frobenius norm (Eckart and Young, 1936).

    `A B = Qa (Ra Rb^T) Qb^T` by two QR decompositions; the singular values of `A B` are those of the small core.

    Args:
      adapters: `{path: adapter}`; what is no pair stays as it is.
      rank: the new rank; a pair of a lower one keeps its own.
      energy: instead of a rank, the share of the squared singular values to keep, for each matrix of a stack by itself. Needs
        concrete arrays.

    Raises:
      InputError: not exactly one of the two is given, or it is out of range.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.eye(3), lj.Layout((), (0,), (1,)))
    >>> truncate({"w": pair}, rank=2)["w"].rank, truncate({"w": pair}, energy=0.6)["w"].rank
    (2, 1)
    """
    if (rank is None) == (energy is None):
        raise InputError("truncate to a rank or to an energy: give exactly one of the two")
    if rank is not None and rank < 1:
        raise InputError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy must be above 0 and at most 1, not {energy}")
    return {path: _truncated(a, rank, energy) if isinstance(a, LowRank) else a for path, a in adapters.items()}


def _truncated(pair: LowRank, rank: int | None, energy: float | None) -> LowRank:
    pair, ranks = pair.folded(), None
    u, s, vt = _svd(pair)
    if energy is not None:
        # 0 only where it was: a matrix of rank 0 is not adapted at all.
        kept = np.minimum(needed_rank(s, energy), true_ranks(pair))
        rank, ranks = max(1, int(kept.max())), tuple(map(int, kept.reshape(-1)))
        s = jnp.where(jnp.arange(s.shape[-1])[None] < kept[:, None], s, 0)
    elif pair.ranks is not None:
        ranks = tuple(min(own, rank or own) for own in pair.ranks)
    rank = min(rank or pair.rank, s.shape[-1])
    same = ranks is None or not pair.layout.batch or set(ranks) == {rank}
    return from_matrices(pair, *balanced(u, s, vt, rank), None if same else ranks)


def singular_values(adapters: Adapters) -> dict[str, jax.Array]:
    """The singular values of each change `scale A B`, `(*batch, r)` from the largest down; `A B` is never formed.

    Args:
      adapters: `{path: adapter}`; what is no pair is left out.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[0.0, 2.0]]), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> singular_values({"w": pair})["w"]
    Array([5.], dtype=float32)
    """
    found = {}
    for path, pair in adapters.items():
        if isinstance(pair, LowRank):
            _, s, _ = _svd(pair)
            batch = pair.a.shape[: len(pair.layout.batch)]
            found[path] = jnp.abs(pair.scaled(s.reshape(*batch, -1)))
    return found


def needed_rank(values: Any, energy: float) -> np.ndarray:
    """The smallest rank, 1 or more, that keeps a share of the squared norm.

    Args:
      values: concrete singular values `(*batch, r)`, from the largest down.
      energy: the share, above 0 and at most 1.

    Returns:
      `(*batch)`.

    >>> needed_rank(jnp.array([[3.0, 2.0, 1.0], [1.0, 0.0, 0.0]]), 0.9).tolist()
    [2, 1]
    """
    squares = np.asarray(values, np.float64) ** 2
    share = np.cumsum(squares, -1) / np.maximum(squares.sum(-1, keepdims=True), 1e-300)
    return np.where(squares.any(-1), 1 + (share < energy - 1e-12).sum(-1), 1)


def effective_rank(values: jax.Array) -> jax.Array:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli, 2007), on the last axis; 0 if all are zero.

    Args:
      values: singular values `(*batch, r)`.

    Returns:
      `(*batch)`.

    >>> float(effective_rank(jnp.array([2.0, 2.0, 0.0])).round(5))
    2.0
    """
    share = values / jnp.maximum(values.sum(-1, keepdims=True), jnp.finfo(values.dtype).tiny)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1)), 0), -1)
    return jnp.where(values.any(-1), jnp.exp(entropy), 0)


def difference(template: Adapters, base: Any, finetuned: Any) -> dict[str, Adapter]:
    """The adapters that come nearest to a full fine-tune: `finetuned - base`, truncated to the template's ranks.

    Args:
      template: which parameters, layouts, ranks and scales, as `init` makes them; its arrays may be shapes alone.
      base: the parameters before.
      finetuned: the parameters after.

    Raises:
      InputError: a path of the template is in neither tree, or does not fit; or the template has more than plain pairs.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> template = {"w": lj.LowRank(jnp.zeros((3, 1)), jnp.zeros((1, 2)), lj.Layout((), (0,), (1,)), scale=2.0)}
    >>> found = difference(template, {"w": jnp.zeros((3, 2))}, {"w": jnp.ones((3, 2))})
    >>> bool(jnp.allclose(found["w"].delta(), 1.0, atol=1e-5))
    True
    """
    for path, adapter in template.items():
        if isinstance(adapter, LowRank) and adapter.extras:
            raise InputError(f"{path}: the template is more than a pair, for which alone a difference can be found")
    before, after = (
        paths.flatten(tree, is_leaf=is_adapted)[0] for tree in (attach(base, template), attach(finetuned, template))
    )
    found: dict[str, Adapter] = {}
    for path, adapter in template.items():
        old, new = before[path].base, after[path].base
        found[path] = _nearest(adapter, old, new) if isinstance(adapter, LowRank) else _replaced(adapter, new)
    return found


def _replaced(template: Any, new: jax.Array) -> Adapter:
    """The template's kind of replacement, with the new values."""
    return Full(new) if isinstance(template, Full) else dataclasses.replace(template, values=template.pick(new))


def _nearest(template: LowRank, old: jax.Array, new: jax.Array) -> LowRank:
    """The pair of the template's rank and scale that is nearest to `new - old`."""
    wide = wide_dtype(old, new)
    change = jnp.asarray(new, wide) - jnp.asarray(old, wide)
    return fit(template, *jnp.linalg.svd(kernel_matrices(change, template.layout), full_matrices=False))


# --- pairs as stacks of matrices --------------------------------------------------------------------------------------


def matrices(pair: LowRank) -> tuple[jax.Array, jax.Array]:
    """A `(count, in, r)` and B `(count, r, out)`, in float32 at least."""
    wide, batch = pair.widened().folded(), len(pair.layout.batch)
    count = math.prod(pair.a.shape[:batch])
    return wide.a.reshape(count, -1, pair.rank), wide.b.reshape(count, pair.rank, -1)


def from_matrices(pair: LowRank, a: jax.Array, b: jax.Array, ranks: tuple[int, ...] | None) -> LowRank:
    """The pair with other matrices A `(count, in, r)` and B `(count, r, out)`, in its own dtype."""
    batch = len(pair.layout.batch)
    a_shape = (*pair.a.shape[:-1], a.shape[-1])
    b_shape = (*pair.b.shape[:batch], b.shape[1], *pair.b.shape[batch + 1 :])
    a, b = a.reshape(a_shape).astype(pair.a.dtype), b.reshape(b_shape).astype(pair.b.dtype)
    return dataclasses.replace(pair, a=a, b=b, ranks=ranks)


def true_ranks(pair: LowRank) -> np.ndarray:
    """The rank of each matrix, `(count,)`."""
    count = math.prod(pair.a.shape[: len(pair.layout.batch)])
    return np.full(count, pair.rank) if pair.ranks is None else np.array(pair.ranks)


def within_ranks(pair: LowRank, a: jax.Array, b: jax.Array) -> LowRank:
    """The pair with other matrices A `(count, in, r)` and B `(count, r, out)`, made zero beyond its true ranks."""
    on = jnp.arange(a.shape[-1])[None] < true_ranks(pair)[:, None]
    return from_matrices(pair, jnp.where(on[:, None], a, 0), jnp.where(on[..., None], b, 0), pair.ranks)


def scales(pair: LowRank, dtype: Any) -> jax.Array:
    """The scale of each matrix, `(count, 1)`, or `(1, 1)` where it is one number."""
    return jnp.asarray(pair.scale, dtype).reshape(-1, 1)


def fit(pair: LowRank, u: jax.Array, s: jax.Array, vt: jax.Array) -> LowRank:
    """The pair with `scale A B = U_r diag(s_r) V_r^T`, the first of each up to its true ranks; A and B share the roots."""
    factor = scales(pair, s.dtype)
    a, b = balanced(u, s / jnp.abs(factor), vt, pair.rank)
    return within_ranks(pair, a * jnp.sign(factor)[..., None], b)


def kernel_stack(kernel: jax.Array, layout: Layout) -> jax.Array:
    """A kernel as `(count, in, out)`, in its own dtype."""
    size = lambda axes: math.prod(kernel.shape[axis] for axis in axes)
    order = (*layout.batch, *layout.inputs, *layout.outputs)
    return kernel.transpose(order).reshape(size(layout.batch), size(layout.inputs), size(layout.outputs))


def kernel_matrices(kernel: jax.Array, layout: Layout) -> jax.Array:
    """A kernel as `(count, in, out)`, in float32 at least."""
    return kernel_stack(kernel, layout).astype(wide_dtype(kernel))


def delta_matrices(pair: LowRank) -> jax.Array:
    """`scale A B` of each matrix, `(count, in, out)`, in float32 at least."""
    return kernel_matrices(pair.widened().delta(), pair.layout)


def balanced(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A and B from the largest singular values, whose roots both get."""
    root = jnp.sqrt(s[:, :rank])
    return u[..., :rank] * root[:, None], root[..., None] * vt[:, :rank]


def _svd(pair: LowRank) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U `(count, in, k)`, the singular values `(count, k)` and V^T `(count, k, out)` of each `A B`, without its scale."""
    a, b = matrices(pair)
    (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
    u, s, vt = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
    return qa @ u, s, vt @ qb.mT


# --- sets -------------------------------------------------------------------------------------------------------------


def _plain(adapters: Adapters, verb: str) -> dict[str, LowRank]:
    """The pairs of a set that has nothing else."""
    for path, adapter in adapters.items():
        if what := _more_than_a_pair(adapter):
            raise InputError(f"{path}: {what} can't be {verb}, since it is more than a change of low rank: leave it out")
    return {path: adapter.folded() for path, adapter in adapters.items() if isinstance(adapter, LowRank)}


def _more_than_a_pair(adapter: Adapter) -> str:
    """What keeps an adapter from being a change of low rank alone; empty if nothing does."""
    if not isinstance(adapter, LowRank):
        return f"a {type(adapter).__name__} adapter"
    parts = {"a magnitude": adapter.magnitude, "a bias": adapter.bias, "an invocation sequence": adapter.invocation}
    return next((f"an adapter with {what}" for what, part in parts.items() if part is not None), "")


def _by_path(sets: Sequence[Adapters], verb: str) -> dict[str, list[LowRank]]:
    """The pairs of each parameter, which agree in layout, dropout and branch dtype."""
    found: dict[str, list[LowRank]] = {}
    for one in sets:
        for path, pair in _plain(one, verb).items():
            found.setdefault(path, []).append(pair)
            first = found[path][0]
            one, other = ((p.layout, p.dropout, p.branch_dtype) for p in (first, pair))
            if one != other:
                raise InputError(
                    f"{path}: pairs of different layouts, dropouts or branch dtypes can't be {verb}: {one} with {other} "
                    "(fold_scale of each drops the dropout)"
                )
    return found


def _side_by_side(pairs: Sequence[LowRank]) -> LowRank:
    batch = len(pairs[0].layout.batch)
    a = jnp.concatenate([pair.a for pair in pairs], -1)
    b = jnp.concatenate([pair.scaled(pair.b) for pair in pairs], batch)
    return dataclasses.replace(pairs[0], a=a, b=b, scale=1.0, ranks=None, frozen=())

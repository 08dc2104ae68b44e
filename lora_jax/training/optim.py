"""Optimisers that update the adapters and nothing else, and those that know what A and B are.

`optimizer` makes of any optax optimiser one for a tree with adapters; the train steps do so themselves. `lora_plus`, `lora_fa`
and `muon` are optimisers for it, and `decay_mask` says to any other where weight decay belongs.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import optax

from lora_jax.core import paths
from lora_jax.core.adapter import ADAPTER, FROZEN, Adapted, Adapter, Full, LowRank, is_adapted, labels, wide_dtype
from lora_jax.core.errors import InputError

__all__ = ["decay_mask", "lora_fa", "lora_plus", "muon", "optimizer"]

Rate = Any  # a number, or a schedule from the count of steps to one
_VECTORS = ("bias", "scale")  # what parameters that are a vector for each layer are called, stacked or not


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` for the trained leaves of an attached tree or an adapter set, zero updates for the frozen ones.

    `optax.multi_transform` by `labels`: no optimiser state is made for a frozen leaf, and under `jit` the whole tree costs no
    more than the adapters alone. Donate the parameters there, or they are copied. `tx` sees trained leaves only; its `update`
    gets the whole tree as the extra argument `whole`, if it takes one.

    A tree with integers, as a quantised base has them, is differentiated by `jax.grad(loss, allow_int=True)`, and `update`
    needs `params`, from which the zero updates of the integers take their dtypes. What else looks at gradients (a clip by
    their global norm, say) goes inside `tx`: the gradient of an integer has no value.

    Of leaves below float32 the state holds float32 copies, which `tx` updates, and the leaves are those rounded: in their own
    dtype small updates would be lost. Its `update` then needs the `params`.

    Args:
      tx: any optax transformation.

    Raises:
      InputError: in `update`: a leaf has a dtype below float32, and there are no `params`.

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> params = lj.attach({"w": jnp.ones(3), "head": jnp.ones(2)}, {"head": lj.Full(jnp.ones(2))})
    >>> tx = optimizer(optax.sgd(0.1))
    >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> updates["head"].adapter.value, updates["w"]
    (Array([-0.1, -0.1], dtype=float32), Array([0., 0., 0.], dtype=float32))
    """
    parts = optax.multi_transform({ADAPTER: _in_float32(tx), FROZEN: optax.stateless(_zeros)}, labels)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return parts.update(updates, state, params, whole=params, **extra)

    return optax.GradientTransformationExtraArgs(parts.init, update)


class _Wide(NamedTuple):
    """The state of an optimiser, and the values that it updates."""

    values: Any
    inner: Any


def without_copies(state: Any) -> Any:
    """A state of `optimizer` in the form of before, without float32 copies; its `update` goes on from such a one as then."""
    is_wide = lambda node: isinstance(node, _Wide)
    return jax.tree.map(lambda node: node.inner if is_wide(node) else node, state, is_leaf=is_wide)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` on copies in float32 where a leaf is below that (https://arxiv.org/abs/1710.03740, section 3.1)."""
    inner = optax.with_extra_args_support(tx)
    widened = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, wide_dtype(leaf)), tree)

    def init(params: Any) -> Any:
        if all(wide_dtype(leaf) == leaf.dtype for leaf in jax.tree.leaves(params)):
            return inner.init(params)
        values = widened(params)
        return _Wide(values, inner.init(values))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if not isinstance(state, _Wide):
            return inner.update(updates, state, params, **extra)
        if params is None:
            raise InputError("the adapters have a dtype below float32, so the optimiser needs them: pass update(..., params)")
        changes, found = inner.update(widened(updates), state.inner, state.values, **extra)
        values = optax.apply_updates(state.values, changes)
        rounded = jax.tree.map(lambda leaf, value: (value - leaf.astype(value.dtype)).astype(leaf.dtype), params, values)
        return rounded, _Wide(values, found)

    return optax.GradientTransformationExtraArgs(init, update)


def lora_plus(
    make: Callable[[Rate], optax.GradientTransformation],
    learning_rate: Rate,
    ratio: float = 16.0,
    *,
    rates: Mapping[Any, Rate] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+: the learning rate of B is `ratio` times that of A (https://arxiv.org/abs/2402.12354).

    As in PEFT's `create_loraplus_optimizer`, what is a vector (a magnitude, a bias, a norm's scale) goes with B, and whole
    matrices and rows go with A.

    Args:
      make: a learning rate to an optimiser, such as `optax.adamw`.
      learning_rate: A's, a number or an optax schedule.
      ratio: B's learning rate over A's.
      rates: `{pattern: learning rate}` for all of an adapter; the first match wins. PEFT gives the pairs of embeddings a
        rate of their own, 1e-6 if none is named: `rates={"embed_tokens": 1e-6}`.

    Returns:
      An optimiser for `optimizer`, `train.init_state` and `train.make_train_step`.

    Raises:
      InputError: the ratio is not positive. When its state is made: A or B of a pair is frozen, there is no pair, or a pattern
        matches no adapter.

    >>> import lora_jax as lj
    >>> pair = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), lj.Layout((), (0,), (1,)))
    >>> tx = lj.optimizer(lora_plus(optax.sgd, 0.5, ratio=4.0))
    >>> updates, _ = tx.update({"w": pair}, tx.init({"w": pair}), {"w": pair})
    >>> float(updates["w"].a[0, 0]), float(updates["w"].b[0, 0])
    (-0.5, -2.0)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
        raise InputError(f"ratio must be a positive, finite number, not {ratio!r}")
    if rates is not None and not isinstance(rates, Mapping):
        raise InputError(f"rates must be a dict from pattern to learning rate, not {rates!r}")
    own = {paths.normalize(pattern): rate for pattern, rate in (rates or {}).items()}
    groups: dict[Hashable, Any] = {
        "a": make(learning_rate),
        "b": make(_times(learning_rate, ratio)),
        FROZEN: optax.set_to_zero(),
    }
    groups |= {f"rates[{pattern}]": make(rate) for pattern, rate in own.items()}

    def group(path: str, adapter: Adapter, name: str) -> str:
        if getattr(adapter.roles(), name) == FROZEN:
            return FROZEN
        pattern = next((pattern for pattern in own if paths.matches(path, pattern)), None)
        if pattern is not None:
            return f"rates[{pattern}]"
        return "a" if name == "a" or (not isinstance(adapter, LowRank) and not _is_vector(path, adapter)) else "b"

    parts = optax.multi_transform(groups, lambda tree: _label(group, tree, FROZEN))

    def init(params: Any) -> Any:
        adapters = _adapters(params)
        _check_pairs("LoRA+", adapters, ("a", "b"), ())
        paths.select(adapters, own, "rates")
        return parts.init(params)

    return optax.GradientTransformationExtraArgs(init, parts.update)


def lora_fa(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA's step: `tx` on B's gradient G projected to `(A^T A)^-1 G / s^2`, with A frozen (https://arxiv.org/abs/2308.03303).

    The change `s A B` then moves along the projection of W's own gradient on the columns of A, as in PEFT's
    `LoraFAOptimizer`. What is no pair is left to `tx` as it is.

    Args:
      tx: any optax transformation.

    Returns:
      An optimiser for `optimizer`, `train.init_state` and `train.make_train_step`.

    Raises:
      InputError: when its state is made: A of a pair is trained, B is frozen, or there is no pair. In `update`: A is out of
        sight, since it is not inside `optimizer`.

    >>> import lora_jax as lj
    >>> pair = LowRank(2 * jnp.ones((1, 1)), jnp.ones((1, 1)), lj.Layout((), (0,), (1,)), scale=0.5, frozen=("a",))
    >>> tx = lj.optimizer(lora_fa(optax.sgd(1.0)))
    >>> updates, _ = tx.update({"w": pair}, tx.init({"w": pair}), {"w": pair})
    >>> updates["w"].b
    Array([[-1.]], dtype=float32)
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: Any) -> Any:
        _check_pairs("LoRA-FA", _adapters(params), ("b",), ("a",))
        return inner.init(params)

    def update(updates: Any, state: Any, params: Any = None, *, whole: Any = None, **extra: Any) -> Any:
        if whole is None:
            raise InputError(
                "lora_fa needs A, which is frozen: use it as lora_jax.optimizer(lora_fa(tx)), and pass `params`; "
                "optax.MultiSteps and what else drops extra arguments goes around that"
            )
        pairs = {path: adapter for path, adapter in _adapters(whole).items() if isinstance(adapter, LowRank)}

        def project(path: str, adapter: Adapter) -> Adapter:
            return _projected(adapter, pairs[path]) if path in pairs else adapter

        return inner.update(_map(project, updates), state, params, whole=whole, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def muon(learning_rate: Rate, *, consistent_rms: float | None = 0.2) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon/) of each A and B as a matrix, stacked or not; AdamW of all else.

    `optax.contrib.muon` takes what has two axes for a matrix. Here A is a matrix from all in axes to r, B one from r to all out
    axes, and there is one for each place along the batch axes (layers, experts). Vectors, and parameters that are trained
    whole, get AdamW.

    Args:
      learning_rate: a number or an optax schedule.
      consistent_rms: the root mean square of an update over the learning rate; 0.2 is about AdamW's, so that AdamW's learning
        rates serve (https://arxiv.org/abs/2502.16982). `None`: that of an orthogonal matrix times sqrt(max(1, out / in)).

    Returns:
      An optimiser for `optimizer`, `train.init_state` and `train.make_train_step`.

    >>> import lora_jax as lj
    >>> pair = LowRank(jnp.ones((4, 2)), jnp.zeros((2, 4)), lj.Layout((), (0,), (1,)))
    >>> gradient = dataclasses.replace(pair, b=jnp.eye(2, 4))
    >>> tx = lj.optimizer(muon(1.0))
    >>> updates, _ = tx.update({"w": gradient}, tx.init({"w": pair}), {"w": pair})
    >>> round(float(jnp.sqrt(jnp.mean(updates["w"].b ** 2))), 1)
    0.2
    """

    from optax import contrib  # which takes a while, and only Muon needs it

    def axes(path: str, adapter: Adapter, name: str) -> Any:
        array = getattr(adapter, name)
        if not isinstance(adapter, LowRank) or name not in ("a", "b") or not hasattr(array, "ndim"):  # a frozen one is masked
            return None
        batch, ndim = len(adapter.layout.batch), array.ndim
        inner = ndim - 1 if name == "a" else batch
        outer = tuple(axis for axis in range(batch, ndim) if axis != inner)
        into, out = (outer, (inner,)) if name == "a" else ((inner,), outer)
        return contrib.MuonDimensionNumbers(reduction_axis=into, output_axis=out)

    shapes: Any = {"muon_weight_dimension_numbers": lambda tree: _label(axes, tree, None), "consistent_rms": consistent_rms}
    return contrib.muon(learning_rate, **shapes)


def decay_mask(tree: Any) -> Any:
    """Where weight decay belongs: not on biases, magnitudes, the scales of norms, other vectors and what is no adapter.

    For the `mask` of an optax optimiser: `optax.adamw(1e-4, weight_decay=0.01, mask=lora_jax.optim.decay_mask)`.

    Args:
      tree: an attached tree or an adapter set. A `Full` value counts as a vector if it has one axis, or if the parameter is
        called `bias` or `scale`, as the stacked ones of a scanned model are.

    Returns:
      A tree of the same structure with a bool for each leaf.

    >>> decay_mask({"head/kernel": Full(jnp.ones((2, 3))), "head/bias": Full(jnp.ones(3))})
    {'head/bias': Full(frozen=(), value=False), 'head/kernel': Full(frozen=(), value=True)}
    """

    def decays(path: str, adapter: Adapter, name: str) -> bool:
        return name not in ("magnitude", "bias", "scale", "lambda_d", "lambda_b") and not _is_vector(path, adapter)

    return _label(decays, tree, False)


# --- adapters in a tree -----------------------------------------------------------------------------------------------


def _is_adapter(node: Any) -> bool:
    return isinstance(node, Adapter)


def _flat(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of an attached tree or an adapter set by path, adapters and adapted parameters whole."""
    leaves, treedef = paths.flatten(tree, is_leaf=lambda node: is_adapted(node) or _is_adapter(node))
    # A key of an adapter set is a path already, which `paths.flatten` has escaped once more.
    return {unquote(path) if _is_adapter(leaf) else path: leaf for path, leaf in leaves.items()}, treedef


def _adapters(tree: Any) -> dict[str, Adapter]:
    """The adapters of an attached tree or of a set by path."""
    found = {path: leaf.adapter if is_adapted(leaf) else leaf for path, leaf in _flat(tree)[0].items()}
    return {path: leaf for path, leaf in found.items() if _is_adapter(leaf)}


def _map(fn: Callable[[str, Any], Any], tree: Any, other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """The tree with `fn(path, adapter)` for each adapter, and `other(leaf)` for the rest."""

    def one(path: str, leaf: Any) -> Any:
        if is_adapted(leaf):
            return Adapted(other(leaf.base), fn(path, leaf.adapter))
        return fn(path, leaf) if _is_adapter(leaf) else other(leaf)

    leaves, treedef = _flat(tree)
    return jax.tree.unflatten(treedef, [one(path, leaf) for path, leaf in leaves.items()])


def _label(fn: Callable[[str, Any, str], Any], tree: Any, other: Any) -> Any:
    """The tree with `fn(path, adapter, name)` for each array of an adapter, and the label `other` for the rest."""

    def one(path: str, adapter: Adapter) -> Adapter:
        return dataclasses.replace(adapter, **{name: fn(path, adapter, name) for name in adapter.children()})

    return _map(one, tree, lambda leaf: other)


def _is_vector(path: str, adapter: Adapter) -> bool:
    """Whether a parameter that is trained whole is a vector in each layer."""
    if not isinstance(adapter, Full):
        return False
    return getattr(adapter.value, "ndim", 0) < 2 or path.rpartition("/")[2] in _VECTORS


def _check_pairs(method: str, adapters: Mapping[str, Adapter], trained: tuple[str, ...], frozen: tuple[str, ...]) -> None:
    """Raise an InputError unless there are pairs, of all of which these arrays are trained and these are frozen."""
    pairs = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, LowRank)}
    if not pairs:
        raise InputError(f"{method} is for low-rank pairs, and these adapters have none: use another optimiser")
    for path, pair in pairs.items():
        for name in (*trained, *frozen):
            wanted = name in frozen
            if (name in pair.frozen) != wanted:
                state = ("trained", "frozen") if wanted else ("frozen", "trained")
                raise InputError(
                    f"{path}: {name.upper()} is {state[0]}, and {method} is for pairs whose {name.upper()} is {state[1]}: "
                    f"make them with LoraConfig(method={'lora_fa' if frozen else 'lora'!r}), or use another optimiser"
                )


def _zeros(updates: Any, params: Any) -> Any:
    """Zero updates; of the parameters' dtypes, since the gradient of an integer has one that nothing can be added to."""
    return jax.tree.map(jnp.zeros_like, updates if params is None else params)


# --- the methods' own arithmetic --------------------------------------------------------------------------------------


def _times(rate: Rate, factor: float) -> Rate:
    if not callable(rate):
        return factor * rate
    schedule: Callable[[Any], Any] = rate
    return lambda count: factor * schedule(count)


def _projected(gradient: Any, pair: LowRank) -> Any:
    """The gradient of a pair with `(A^T A)^-1 G / s^2` for that of B; what pads a smaller rank stays zero."""
    batch, wide = pair.b.shape[: len(pair.layout.batch)], wide_dtype(pair.a, gradient.b)
    a = pair.a.astype(wide).reshape(*batch, -1, pair.rank)
    b = gradient.b.astype(wide).reshape(*batch, pair.rank, -1)
    gram = jnp.matmul(a.mT, a, precision="highest")
    inverse = jnp.linalg.pinv(gram, hermitian=True)
    squared = jnp.square(jnp.reshape(jnp.asarray(pair.scale, wide), (*jnp.shape(pair.scale), 1, 1)))
    projected = jnp.matmul(inverse, b, precision="highest") / jnp.broadcast_to(squared, (*batch, 1, 1))
    return dataclasses.replace(gradient, b=projected.reshape(gradient.b.shape).astype(gradient.b.dtype))

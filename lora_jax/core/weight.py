"""A parameter that is not one array: `base + sum of terms`, each term a product of small factors.

`Weight` is what flows through `lora(fn)` in an adapted parameter's place. Each dimension of each factor lies along one axis of
the weight, or along the rank. Moving the weight (transpose, reshape, slice) moves the base and relabels the factors; only a
product with an activation uses them, and then without multiplying them with each other first.

While `usage` looks at how a function uses a parameter, the terms are *probes*: one factor for each axis of the parameter, whose
`origin` remembers that axis. Every rule that moves a weight then serves both.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core import jax_compat

RANK = -1


class NotLowRank(Exception):
    """Raised by a rule that cannot keep a weight's terms as factors; the walk decides what then."""


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter, read off the equation that consumes it.

    Args:
      kind: `"product"` (contracted with an activation), `"lookup"` (rows picked by index) or `"other"` (not low-rank).
      primitive: the consuming JAX primitive.
      site: `file:line (function)`.
      roles: the role of each axis of the parameter: `"in"`, `"out"`, `"batch"` (a batch axis of the product) or `"stack"` (one
        index of it reaches each product, as in a scan over layers).
      reason: why the use is not low-rank.
    """

    kind: str
    primitive: str
    site: str
    roles: tuple[str, ...] = ()
    reason: str = ""


@dataclasses.dataclass(eq=False)
class Log:
    """One walk over a function: its options, and what it found out: uses (of probes), and which paths reached a consumer.

    `key` turns dropout on; `active` is where adapters with an invocation sequence act.
    """

    probing: bool = False
    key: Any = None
    active: Any = None
    uses: dict[str, dict[Use, None]] = dataclasses.field(default_factory=dict)
    reached: set[str] = dataclasses.field(default_factory=set)
    counter: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    entered: list[jax_compat.Equation] = dataclasses.field(default_factory=list)

    def site(self, eqn: jax_compat.Equation) -> str:
        """Where the user's code makes an equation; for one inside JAX's own code, where it makes the call around it."""
        sites = map(jax_compat.call_site, [eqn, *reversed(self.entered)])
        return next(filter(None, sites), "an unknown place")

    def place(self, eqn: jax_compat.Equation | None) -> tuple[str, str]:
        """The primitive that takes a weight and its site; without an equation it is the function's own return."""
        return (eqn.primitive.name, self.site(eqn)) if eqn else ("return", "the end of the function")

    def record(self, path: str, use: Use) -> None:
        self.uses.setdefault(path, {})[use] = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes", "origin", "indexed"])
@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a term: `array`, and the axis of the weight (or RANK) that each of its dimensions lies along.

    `origin` and `indexed` serve probes: the parameter's axes that the factor stands for, and how a dynamic index picked
    from them: `"rows"` (a gather), `"slice"` (a dynamic slice) or not at all (`""`).
    """

    array: Any
    axes: tuple[int, ...]
    origin: tuple[int, ...] = ()
    indexed: str = ""

    def dim(self, axis: int) -> int:
        return self.axes.index(axis)

    def relabel(self, new: Mapping[int, int]) -> "Factor":
        """Give the axes new numbers; an axis without one has size 1 and is dropped."""
        gone = tuple(d for d, axis in enumerate(self.axes) if axis != RANK and axis not in new)
        axes = tuple(RANK if axis == RANK else new[axis] for axis in self.axes if axis == RANK or axis in new)
        return dataclasses.replace(self, array=lax.squeeze(self.array, gone) if gone else self.array, axes=axes)

    def along(self, axis: int, fn: Callable[[Any, int], Any]) -> "Factor":
        """Apply `fn(array, dim)` to the dimension along an axis, if there is one."""
        if axis not in self.axes:
            return self
        return dataclasses.replace(self, array=fn(self.array, self.dim(axis)))

    def laid_along(self, labels: Sequence[int], dtype: Any) -> Any:
        """The array with its dimensions in the order of `labels`, of size 1 along those that it lacks."""
        order = sorted(range(len(self.axes)), key=lambda d: list(labels).index(self.axes[d]))
        array = lax.transpose(self.array, order).astype(dtype)
        return lax.expand_dims(array, [place for place, label in enumerate(labels) if label not in self.axes])

    def explicit(self, axis: int, size: int) -> "Factor":
        """The factor with a dimension along an axis that it was constant along."""
        array = jnp.broadcast_to(self.array[None], (size, *self.array.shape))
        return dataclasses.replace(self, array=array, axes=(axis, *self.axes))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["shape", "dtype", "make", "slices"])
@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """A base that is made of other arrays where it is used, and never kept: `make(arrays)`.

    `slices`: whether `make` makes a slice along axis 0 from the slices of the arrays.
    """

    arrays: Any
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[Any], Any]
    slices: bool = False

    @property
    def ndim(self) -> int:
        return len(self.shape)


def is_deferred(value: Any) -> bool:
    return isinstance(value, Deferred)


def on_bases(fn: Callable[..., list[Any]], *operands: Any) -> list[Any]:
    """`fn(*operands)`; deferred again if an operand is."""
    if not any(map(is_deferred, operands)):
        return fn(*operands)
    make, arrays = _opened(fn, operands)
    pick = lambda i: lambda arrays: make(*arrays)[i]
    return [Deferred(arrays, spec.shape, spec.dtype, pick(i)) for i, spec in enumerate(jax.eval_shape(make, *arrays))]


def use(fn: Callable[..., Any], *operands: Any) -> Any:
    """`fn(*operands)`, with deferred ones made, for the backward pass once more."""
    if not any(map(is_deferred, operands)):
        return fn(*operands)
    make, arrays = _opened(fn, operands)
    return jax.checkpoint(make)(*arrays)


def _opened(fn: Callable[..., Any], operands: Sequence[Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`fn` on the arrays that deferred operands are made of, and these arrays."""
    arrays = tuple(v.arrays if is_deferred(v) else v for v in operands)
    return lambda *arrays: fn(*(v.make(a) if is_deferred(v) else a for v, a in zip(operands, arrays))), arrays


def unstack_base(base: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The arrays of a base for scanning along axis 0, and how to make the base of one slice from theirs."""
    if not is_deferred(base):
        return base, lambda array: array
    if not base.slices:
        return use(lambda array: array, base), lambda array: array
    return base.arrays, lambda arrays: dataclasses.replace(base, arrays=arrays, shape=base.shape[1:])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "gains", "excess", "bias", "active", "tap", "key"],
    meta_fields=["path", "log", "scale", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """`scale` times the product of factors, summed over the rank: (A, B) of one adapter, or a probe factor for each axis.

    `gains` are VeRA's scales, each along axes of one of the factors. `excess` is DoRA's `g - 1`, as a product of factors, by
    which the base counts more (B holds its own g); `bias` is what a product gives more. `active` `(batch, tokens)` says for
    which rows of x the term counts. A `tap` makes no change, but takes in `[x; 1] [x; 1]^T` as its gradient.
    """

    factors: tuple[Factor, ...]
    path: str
    log: Log
    scale: float = 1.0
    dropout: float = 0.0
    key: Any = None
    gains: tuple[Factor, ...] = ()
    excess: tuple[Factor, ...] = ()
    bias: Factor | None = None
    active: Any = None
    tap: Factor | None = None

    @property
    def parts(self) -> tuple[Factor, ...]:
        """All that moves with the weight."""
        return (*self.factors, *self.gains, *self.excess, *filter(None, (self.bias, self.tap)))

    def map(self, fn: Callable[[Factor], Factor]) -> "Term":
        """`fn` applied to each part, in the order of `parts`."""
        many = {name: tuple(map(fn, getattr(self, name))) for name in ("factors", "gains", "excess")}
        return dataclasses.replace(self, **many, bias=self.bias and fn(self.bias), tap=self.tap and fn(self.tap))

    @property
    def picked(self) -> bool:
        """Whether a dynamic index picked rows, so that the term may be multiplied out without forming AB."""
        return any(factor.indexed for factor in self.factors)

    @property
    def rowwise(self) -> str:
        """What of the term depends on the rows of x, so that plain products alone can take it; empty if nothing."""
        return "an invocation sequence" if self.active is not None else "inputs to be summed up" if self.tap else ""

    @property
    def needs_product(self) -> str:
        """What of the term the weight alone can't hold, only a product with it; empty if nothing."""
        return self.rowwise or ("a bias" if self.bias is not None else "")

    def absorbed(self) -> "Term":
        """The same with the gains multiplied into the factors."""
        factors = list(self.factors)
        for gain in self.gains:
            at = next(i for i, factor in enumerate(factors) if set(gain.axes) <= set(factor.axes))
            array = scaled_along(factors[at].array, [gain], factors[at].axes)
            factors[at] = dataclasses.replace(factors[at], array=array)
        return dataclasses.replace(self, factors=tuple(factors), gains=())

    def scaled(self, array: Any) -> Any:
        """`scale` times an array: of the products, the one inside, which is the smallest."""
        return array if self.scale == 1.0 else array * self.scale


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "terms"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Weight:
    """`base + sum of terms`, of the base's shape and dtype. A quantised parameter is one even without terms."""

    base: Any
    terms: tuple[Term, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def probing(self) -> bool:
        return any(term.log.probing for term in self.terms)

    @property
    def picked(self) -> bool:
        return bool(self.terms) and all(term.picked for term in self.terms)

    def move(self, base: Any, fn: Callable[[Factor], Factor]) -> "Weight":
        """A new base, and `fn` applied to each factor."""
        return Weight(base, tuple(term.map(fn) for term in self.terms))

    def fold_key(self, index: Any) -> "Weight":
        """The weight in one iteration of a loop: its dropout keys depend on the iteration."""
        fold = lambda term: term if term.key is None else dataclasses.replace(term, key=jax.random.fold_in(term.key, index))
        return Weight(self.base, tuple(map(fold, self.terms)))

    @property
    def keyed(self) -> bool:
        return any(term.key is not None for term in self.terms)

    @property
    def needs_product(self) -> str:
        """What of an adapter the weight alone can't hold, only a product with it; empty if nothing."""
        return next(filter(None, (term.needs_product for term in self.terms)), "")

    @property
    def rowwise(self) -> str:
        """What of an adapter plain products alone can take; empty if nothing."""
        return next(filter(None, (term.rowwise for term in self.terms)), "")

    def divide(self, axes: Iterable[int]) -> None:
        """Raise NotLowRank if these axes must not be taken apart: then several products would each add a bias."""
        if any(axis not in term.bias.axes for axis in axes for term in self.terms if term.bias is not None):
            raise NotLowRank("an in axis is taken apart, and its adapter has a bias, which only the whole product can take")

    def paths(self) -> list[str]:
        return [term.path for term in self.terms]

    def reach(self) -> None:
        """Note that the terms took part in a result."""
        for term in self.terms:
            term.log.reached.add(term.path)

    @functools.cached_property
    def value(self) -> Any:
        """`base + terms` multiplied out, in the base's dtype; of a probe, the base."""
        self.reach()
        if self.probing:
            return self.base
        if self.needs_product:
            raise NotLowRank(f"it has {self.needs_product}, which a product alone can take")
        if not self.terms:
            return use(lambda base: base, self.base)
        total = functools.reduce(jnp.add, [_multiply_out(term, self.shape) for term in self.terms])
        # In the wider dtype, so that rows that replace the base's do so to rounding.
        with jax.numpy_dtype_promotion("standard"):
            base = use(lambda base: base, self.base).astype(jnp.promote_types(self.base.dtype, total.dtype))
        value = base + total.astype(base.dtype)
        for term in self.terms:
            if term.excess:
                value = value + scaled_along(base, term.excess, range(len(self.shape)))
        return value.astype(self.base.dtype)


def is_weight(value: Any) -> bool:
    return isinstance(value, Weight)


def contract(x: Any, x_labels: Sequence[int], y: Any, y_labels: Sequence[int], out: Sequence[int], **options: Any) -> Any:
    """`einsum` of two arrays with integer labels, as one `dot_general` (and a transpose where the order asks for one).

    A label of `out` that neither operand has is a new axis of size 1.
    """
    keep, shared = set(out), set(x_labels) & set(y_labels)
    x, x_labels = _sum_out(x, x_labels, keep | shared)
    y, y_labels = _sum_out(y, y_labels, keep | shared)
    batch = [label for label in x_labels if label in shared and label in keep]
    summed = [label for label in x_labels if label in shared and label not in keep]
    dims = lambda labels, chosen: tuple(labels.index(label) for label in chosen)
    numbers = ((dims(x_labels, summed), dims(y_labels, summed)), (dims(x_labels, batch), dims(y_labels, batch)))
    labels = [*batch, *(i for i in x_labels if i not in shared), *(i for i in y_labels if i not in shared)]
    result = lax.dot_general(x, y, numbers, out_sharding=_out_sharding(x, x_labels, y, y_labels, labels), **options)
    order = [labels.index(label) for label in out if label in labels]
    if order != sorted(order):
        result = lax.transpose(result, order)
    missing = [position for position, label in enumerate(out) if label not in labels]
    return lax.expand_dims(result, missing) if missing else result


def _out_sharding(x: Any, x_labels: Sequence[int], y: Any, y_labels: Sequence[int], out: Sequence[int]) -> jax.P | None:
    """On a mesh with explicit axes, the sharding of a product: each axis as in the operand that has it, x before y."""
    entries: dict[int, tuple[str, ...]] = {}
    for array, labels in ((x, x_labels), (y, y_labels)):
        for label, entry in zip(labels, jax.typeof(array).sharding.spec):
            names = (entry,) if isinstance(entry, str) else tuple(entry or ())
            taken = {name for kept in out for name in entries.get(kept, ())}
            if not entries.get(label):
                entries[label] = tuple(name for name in names if name not in taken)
    return jax.P(*(entries[label] or None for label in out)) if any(entries.values()) else None


def _sum_out(x: Any, labels: Sequence[int], keep: set[int]) -> tuple[Any, list[int]]:
    """Sum over the axes whose label nothing else needs."""
    gone = tuple(d for d, label in enumerate(labels) if label not in keep)
    return (jnp.sum(x, gone) if gone else x), [label for label in labels if label in keep]


def scaled_along(array: Any, factors: Sequence[Factor], labels: Sequence[int]) -> Any:
    """An array whose axes have these labels, times factors that lie along some of them."""
    return functools.reduce(lambda x, factor: x * factor.laid_along(labels, x.dtype), factors, array)


def _multiply_out(term: Term, shape: tuple[int, ...]) -> Any:
    """The product of a term's two factors, broadcastable to the weight's shape."""
    (a, b), out = term.absorbed().factors, range(len(shape))
    return contract(a.array, a.axes, term.scaled(b.array), b.axes, list(out), precision="highest")


def two_step(x: Any, x_labels: Sequence[int], term: Term, out: Sequence[int], precision: Any, dtype: Any) -> Any:
    """`sum over labels of x A B` as `(x A) B` or `(x B) A`, whichever has fewer multiplications; AB is never formed.

    The factors are cast to the dtype of x, as a layer casts its kernel. A gain scales the smallest array that it lies along.
    """
    float_dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else term.factors[0].array.dtype
    x = x.astype(float_dtype)
    inner, after, before, rest = _sorted_gains(term, x_labels, out)
    term, x = dataclasses.replace(term, gains=rest).absorbed(), scaled_along(x, before, x_labels)
    sizes = {RANK: 1} | dict(zip(x_labels, x.shape))
    for factor in term.factors:
        sizes |= dict(zip(factor.axes, factor.array.shape))
    volume = lambda labels: math.prod(sizes[label] for label in labels)

    def middle(first: Factor, second: Factor) -> list[int]:
        wanted = {*second.axes, *out}
        held = dict.fromkeys([*x_labels, *first.axes])
        return [label for label in held if label in wanted]

    def cost(first: Factor, second: Factor) -> int:
        return volume({*x_labels, *first.axes}) + volume({*middle(first, second), *second.axes})

    a, b = term.factors
    first, second = (a, b) if cost(a, b) <= cost(b, a) else (b, a)
    labels = middle(first, second)
    z = contract(x, x_labels, first.array.astype(float_dtype), first.axes, labels, precision=precision)
    z = term.scaled(scaled_along(z, inner, labels))
    options = {"precision": precision, "preferred_element_type": dtype}
    return scaled_along(contract(z, labels, second.array.astype(float_dtype), second.axes, out, **options), after, out)


def _sorted_gains(term: Term, x_labels: Sequence[int], out: Sequence[int]) -> tuple[tuple[Factor, ...], ...]:
    """A term's gains by what they can scale: the inner product, the result, x, or a factor alone."""
    axes = lambda gain: set(gain.axes)
    tests = (
        lambda gain: RANK in gain.axes,
        lambda gain: axes(gain) <= set(out),
        lambda gain: axes(gain) <= set(x_labels),
        lambda gain: True,
    )
    places = [next(place for place, test in enumerate(tests) if test(gain)) for gain in term.gains]
    return tuple(tuple(gain for gain, at in zip(term.gains, places) if at == place) for place in range(len(tests)))


def dropout(x: Any, term: Term) -> Any:
    """The input of a term's branch: dropped out where the caller gave a key, with a new mask for each use.

    Inside `shard_map` each shard that x varies over draws its own mask; with `check_vma=False` JAX does not know which those
    are, and all shards draw the same one.
    """
    if term.key is None or term.dropout == 0.0:
        return x
    key = jax.random.fold_in(term.key, next(term.log.counter))  # a new one for each use
    for axis in sorted(jax.typeof(x).manual_axis_type.varying):
        key = jax.random.fold_in(key, lax.axis_index(axis))
    mask = jax.random.bernoulli(key, 1.0 - term.dropout, x.shape)
    return jnp.where(mask, x / (1.0 - term.dropout), jnp.zeros_like(x))

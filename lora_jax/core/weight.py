"""A parameter that is a base and small factors: `base + sum of terms`.

A `Weight` is what flows through `lora(fn)` in an adapted parameter's place. Each dimension of each factor of a term lies
along one axis of the weight, or along the rank. A factor that lacks an axis is constant along it, or the axis has size 1; an
axis that both A and B have is a batch axis, along which there is a stack of pairs. A rule that moves the weight
(`rules/moves.py`: transpose, reshape, slice) moves the base and relabels the factors; only a product with an activation
(`rules/products.py`) uses them, and then without multiplying them with each other first.

A product is `x W + sum of branches`, and the branch of a pair is `y = s (x A) B` with the steps of its methods around it:

    x = method.before(x)    dropout
    z = x A                 or x B, where fewer numbers are multiplied so
    z = method.inside(z)    VeRA's inner vector
    y = z B
    y = method.after(y)     DoRA's magnitude, a bias, aLoRA's mask
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from lora_jax.core import jax_compat, programs
from lora_jax.core.contraction import contract, explicit_sharding
from lora_jax.core.deferred import is_deferred, placed, unstack_base, use
from lora_jax.core.errors import NotLowRankError
from lora_jax.core.factor import Factor
from lora_jax.core.interpreter import Context, Equation, ImplicitArray, NotLowRank, Rule

IN_AND_OUT = "it is multiplied elementwise with an array that varies along in and out axes at once"

if TYPE_CHECKING:
    from lora_jax.core.rules.products import Product


@dataclasses.dataclass(eq=False)
class FactoredContext(Context):
    """A walk that knows which of its arrays are broadcast: such an array may scale a weight along the axes that it has."""

    broadcasts: dict[int, Factor] = dataclasses.field(default_factory=dict)

    def handles(self, eqn: Equation, values: Sequence[Any]) -> bool:
        return super().handles(eqn, values) or eqn.primitive.name == "broadcast_in_dim"

    def add_broadcast(self, array: Any, factor: Factor) -> None:
        """Note that an array is a factor, broadcast; as long as there is that array."""
        self.broadcasts[id(array)] = factor
        weakref.finalize(array, self.broadcasts.pop, id(array))

    def without_broadcast(self, array: Any) -> Factor:
        """An array with the axes that it varies along."""
        axes = range(jnp.ndim(array))
        one = {axis: axis for axis in axes if array.shape[axis] != 1}
        return self.broadcasts.get(id(array)) or Factor(array, tuple(axes)).relabel(one)


@dataclasses.dataclass(eq=False)
class WeightContext(FactoredContext):
    """A walk with weights: whether they may be formed, how many masks were drawn, and the activations that bases multiply."""

    materialize: bool = False
    masks: int = 0
    for_bases: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def enter(self, rule: Rule, eqn: Equation, values: Sequence[Any]) -> list[Any]:
        return super().enter(rule, eqn, values) if self.kernel else programs.run(self, rule, eqn, values)

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        outer, self.for_bases = self.for_bases, {}
        try:
            yield
        finally:
            self.for_bases = outer

    def for_base(self, x: Any) -> Any:
        """An activation for its products with bases: the same, by another name.

        So its cotangents of q, k and v are added to each other before those of the branches, and what each would sum over a
        mesh is summed once, as without adapters. A name costs nothing in a compiled program.
        """
        if not jax_compat.is_traced(x):
            return x
        if id(x) not in self.for_bases:
            self.for_bases[id(x)] = x, jnp.copy(x)
        return self.for_bases[id(x)][1]


@dataclasses.dataclass(frozen=True)
class Term:
    """What a parameter has beside its base: factors that move with it.

    Args:
      factors: what moves.
      path: the parameter's path.
    """

    factors: tuple[Factor, ...]
    path: str

    @property
    def rowwise(self) -> str:
        """What of it depends on the rows of x, so that plain products alone can take it; empty if nothing."""
        return ""

    @property
    def needs_product(self) -> str:
        """What of it the weight alone can't hold, only a product with it; empty if nothing."""
        return ""

    @property
    def keyed(self) -> bool:
        """Whether it holds a PRNG key."""
        return False

    @property
    def parts(self) -> list[Factor]:
        """All the factors that `map` maps, in its order: A and B, and those of the methods."""
        found: list[Factor] = []
        self.map(lambda part: found.append(part) or part)
        return found

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        """`fn` applied to all that moves with the weight."""
        return dataclasses.replace(self, factors=tuple(map(fn, self.factors)))

    def map_keys(self, fn: Callable[[Any], Any]) -> Self:
        """`fn` applied to the PRNG keys."""
        return self

    def divide(self, axes: Sequence[int]) -> None:
        """Raise NotLowRank if no part of these axes (a slice, rows, a sum) may be taken: a rule asks before it does so."""

    def times(self, fn: Callable[[Factor], Factor], axes: Sequence[int] = ()) -> Self:
        """The term of a weight that is multiplied with a number, or elementwise with an array that lies along `axes` alone.

        `fn` multiplies one factor with it. Raises NotLowRank where none has all the axes.
        """
        raise NotImplementedError

    def masked(self, mask: Factor, fn: Callable[[Factor], Factor]) -> Self:
        """The term of a weight that a mask puts other numbers into, where the term is zero: `fn` masks one factor."""
        return self.times(fn, mask.axes)

    def with_axis(self, axis: int, size: int) -> Self:
        """The same with an explicit dimension along an axis where weights are joined: a term is zero outside its own place."""
        if any(axis in factor.axes for factor in self.factors):
            return self
        first, *others = self.factors
        return dataclasses.replace(self, factors=(first.explicit(axis, size), *others))

    def added(self, context: WeightContext, product: "Product", result: Any) -> Any:
        """The result of a product with what the term adds."""
        raise NotImplementedError

    @property
    def gathered(self) -> bool:
        """Whether a dynamic index picked rows, so that the term may be multiplied out without forming AB."""
        return any(factor.indexed for factor in self.factors)


class Method:
    """What a method of fine-tuning adds to the branch of a pair: see the folder `methods`, one file for each.

    Subclasses are dataclasses and pytrees, whose `Factor`s `map` moves with the weight.
    """

    rowwise: ClassVar[str] = ""
    needs_product: ClassVar[str] = ""
    keyed: ClassVar[bool] = False

    def before(self, context: WeightContext, product: "Product", x: Any) -> Any:
        """The input of the branch."""
        return x

    def inside(self, product: "Product", z: Any, labels: Sequence[int]) -> Any:
        """The product with the first factor; `labels` says along which axes of the weight and of x its axes lie."""
        return z

    def after(self, term: "LowRankTerm", product: "Product", x: Any, y: Any) -> Any:
        """The branch; x is its input."""
        return y

    def dense(self, value: Any, base: Any) -> Any:
        """The whole weight `base + s A B`, for a use that needs it."""
        return value

    def folded(self, factors: tuple[Factor, ...], product: "Product | None") -> tuple[Factor, ...]:
        """A and B with what of the method neither `before`, `inside` nor `after` can do in this product (None: without one)."""
        return factors

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        """`fn` applied to each factor of the method."""
        return self

    def map_keys(self, fn: Callable[[Any], Any]) -> Self:
        """`fn` applied to the PRNG keys of the method."""
        return self

    def with_axis(self, axis: int, size: int) -> Self:
        """The same with an explicit dimension along an axis that it may be constant along."""
        return self

    def divide(self, axes: Sequence[int]) -> None:
        """Raise NotLowRank if these axes must not be taken apart."""

    def times(self) -> None:
        """Raise NotLowRank if the weight must not be multiplied with anything."""

    def masked(self, mask: Factor) -> Self:
        """The same beside a base that a mask puts other numbers into."""
        return self


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["factors", "methods"], meta_fields=["path", "scale", "branch_dtype"]
)
@dataclasses.dataclass(frozen=True)
class LowRankTerm(Term):
    """`scale A B`, summed over the rank, with the steps of its methods.

    In products the branch has the dtype of x, or `branch_dtype` and is added in the wider one.
    """

    scale: float = 1.0
    methods: tuple[Method, ...] = ()
    branch_dtype: Any = None

    @property
    def rowwise(self) -> str:
        return _first(method.rowwise for method in self.methods)

    @property
    def needs_product(self) -> str:
        return _first(method.needs_product for method in self.methods)

    @property
    def keyed(self) -> bool:
        return any(method.keyed for method in self.methods)

    def map(self, fn: Callable[[Factor], Factor]) -> Self:
        methods = tuple(method.map(fn) for method in self.methods)
        return dataclasses.replace(self, factors=tuple(map(fn, self.factors)), methods=methods)

    def map_keys(self, fn: Callable[[Any], Any]) -> Self:
        return dataclasses.replace(self, methods=tuple(method.map_keys(fn) for method in self.methods))

    def divide(self, axes: Sequence[int]) -> None:
        for method in self.methods:
            method.divide(axes)

    def times(self, fn: Callable[[Factor], Factor], axes: Sequence[int] = ()) -> Self:
        for method in self.methods:
            method.times()
        able = [i for i, factor in enumerate(self.factors) if set(axes) <= set(factor.axes)]
        if not able:
            raise NotLowRank(IN_AND_OUT)
        factors = tuple(fn(factor) if i == able[-1] else factor for i, factor in enumerate(self.factors))
        return dataclasses.replace(self, factors=factors)

    def masked(self, mask: Factor, fn: Callable[[Factor], Factor]) -> Self:
        methods = tuple(method.masked(mask) for method in self.methods)
        return dataclasses.replace(super().masked(mask, fn), methods=methods)

    def with_axis(self, axis: int, size: int) -> Self:
        methods = tuple(method.with_axis(axis, size) for method in self.methods)
        return dataclasses.replace(super().with_axis(axis, size), methods=methods)

    def added(self, context: WeightContext, product: "Product", result: Any) -> Any:
        x = start = product.branch_input if self.branch_dtype is None else product.branch_input.astype(self.branch_dtype)
        for method in self.methods:
            x = method.before(context, product, x)
        y = product.low_rank(x, self.folded(product), lambda z, labels: self._inside(product, z, labels))
        y = y.astype(self._sum_dtype(result.dtype))
        for method in self.methods:
            y = method.after(self, product, product.x if x is start else x, y)
        if product.sharding is not None:  # a mesh with explicit axes
            y = reshard(y, product.sharding)
        return (result.astype(y.dtype) + y).astype(result.dtype)

    def _sum_dtype(self, dtype: Any) -> Any:
        """The dtype in which the branch is added to a result of this one."""
        with jax.numpy_dtype_promotion("standard"):
            return dtype if self.branch_dtype is None else jnp.promote_types(dtype, self.branch_dtype)

    def _inside(self, product: "Product", z: Any, labels: Sequence[int]) -> Any:
        for method in self.methods:
            z = method.inside(product, z, labels)
        return self._scaled(z)

    def _scaled(self, array: Any) -> Any:
        """`scale` times an array: of the products, the one inside, which is the smallest."""
        return array if self.scale == 1.0 else array * self.scale

    def folded(self, product: "Product | None") -> tuple[Factor, ...]:
        """A and B as a product uses them; without one, as they are multiplied out."""
        return functools.reduce(lambda factors, method: method.folded(factors, product), self.methods, self.factors)

    def multiplied_out(self, base: Any) -> Any:
        """`scale A B`, broadcastable to the base's shape."""
        (a, b), axes, sharding = self.folded(None), list(range(base.ndim)), explicit_sharding(base)
        return contract(a.array, a.axes, self._scaled(b.array), b.axes, axes, sharding, precision="highest")


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "terms"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Factored(ImplicitArray):
    """A base and terms whose factors move with it: what `Weight` and `explain`'s `Probe` share."""

    base: Any
    terms: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def varies(self) -> set[int]:
        """The axes that it may vary along."""
        return set(range(len(self.shape)))

    @property
    def keyed(self) -> bool:
        return any(term.keyed for term in self.terms)

    @property
    def rowwise(self) -> str:
        """What of an adapter plain products alone can take; empty if nothing."""
        return _first(term.rowwise for term in self.terms)

    @property
    def needs_product(self) -> str:
        """What of an adapter the weight alone can't hold, only a product with it; empty if nothing."""
        return _first(term.rowwise or term.needs_product for term in self.terms)

    def paths(self) -> list[str]:
        """The parameters that it is made of."""
        return [term.path for term in self.terms]

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same with other paths."""
        return self.with_terms(self.base, [dataclasses.replace(term, path=names[term.path]) for term in self.terms])

    # --- moving

    def move(self, base: Any, fn: Callable[[Factor], Factor]) -> Self:
        """A new base, and `fn` applied to each factor."""
        return self.with_terms(base, [term.map(fn) for term in self.terms])

    def divide(self, axes: Iterable[int]) -> None:
        """Raise NotLowRank if these axes must not be taken apart."""
        axes = list(axes)
        for term in self.terms:
            term.divide(axes)

    def join_axes(self, groups: Sequence[set[int]]) -> Self:
        """The same before a reshape makes one axis of each group."""
        return self

    def with_terms(self, base: Any, terms: Sequence[Any]) -> Self:
        """A new base and new terms: what `move` can't say, since it treats all terms alike."""
        return type(self)(base, tuple(terms))

    def joined(self, base: Any, terms: Sequence[Any], alone: bool) -> Self:
        """Terms of several weights on one base; `alone`: nothing else is joined to them."""
        return self.with_terms(base, terms)

    def can_index(self, axes: Sequence[int]) -> bool:
        """Whether an index into these axes looks rows up: it picks from one factor of each term, not from a stack of pairs."""
        holders = [factor for term in self.terms for factor in term.factors if set(axes) & set(factor.axes)]
        return len(holders) == len(self.terms)

    def unstack(self) -> tuple[Any, Callable[[Any], Self]]:
        """A factor without axis 0 is the same in every iteration and is closed over."""
        self.divide([0])
        base, rebuild_base = unstack_base(self.base)
        parts = [part for term in self.terms for part in term.parts]
        stacked = [jnp.moveaxis(part.array, part.dim(0), 0) if 0 in part.axes else None for part in parts]

        def rebuild(slices: Any) -> Self:
            slice_of_base, arrays = slices
            rest = iter(arrays)

            def one(factor: Factor) -> Factor:
                array = next(rest)
                axes = tuple(axis - 1 if axis > 0 else axis for axis in factor.axes if axis != 0)
                return dataclasses.replace(factor, array=factor.array if array is None else array, axes=axes)

            return self.move(rebuild_base(slice_of_base), one)

        return (base, stacked), rebuild

    def in_iteration(self, index: Any) -> Self:
        """With keys of its own."""
        if not self.keyed:
            return jax.tree.map(lambda leaf: leaf, self)
        fold = lambda key: jax.random.fold_in(key, index)
        return self.with_terms(self.base, [term.map_keys(fold) for term in self.terms])

    def constrained(self, sharding: Any) -> Self:
        """The base's sharding is fixed; the factors follow."""
        return self.move(placed(lax.with_sharding_constraint, self.base, sharding), lambda factor: factor)

    def shard_specs(self, spec: Any) -> Self:
        """Each factor is laid out as the weight's axes that it has."""
        if self.rowwise or is_deferred(self.base):
            raise NotLowRank(f"it has {self.rowwise or 'quantised blocks'}, for which a shard would need to know its place")
        self.divide(axis for axis, mesh_axis in enumerate(spec) if mesh_axis is not None)
        by_axis = dict(enumerate(spec))
        place = lambda f: dataclasses.replace(f, array=jax.P(*(by_axis.get(axis) for axis in f.axes)))
        moved = self.move(spec, place)
        return self.with_terms(spec, [term.map_keys(lambda key: jax.P()) for term in moved.terms])

    # --- used

    @property
    def gathered(self) -> bool:
        """Whether it is rows that a dynamic index picked."""
        return bool(self.terms) and all(term.gathered for term in self.terms)

    def is_lookup(self, roles: Mapping[int, str]) -> bool:
        """Whether gathered rows act as an activation: in a product as `roles` says, or in anything else (no roles).

        A product whose batch axes are the gathered ones, and that has in and out axes besides, uses a stack of kernels; one
        that contracts or keeps a dynamic slice uses a block of a kernel.
        """
        if not self.gathered:
            return False
        factors = [factor for term in self.terms for factor in term.factors]
        picked = {roles.get(axis) for factor in factors if factor.indexed for axis in factor.axes}
        rest = {roles.get(axis) for factor in factors if not factor.indexed for axis in factor.axes}
        if not roles:
            return bool(picked) or len(self.shape) <= 1
        stack = picked <= {"batch"} and {"in", "out"} <= rest
        block = any(factor.indexed == "slice" for factor in factors) and {"in", "out"} <= picked | rest
        return not (stack or block)

    def as_activation(self, context: Any, eqn: Equation | None) -> Any:
        """Gathered rows as an array, for an equation (or the return) that uses them as an activation; or itself."""
        return self.looked_up(context, eqn) if not self.needs_product and self.is_lookup({}) else self

    def looked_up(self, context: Any, eqn: Equation | None) -> Any:
        """Gathered rows as an array."""
        raise NotImplementedError

    def settled(self, context: Any) -> Any:
        """What a gather makes of it: rows become an array at once, where a dynamic slice stays a weight until it is used."""
        raise NotImplementedError

    def multiply(self, context: Any, product: "Product") -> Any:
        """The result of a product with an activation."""
        kernel = context.kernel
        if kernel is None:
            return self.multiplied(context, product)
        kernel.result = self.multiplied(context, kernel.behind(product))
        return kernel.result

    def multiplied(self, context: Any, product: "Product") -> Any:
        """The same, where it is known what multiplies the base."""
        raise NotImplementedError

    def multiply_pair(
        self, context: Any, eqn: Equation, roles: Mapping[int, str], other: Self, others: Mapping[int, str]
    ) -> Any:
        """The result of a product with another one."""
        raise NotImplementedError


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "terms"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Weight(Factored):
    """`base + sum of terms`, of the base's shape and dtype. A quantised parameter is one even without terms."""

    def multiplied(self, context: WeightContext, product: "Product") -> Any:
        product = product.renamed(context.for_base)
        result = product.result
        for term in self.terms:
            result = term.added(context, product, result)
        return result

    def multiply_pair(
        self, context: WeightContext, eqn: Equation, roles: Mapping[int, str], other: Self, others: Mapping[int, str]
    ) -> Any:
        raise NotLowRank("two adapted parameters are multiplied with each other")

    def looked_up(self, context: WeightContext, eqn: Equation | None) -> Any:
        return self.value()

    def settled(self, context: WeightContext) -> Any:
        return self.value() if self.gathered else self

    def as_array(self, context: WeightContext, eqn: Equation | None, reason: str) -> Any:
        rows = self.as_activation(context, eqn)
        if rows is not self:
            return rows
        if not self.terms:  # a quantised parameter without an adapter
            return self.value()
        name, site = context.place(eqn)
        which = f"{' and '.join(self.paths())} (shape {self.shape})"
        if not context.materialize:
            raise NotLowRankError(
                f"{which} cannot stay low-rank in `{name}` at {site}: {reason}. "
                "Exclude it from the targets, train it whole (LoraConfig(train=[...])), or form W + AB for such uses with "
                "lora(fn, on_unsupported='materialize'); explain(fn, params, ...) shows every use"
            )
        if self.needs_product:
            raise NotLowRankError(
                f"{which}: `{name}` at {site} needs the whole weight, which can't hold {self.needs_product}: {reason}"
            )
        return self.value()

    def value(self) -> Any:
        """`base + terms` multiplied out, in the base's dtype."""
        if self.needs_product:
            raise NotLowRank(f"it has {self.needs_product}, which a product alone can take")
        return self._value

    @functools.cached_property
    def _value(self) -> Any:
        base = use(lambda base: base, self.base)
        if not self.terms:
            return base
        total = functools.reduce(jnp.add, [term.multiplied_out(base) for term in self.terms])
        # In the wider dtype, so that rows that replace the base's do so to rounding.
        with jax.numpy_dtype_promotion("standard"):
            wide = base.astype(jnp.promote_types(base.dtype, total.dtype))
        value = wide + total.astype(wide.dtype)
        for method in (method for term in self.terms for method in term.methods):
            value = method.dense(value, wide)
        return value.astype(base.dtype)


def _first(reasons: Iterable[str]) -> str:
    return next(filter(None, reasons), "")

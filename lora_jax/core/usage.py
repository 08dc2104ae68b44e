"""How a function uses each of its parameters: the walk of `transform` with probes in place of weights, on shapes alone."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax.core import jax_compat, paths, quantized
from lora_jax.core.adapter import Layout, is_adapted
from lora_jax.core.collections import not_parameters
from lora_jax.core.contraction import contract
from lora_jax.core.factor import Factor
from lora_jax.core.interpreter import Equation, NotLowRank
from lora_jax.core.rules import RULES
from lora_jax.core.rules.products import Product
from lora_jax.core.text_table import text_table
from lora_jax.core.tracing import check_function, is_array, walk
from lora_jax.core.weight import IN_AND_OUT, Factored, FactoredContext, Term


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


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter and its uses.

    Args:
      path: its path.
      shape: its shape.
      dtype: its dtype.
      uses: each distinct use, in the order in which the function makes them.
      aside: what the tree says that it is, where that is no parameter (a collection beside `params`, an `nnx.BatchStat`).
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[Use, ...]
    aside: str = ""

    @property
    def kind(self) -> str:
        """`"linear"` (in products only), `"embedding"` (looked up, and perhaps in products), `"other"` or `"unused"`."""
        kinds = {use.kind for use in self.uses}
        if not kinds or "other" in kinds:
            return "other" if kinds else "unused"
        return "embedding" if "lookup" in kinds else "linear"

    @property
    def obstacle(self) -> str:
        """Why the parameter can't take a low-rank pair; empty if it can."""
        if self.kind == "unused":
            return "the function does not use it"
        for use in self.uses:
            if use.kind == "other":
                return f"`{use.primitive}` at {use.site}: {use.reason}"
        if not {"in", "out"} <= set(self._roles):
            return f"it has no {'out' if 'in' in self._roles else 'in'} axis, so a pair would save nothing"
        return ""

    @property
    def mixed(self) -> bool:
        """Whether products use it as a kernel, and something else does that is not low-rank."""
        kinds = {use.kind for use in self.uses}
        return {"product", "other"} <= kinds and len(self.shape) > 1 and not self.aside

    @property
    def behind_custom_rule(self) -> bool:
        """Whether it has the look of a kernel, but a function with a derivative rule of its own takes it."""
        rule = any(use.primitive.startswith("custom_") for use in self.uses)
        return rule and not self.aside and sum(size > 1 for size in self.shape) > 1

    @property
    def passed_over(self) -> str:
        """Why `targets="all-linear"` gives it no pair though it has two axes or more; empty if it does, or refuses it."""
        if len(self.shape) < 2 or self.mixed:
            return ""
        if self.aside:
            return f"it is no parameter but of {self.aside}"
        return "it is looked up: name it to adapt it" if self.kind == "embedding" and not self.obstacle else self.obstacle

    @property
    def _roles(self) -> tuple[str, ...]:
        by_kind = {use.kind: use.roles for use in reversed(self.uses)}
        return by_kind.get("lookup") or by_kind.get("product", ())

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes along which the function takes one matrix at a time, as a scan over layers does."""
        return tuple(axis for axis, role in enumerate(self._roles) if role == "stack")

    @property
    def layout(self) -> Layout:
        """Which axes are batch, in and out, by the first lookup or else the first product."""
        axes = lambda *roles: tuple(axis for axis, role in enumerate(self._roles) if role in roles)
        return Layout(axes("batch", "stack"), axes("in"), axes("out"))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a function uses each parameter; prints as a table."""

    parameters: dict[str, Parameter]

    @property
    def passed_over(self) -> dict[str, str]:
        """`{path: reason}` of the parameters of two axes or more that `targets="all-linear"` gives no pair."""
        return {path: p.passed_over for path, p in self.parameters.items() if p.passed_over}

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("parameter", "shape", "use", "batch", "in", "out", "low-rank")]
        for p in self.parameters.values():
            axes = ("", "", "") if p.obstacle else (p.layout.batch, p.layout.inputs, p.layout.outputs)
            by = ", ".join(dict.fromkeys(use.primitive for use in p.uses))
            use = f"{p.kind} ({by})" if by else p.kind
            answer = f"no: {p.obstacle}" if p.obstacle else "yes"
            rows.append((p.path, str(p.shape), use, *(",".join(map(str, a)) for a in axes), answer))
        return text_table(rows, "lllllll")


def explain(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Explanation:
    """How `fn(params, *args, **kwargs)` uses each parameter, and which can't take a low-rank pair, and why.

    Nothing is computed: `fn` is traced on shapes, so arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: any function whose first argument is the parameter tree.
      params: the tree, with or without adapters.
      args: what `fn` takes after it.
      kwargs: likewise.

    Returns:
      An `Explanation`, which prints as a table; `parameters` has a `Parameter` for each path.

    Raises:
      InputError: two leaves of the tree have one path.
      TypeError: `fn` is no function, but a Flax module, say.

    >>> import jax.numpy as jnp
    >>> def model(params, ids):
    ...     return params["table"][ids] * params["scale"] @ params["w"].T
    >>> params = {"table": jnp.ones((9, 4)), "scale": jnp.ones(4), "w": jnp.ones((2, 4))}
    >>> for path, parameter in explain(model, params, jnp.array([1, 2])).parameters.items():
    ...     print(path, parameter.kind, parameter.layout if not parameter.obstacle else "-")
    scale other -
    table embedding Layout(batch=(), inputs=(0,), outputs=(1,))
    w linear Layout(batch=(), inputs=(1,), outputs=(0,))
    """
    check_function(fn)
    nodes, treedef = paths.flatten(params, is_leaf=is_adapted)
    leaves = [quantized.dense_shape(node.base if is_adapted(node) else node) for node in nodes.values()]
    context, reached = ProbeContext(RULES), set()

    def run(leaves: list[Any], args: Any, kwargs: Any) -> None:
        probes = [_probe(path, leaf) for path, leaf in zip(nodes, leaves)]
        _, used = walk(context, fn, treedef, leaves, probes, args, kwargs)
        reached.update(path for path, use in zip(nodes, used) if use)

    abstractly(run, leaves, args, kwargs)
    arrays = {path: leaf for path, leaf in zip(nodes, leaves) if hasattr(leaf, "dtype")}
    uses = {path: tuple(context.uses.get(path, ())) for path in arrays}
    aside = not_parameters(params)
    found = {path: _parameter(path, leaf, uses[path], path in reached) for path, leaf in arrays.items()}
    return Explanation({path: dataclasses.replace(p, aside=aside.get(path, "")) for path, p in found.items()})


def abstractly(fn: Callable[..., Any], *trees: Any) -> None:
    """Run `fn(*trees)` on shapes alone: arrays and `ShapeDtypeStruct`s are traced, every other leaf passes as it is."""
    flat, treedef = jax.tree.flatten(trees)
    dynamic = [is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat]

    def run(arrays: list[Any]) -> None:
        rest = iter(arrays)
        fn(*jax.tree.unflatten(treedef, [next(rest) if d else leaf for d, leaf in zip(dynamic, flat)]))

    jax.eval_shape(run, [leaf for d, leaf in zip(dynamic, flat) if d])


def _parameter(path: str, leaf: Any, uses: tuple[Use, ...], reached: bool) -> Parameter:
    if not uses and reached and (leaf.ndim == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating)):
        uses = (Use("other", "", "", reason="it is a scalar" if leaf.ndim == 0 else f"its dtype is {leaf.dtype}"),)
    return Parameter(path, tuple(leaf.shape), leaf.dtype, uses)


# --- probes


@dataclasses.dataclass(eq=False)
class ProbeContext(FactoredContext):
    """A walk with probes: the uses of each parameter, in order and each once."""

    uses: dict[str, dict[Use, None]] = dataclasses.field(default_factory=dict)

    def record(self, path: str, use: Use) -> None:
        self.uses.setdefault(path, {})[use] = None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["axes", "indexed", "origin", "is_sum"])
@dataclasses.dataclass(frozen=True)
class AxisFactor(Factor):
    """A factor that stands for some axes of the parameter, its `origin`, and moves as they do.

    `is_sum`: whether a sum was taken over them, as over the in axes of a product with ones.
    """

    origin: tuple[int, ...] = ()
    is_sum: bool = False

    def summed(self, axis: int) -> Self:
        return dataclasses.replace(super().summed(axis), is_sum=self.is_sum or axis in self.axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=["path", "scaled"])
@dataclasses.dataclass(frozen=True)
class ProbeTerm(Term):
    """One factor for each axis of a parameter.

    `scaled`: axes of the parameter along which one array scales it, so that not one may be in and another out.
    """

    factors: tuple[AxisFactor, ...]
    scaled: tuple[tuple[int, ...], ...] = ()

    def times(self, fn: Callable[[Factor], Factor], axes: Sequence[int] = ()) -> Self:
        """Which factor takes it the use will tell."""
        held = [factor.origin for factor in self.factors if set(axes) & set(factor.axes)]
        return dataclasses.replace(self, scaled=(*self.scaled, sum(held, ())))

    def roles(self, role: Callable[[AxisFactor], str]) -> tuple[str, ...]:
        """The role of each axis of the parameter, by that of its factor."""
        by_axis = {axis: role(factor) for factor in self.factors for axis in factor.origin}
        return tuple(by_axis[axis] for axis in sorted(by_axis))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "terms"], meta_fields=[])
@dataclasses.dataclass(eq=False)
class Probe(Factored):
    """A parameter that is moved like a weight, and records what it meets; its value is its base."""

    @property
    def varies(self) -> set[int]:
        return {axis for term in self.terms for factor in term.factors for axis in factor.axes}

    def join_axes(self, groups: Sequence[set[int]]) -> Self:
        """Axes that a reshape merges share a role from here on: one factor stands for them."""
        return self.with_terms(self.base, [_joined(term, groups) for term in self.terms])

    def joined(self, base: Any, terms: Sequence[Any], alone: bool) -> Self:
        if not alone:
            raise NotLowRank("it is joined to something that is not a parameter")
        return super().joined(base, terms, alone)

    def can_index(self, axes: Sequence[int]) -> bool:
        return True

    def settled(self, context: ProbeContext) -> Self:
        return self

    def multiplied(self, context: ProbeContext, product: Product) -> Any:
        self._record_product(context, product.eqn, product.roles)
        return product.result

    def multiply_pair(
        self, context: ProbeContext, eqn: Equation, roles: Mapping[int, str], other: Self, others: Mapping[int, str]
    ) -> Any:
        if set(self.paths()) & set(other.paths()):
            raise NotLowRank("it is multiplied with itself")
        self._record_product(context, eqn, roles)
        other._record_product(context, eqn, others)
        return jax_compat.bind(eqn, [self.base, other.base])[0]

    def _record_product(self, context: ProbeContext, eqn: Equation, roles: Mapping[int, str]) -> None:
        def role(factor: AxisFactor) -> str:
            held = {roles[axis] for axis in factor.axes}
            return next((role for role in ("in", "out", "batch") if role in held), "in" if factor.is_sum else "stack")

        self._record(context, eqn, "product", role)

    def looked_up(self, context: ProbeContext, eqn: Equation | None) -> Any:
        """Gathered axes are in, the others out."""
        self._record(context, eqn, "lookup", lambda factor: "in" if factor.indexed else "out")
        return self.base

    def _record(self, context: ProbeContext, eqn: Equation | None, kind: str, role: Callable[[AxisFactor], str]) -> None:
        name, site = context.place(eqn)
        for term in self.terms:
            roles = term.roles(role)
            crossed = any({"in", "out"} <= {roles[axis] for axis in axes} for axes in term.scaled)
            use = Use("other", name, site, reason=IN_AND_OUT) if crossed else Use(kind, name, site, roles)
            context.record(term.path, use)

    def as_array(self, context: ProbeContext, eqn: Equation | None, reason: str) -> Any:
        rows = self.as_activation(context, eqn)
        if rows is not self:
            return rows
        name, site = context.place(eqn)
        for term in self.terms:
            context.record(term.path, Use("other", name, site, reason=reason))
        return self.base


def _probe(path: str, leaf: Any) -> Any:
    """One factor for each axis, each of which remembers its axis."""
    if not is_array(leaf) or leaf.ndim == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    factors = [AxisFactor(jnp.zeros((size,)), (axis,), origin=(axis,)) for axis, size in enumerate(leaf.shape)]
    return Probe(leaf, (ProbeTerm(tuple(factors), path),))


def _joined(term: ProbeTerm, groups: Sequence[set[int]]) -> ProbeTerm:
    factors = list(term.factors)
    for axes in groups:
        together = [factor for factor in factors if axes & set(factor.axes)]
        apart = [factor for factor in factors if not axes & set(factor.axes)]
        factors = [*apart, functools.reduce(_outer, together)] if together else factors
    return dataclasses.replace(term, factors=tuple(factors))


def _outer(f: AxisFactor, g: AxisFactor) -> AxisFactor:
    labels = tuple(dict.fromkeys((*f.axes, *g.axes)))  # both may have been gathered by one index
    array = contract(f.array, f.axes, g.array, g.axes, labels)
    return AxisFactor(array, labels, f.indexed or g.indexed, f.origin + g.origin)

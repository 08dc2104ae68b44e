"""What each JAX primitive that uses a weight as a kernel does with it: `x W`, and what the weight's terms add.

A rule reads an equation as a `Product`, which knows what the base alone gives, and how a low-rank branch `(x A) B` and a factor
of the weight enter this kind of product. What becomes of it is the weight's to say (`Weight.multiply`, or `Probe.multiply`,
which records the use). A product knows nothing of adapters or methods.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from lora_jax.core import jax_compat
from lora_jax.core.contraction import contract, explicit_sharding
from lora_jax.core.deferred import use
from lora_jax.core.factor import RANK, Factor, scaled_along
from lora_jax.core.interpreter import Context, Equation, NotLowRank, is_implicit
from lora_jax.core.narrow import narrow_dot_general
from lora_jax.core.rules.kernels import Kernel
from lora_jax.core.weight import Factored

Inside = Callable[[Any, Sequence[int]], Any]


@dataclasses.dataclass(eq=False)
class Product:
    """One product of an activation x with a weight.

    Args:
      eqn: the equation.
      x: the activation.
      weight: the weight, of which a product uses the base.
      roles: what the product does with each axis of the weight: `"in"` (contracted), `"out"` or `"batch"`.
      kernel: a function that computes the product with the base in its place, where there is one.
      branch_input: the activation as a branch takes it: x by its first name.
    """

    eqn: Equation
    x: Any
    weight: Factored
    roles: Mapping[int, str]
    kernel: Kernel | None = dataclasses.field(default=None, kw_only=True)
    branch_input: Any = dataclasses.field(default=None, kw_only=True)

    labelled: ClassVar[bool] = False  # whether the axes of x and z have labels, so that a factor of the weight can scale them

    def __post_init__(self) -> None:
        self.branch_input = self.x if self.branch_input is None else self.branch_input

    def renamed(self, for_base: Callable[[Any], Any]) -> Self:
        """The same with another name of x for the base; a kernel's call has the names of its operands."""
        return self if self.kernel else dataclasses.replace(self, x=for_base(self.x))

    @property
    def x_labels(self) -> Sequence[int]:
        """The axis of the weight, or a number of its own, that each axis of x lies along."""
        return ()

    @property
    def out_labels(self) -> Sequence[int]:
        """The same for the result."""
        return ()

    def with_base(self, x: Any, kept: Sequence[int] = ()) -> Any:
        """`x W` with the base; in axes of the weight that are `kept` are not summed over, but stand in front."""
        raise NotImplementedError

    def low_rank(self, x: Any, factors: tuple[Factor, ...], inside: Inside) -> Any:
        """`inside(x A) B`."""
        raise NotImplementedError

    def base_result(self, x: Any, kept: Sequence[int] = ()) -> Any:
        """The same by the kernel, if there is one."""
        if self.kernel is None:
            return self.with_base(x, kept)
        if kept:
            raise NotLowRank("the adapter's magnitudes lie along axes that a kernel sums over")
        return self.kernel.with_base(self, x)

    @functools.cached_property
    def result(self) -> Any:
        """`x W` with the base."""
        return self.base_result(self.x)

    @functools.cached_property
    def sharding(self) -> jax.NamedSharding | None:
        """How the result lies on a mesh with explicit axes."""
        return explicit_sharding(self.result)

    @property
    def contracted(self) -> set[int]:
        """The axes of the weight that are summed over."""
        return {axis for axis, role in self.roles.items() if role == "in"}

    def rows(self, reason: str) -> Sequence[int]:
        """The labels of the axes of x that number its rows, where they are known; `reason`: what asks for them."""
        raise NotLowRank(f"it has {reason}, which plain products alone can take")

    def scaled_base(self, x: Any, gains: Sequence[Factor], dtype: Any) -> Any:
        """`x (W g)` with the base, for a g that is a product of factors of the weight.

        A factor that lies along in axes alone scales x instead; one along in and out axes (experts that one product sums
        over) needs a product that keeps those in axes.
        """
        out = self.out_labels
        on_x = [set(gain.axes) <= set(self.x_labels) - set(out) for gain in gains]
        before, after = ([gain for gain, on in zip(gains, on_x) if on == wanted] for wanted in (True, False))
        kept = sorted({axis for gain in after for axis in gain.axes} - set(out))
        same = x is self.x and not before and not kept
        x = scaled_along(x, before, self.x_labels).astype(self.x.dtype)
        scaled = scaled_along((self.result if same else self.base_result(x, kept)).astype(dtype), after, [*kept, *out])
        return jnp.sum(scaled, tuple(range(len(kept)))) if kept else scaled

    def along_outputs(self, part: Factor, others: set[int], dtype: Any) -> Any:
        """A factor that lies along the out axes, broadcastable to the result; `others` must be summed over."""
        if not set(part.axes) <= set(self.out_labels) or not others <= self.contracted:
            raise NotLowRank("the adapter's bias does not lie along the out axes of this use")
        return part.laid_along(self.out_labels, dtype)


@dataclasses.dataclass(eq=False)
class DotGeneral(Product):
    """`dot_general` in any orientation: x, A and B as einsums.

    Args:
      x_first: whether x is its left operand.
    """

    x_first: bool

    labelled: ClassVar[bool] = True

    @functools.cached_property
    def _axes(self) -> tuple[Sequence[int], Sequence[int], dict[int, int]]:
        """The batch axes and out axes of the weight, and for each axis of x that it shares the axis of the weight."""
        (lc, rc), (lb, rb) = self.eqn.params["dimension_numbers"]
        wc, xc, wb, xb = (rc, lc, rb, lb) if self.x_first else (lc, rc, lb, rb)
        out = [axis for axis in range(len(self.weight.shape)) if self.roles[axis] == "out"]
        return wb, out, dict(zip((*xc, *xb), (*wc, *wb)))

    @functools.cached_property
    def x_labels(self) -> Sequence[int]:
        n, (_, _, shared) = len(self.weight.shape), self._axes
        return [shared.get(d, n + d) for d in range(self.x.ndim)]

    @functools.cached_property
    def x_free(self) -> Sequence[int]:
        """The labels of the axes of x that the weight lacks."""
        n = len(self.weight.shape)
        return [label for label in self.x_labels if label >= n]

    @functools.cached_property
    def out_labels(self) -> Sequence[int]:
        batch, out, _ = self._axes
        return [*batch, *self.x_free, *out] if self.x_first else [*batch, *out, *self.x_free]

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        return {
            "precision": precision(self.eqn, self.x_first),
            "preferred_element_type": self.eqn.params["preferred_element_type"],
        }

    def with_base(self, x: Any, kept: Sequence[int] = ()) -> Any:
        if x is self.x and not kept:
            bind = lambda x, base: jax_compat.bind(self.eqn, [x, base] if self.x_first else [base, x])[0]
            return use(bind, x, self.weight.base)
        labels = [*kept, *self.out_labels]
        multiply = lambda x, base: contract(x, self.x_labels, base, range(base.ndim), labels, self.sharding, **self._options)
        return use(multiply, x, self.weight.base)

    def low_rank(self, x: Any, factors: tuple[Factor, ...], inside: Inside) -> Any:
        """`(x A) B` or `(x B) A`, whichever multiplies fewer numbers; A and B are cast to x's dtype, as a layer's kernel is.

        An x of another dtype than the product's own keeps it.
        """
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else factors[0].array.dtype
        first, second, labels = self._cheaper(x, *factors)
        cast, precision = lambda array: array.astype(dtype), self._options["precision"]
        narrow: Any = {"dot_general": narrow_dot_general}
        z = contract(cast(x), self.x_labels, cast(first.array), first.axes, labels, precision=precision, **narrow)
        z, b = inside(z, labels), cast(second.array)
        options = self._options | narrow | ({} if x.dtype == self.x.dtype else {"preferred_element_type": None})
        return contract(z, labels, b, second.axes, self.out_labels, self.sharding, **options)

    def _cheaper(self, x: Any, a: Factor, b: Factor) -> tuple[Factor, Factor, list[int]]:
        """Which factor comes first, which second, and the labels of the product with the first."""
        sizes = {RANK: 1} | dict(zip(self.x_labels, x.shape))
        for factor in (a, b):
            sizes |= dict(zip(factor.axes, factor.array.shape))
        volume = lambda labels: math.prod(sizes[label] for label in labels)

        def middle(first: Factor, second: Factor) -> list[int]:
            wanted = {*second.axes, *self.out_labels}
            return [label for label in dict.fromkeys([*self.x_labels, *first.axes]) if label in wanted]

        def cost(first: Factor, second: Factor) -> int:
            return volume({*self.x_labels, *first.axes}) + volume({*middle(first, second), *second.axes})

        first, second = (a, b) if cost(a, b) <= cost(b, a) else (b, a)
        return first, second, middle(first, second)

    def rows(self, reason: str) -> Sequence[int]:
        return self.x_free


def axis_roles(ndim: int, contracting: Sequence[int], batch: Sequence[int]) -> dict[int, str]:
    """What a product does with each axis of a weight."""
    return {axis: "in" if axis in contracting else "batch" if axis in batch else "out" for axis in range(ndim)}


def dot_general(context: Context, eqn: Equation, lhs: Any, rhs: Any) -> list[Any]:
    """`x W`, in any orientation."""
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    l_roles, r_roles = axis_roles(len(lhs.shape), lc, lb), axis_roles(len(rhs.shape), rc, rb)
    lhs, rhs = _operand(context, eqn, lhs, l_roles, rhs), _operand(context, eqn, rhs, r_roles, lhs)
    if is_implicit(lhs) and is_implicit(rhs):
        return [lhs.multiply_pair(context, eqn, l_roles, rhs, r_roles)]
    if is_implicit(rhs):
        return [rhs.multiply(context, DotGeneral(eqn, lhs, rhs, r_roles, x_first=True))]
    if is_implicit(lhs):
        return [lhs.multiply(context, DotGeneral(eqn, rhs, lhs, l_roles, x_first=False))]
    return jax_compat.bind(eqn, [lhs, rhs])


def _operand(context: Context, eqn: Equation, value: Any, roles: Mapping[int, str], other: Any) -> Any:
    """Gathered rows become an activation where the product uses them as one."""
    if is_implicit(value) and value.gathered and (is_implicit(other) or value.is_lookup(roles)):
        return value.looked_up(context, eqn)
    return value


def as_activation(context: Context, eqn: Equation, value: Any) -> Any:
    """Gathered rows as an array, for an equation that uses them as an activation; anything else as it is."""
    return value.as_activation(context, eqn) if is_implicit(value) else value


def precision(eqn: Equation, x_first: bool = True) -> Any:
    """The equation's precision, for a product that has x on the left."""
    found = eqn.params["precision"]
    return found[:: 1 if x_first else -1] if isinstance(found, tuple) else found

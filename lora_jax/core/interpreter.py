"""One walk over a jaxpr, for arrays that are never formed.

`evaluate` runs a jaxpr equation by equation. An operand may be an `ImplicitArray`: an object that stands for an array, made of
smaller ones. An equation without such an operand is evaluated as it stands; one with such an operand is given to the rule that
the context has for its primitive. A rule is `rule(context, eqn, *operands) -> results`, and may return implicit arrays again.
Where there is no rule, or a rule raises `NotLowRank`, the implicit array itself says what happens (`as_array`).

`lora` runs it with `Weight`s (`core/weight.py`), `explain` with `Probe`s (`core/usage.py`), and `many.lora` with rows' own
matrices (`training/ragged.py`). Control flow is entered and emitted again for all of them (`core/rules/control_flow.py`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lora_jax.core import jax_compat

Equation = jax_compat.Equation
Rule = Callable[..., list[Any]]


class NotLowRank(Exception):
    """Raised by a rule that cannot keep an implicit array as it is, with the reason."""


class ImplicitArray:
    """Stands for an array that is not formed. A pytree, whose leaves are the arrays that it is made of."""

    keyed = False  # whether it differs from one iteration of a loop to the next

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        raise NotImplementedError

    def as_array(self, context: Any, eqn: Equation | None, reason: str) -> Any:
        """The array for an equation (or for the function's return: None) that no rule covers, or an error with the reason."""
        raise NotImplementedError

    def unstack(self) -> tuple[Any, Callable[[Any], Any]]:
        """Its arrays with axis 0 in front, for scanning, and how to make one slice of it from theirs."""
        raise NotImplementedError

    def in_iteration(self, index: Any) -> Any:
        """The same inside one iteration of a loop, as a new object."""
        raise NotImplementedError

    def constrained(self, sharding: Any) -> Any:
        """The same with a sharding constraint."""
        raise NotImplementedError

    def shard_specs(self, spec: Any) -> Any:
        """A partition spec for each of its arrays, in its own structure; `spec` is that of the array it stands for."""
        raise NotImplementedError


def is_implicit(value: Any) -> bool:
    """Whether a value is an `ImplicitArray`."""
    return isinstance(value, ImplicitArray)


@dataclasses.dataclass(eq=False)
class Context:
    """One walk over a function: its rules, and the calls that it is inside of."""

    rules: Mapping[str, Rule]
    entered: list[Equation] = dataclasses.field(default_factory=list)
    kernel: Any = None  # the call of a registered function whose product is walked in its place

    def handles(self, eqn: Equation, values: Sequence[Any]) -> bool:
        """Whether an equation needs a rule."""
        return any(map(is_implicit, values))

    def apply(self, eqn: Equation, values: Sequence[Any]) -> list[Any]:
        """The results of an equation by its rule, or on plain arrays where no rule can be followed."""
        name = eqn.primitive.name
        try:
            if name not in self.rules:
                raise NotLowRank(_REASONS.get(name, "no rule keeps it low-rank"))
            return self.rules[name](self, eqn, *values)
        except NotLowRank as error:
            return jax_compat.bind(eqn, self.arrays(values, eqn, str(error)))

    def enter(self, rule: Rule, eqn: Equation, values: Sequence[Any]) -> list[Any]:
        """The results of an equation that has a body, by its rule."""
        return rule(self, eqn, *values)

    def arrays(self, values: Sequence[Any], eqn: Equation | None, reason: str) -> list[Any]:
        """Values as arrays, where that is allowed."""
        return [value.as_array(self, eqn, reason) if is_implicit(value) else value for value in values]

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """While one jaxpr is evaluated: what is made in it belongs to its trace."""
        yield

    @contextlib.contextmanager
    def inside(self, eqn: Equation) -> Iterator[None]:
        """While the body of an equation is walked."""
        self.entered.append(eqn)
        try:
            yield
        finally:
            self.entered.pop()

    @contextlib.contextmanager
    def through(self, kernel: Any) -> Iterator[None]:
        """While the product that stands for a kernel is walked."""
        self.kernel = kernel
        try:
            yield
        finally:
            self.kernel = None

    def place(self, eqn: Equation | None) -> tuple[str, str]:
        """A primitive, and where the user's code makes it, or makes the call around it; without an equation the return."""
        if eqn is None:
            return "return", "the end of the function"
        sites = map(jax_compat.call_site, [eqn, *reversed(self.entered)])
        return eqn.primitive.name, next(filter(None, sites), "an unknown place")


_REASONS: dict[str, str] = dict.fromkeys(("add", "sub"), "it is added to something, not multiplied with it")


def evaluate(context: Context, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """Evaluate an open jaxpr on values of which some are implicit; results may be implicit too."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
    read = lambda v: v.val if isinstance(v, jax_compat.Literal) else env[v]
    with context.frame():
        for eqn, done_with in zip(jaxpr.eqns, _last_uses(jaxpr)):
            values = [read(v) for v in eqn.invars]
            with jax_compat.source_scope(eqn):
                results = context.apply(eqn, values) if context.handles(eqn, values) else jax_compat.bind(eqn, values)
            env.update(zip(eqn.outvars, results))
            for v in done_with:  # so that an eager run holds no more than the function itself would
                del env[v]
    return [read(v) for v in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, jax_compat.Literal)}
    kept = {v for v in jaxpr.outvars if not isinstance(v, jax_compat.Literal)}
    done_with: list[list[Any]] = [[] for _ in jaxpr.eqns]
    for v, i in last.items():
        if v not in kept:
            done_with[i].append(v)
    return done_with

"""A call or a loop with weights as a program that is traced and compiled once, as `jax.jit` does for the function itself.

JAX keeps the body of a jitted function, or of a loop, for as long as the function lives: a program lives as long as that body.
It is made for a body, and JAX keeps one version of it for each structure of the operands; two parameters of one kind share it.
"""

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax.core import jax_compat
from lora_jax.core.interpreter import Equation, Rule, is_implicit

_programs: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(unsafe_hash=True)
class _Call:
    """What a program depends on beside its operands, and what one trace of it needs (and nothing else keeps).

    Args:
      primitive: the name of the equation's primitive.
      params: its parameters, with weak references to the bodies.
      donated: which operands are donated.
      materialize: as in the context.
      masks: the same.
      current: the context, the equation, its rule, and the path that each number stands for.
    """

    primitive: str
    params: Any
    donated: tuple[bool, ...]
    materialize: bool
    masks: int
    current: Any = dataclasses.field(compare=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Record:
    """What a walk leaves in its context."""

    masks: int


def run(context: Any, rule: Rule, eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """`rule(context, eqn, *values)` as a program, for a `WeightContext`."""
    paths = dict.fromkeys(path for value in values if is_implicit(value) for path in value.paths())
    numbers = {path: str(number) for number, path in enumerate(paths)}
    names = {number: path for path, number in numbers.items()}
    donates = eqn.params.get("donated_invars", (False,) * len(values))
    donated = tuple(donate and isinstance(value, jax.Array) for donate, value in zip(donates, values))
    params = tuple((name, _weakly(param)) for name, param in sorted(eqn.params.items()))
    call = _Call(eqn.primitive.name, params, donated, context.materialize, context.masks, (context, eqn, rule, names))
    operands = _renamed(values, numbers)
    given, kept = ([v for v, gives in zip(operands, donated) if gives is wanted] for wanted in (True, False))
    broadcasts = [context.broadcasts.get(id(value)) for value in values]
    try:
        results, record = _program(eqn)(call, given, kept, broadcasts)
    finally:
        call.current = None
    context.masks = record.masks
    return _renamed(results, names)


def forget() -> None:
    """Drop all programs, where the rules that they were made by have changed."""
    _programs.clear()


def _program(eqn: Equation) -> Callable[..., Any]:
    body = next(body for param in eqn.params.values() for body in _bodies(param))
    if body not in _programs:

        def program(call: _Call, given: list[Any], kept: list[Any], broadcasts: list[Any]) -> tuple[list[Any], _Record]:
            context, eqn, rule, names = call.current
            context = dataclasses.replace(context)  # which counts on its own
            sources = {True: iter(given), False: iter(kept)}
            values = _renamed([next(sources[gives]) for gives in call.donated], names)
            numbers = {path: number for number, path in names.items()}
            for value, factor in zip(values, broadcasts):
                if factor is not None:
                    context.add_broadcast(value, factor)
            results = _renamed(rule(context, eqn, *values), numbers)
            return results, _Record(context.masks)

        program.__name__ = eqn.params.get("name", eqn.primitive.name)
        _programs[body] = jax.jit(program, static_argnums=0, donate_argnums=1)
    return _programs[body]


def _renamed(values: Sequence[Any], names: Mapping[str, str]) -> list[Any]:
    return [value.renamed(names) if is_implicit(value) else value for value in values]


def _bodies(param: Any) -> list[Any]:
    """The jaxprs of an equation's parameter."""
    if isinstance(param, tuple | list):
        return [body for item in param for body in _bodies(item)]
    return [param] if hasattr(jax_compat.open_jaxpr(param)[0], "eqns") else []


def _weakly(param: Any) -> Any:
    """A parameter of an equation for comparison, that keeps no jaxpr alive."""
    if isinstance(param, tuple | list):
        return tuple(map(_weakly, param))
    return weakref.ref(param) if _bodies(param) else param

"""Everything that depends on the version of JAX: the only module that names `jax.extend`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import source_info_util
from jax.interpreters import partial_eval

Literal = jex.Literal
Equation = jex.JaxprEqn
Primitive = jex.Primitive


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr, open or closed, as (jaxpr with `eqns`, its constants).

    `ClosedJaxpr` wraps a `Jaxpr` up to JAX 0.11; in 0.12 one class does both.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def without_dead_code(jaxpr: Any) -> Any:
    """An open jaxpr without what no result and no effect needs, in its calls and loops too; its inputs stay."""
    live = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]
    before = {tuple(map(id, eqn.outvars)): eqn for eqn in jaxpr.eqns if eqn.outvars}  # an effect alone has no name

    def as_it_was(eqn: Equation) -> Equation:  # up to JAX 0.10 loops get new bodies, for which programs would be made again
        old = before.get(tuple(map(id, eqn.outvars)), eqn)
        return old if old.invars == eqn.invars and _size(old) == _size(eqn) else eqn

    return live.replace(eqns=list(map(as_it_was, live.eqns)))


def needed_inputs(jaxpr: Any, count: int) -> list[bool]:
    """Which inputs of an open jaxpr an effect or one of its first `count` results needs."""
    return partial_eval.dce_jaxpr(jaxpr, [place < count for place in range(len(jaxpr.outvars))])[1]


def _size(eqn: Equation) -> int:
    """How many equations there are in one."""
    params = [item for param in eqn.params.values() for item in (param if isinstance(param, tuple | list) else [param])]
    return 1 + sum(_size(inner) for item in params for inner in getattr(open_jaxpr(item)[0], "eqns", ()))


def is_traced(value: Any) -> bool:
    """Whether a value belongs to a trace, so that its numbers are not known."""
    return isinstance(value, Tracer)


def bind(eqn: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on plain values, exactly as it stands in the jaxpr."""
    if eqn.primitive.name.startswith("custom_"):  # a rule may do with its operands what NumPy constants of a jaxpr can't
        values = list(map(jnp.asarray, values))
    out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


class Scan(NamedTuple):
    """The operands of a `scan` equation, sorted, and its static options."""

    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    jaxpr: Any
    length: int
    reverse: bool
    unroll: int | bool


def scan_parts(eqn: Equation, values: Sequence[Any]) -> Scan:
    """Split a scan's operands into constants, carry and scanned inputs."""
    params = eqn.params
    if "num_consts" in params:  # up to JAX 0.10
        n, m = params["num_consts"], params["num_consts"] + params["num_carry"]
        parts = values[:n], values[n:m], values[m:]
    else:
        parts = params["ft_in"].update(values).unpack()
    consts, carry, xs = map(list, parts)
    return Scan(consts, carry, xs, params["jaxpr"], params["length"], params["reverse"], params["unroll"])


@contextlib.contextmanager
def source_scope(eqn: Equation) -> Iterator[None]:
    """What an equation is evaluated under: its traceback, its name stack (module names, as a profile shows them), its mesh."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def shape_of(variable: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a variable of a jaxpr."""
    return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def called_function(eqn: Equation) -> str:
    """`name at file:line` of the function that a call is of; empty for an equation without a body."""
    body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    info = getattr(open_jaxpr(body)[0], "debug_info", None)
    return info.func_src_info if info else ""


def call_site(eqn: Equation) -> str:
    """`file:line (function)` of the code that made the equation; the file of an installed package begins with its name."""
    return source_info_util.summarize(eqn.source_info).rpartition("/site-packages/")[2]


def bind_with(eqn: Equation, values: Sequence[Any], **params: Any) -> list[Any]:
    """Evaluate an equation with some of its parameters changed."""
    return bind(eqn.replace(params={**eqn.params, **params}), values)

"""Which values of a jaxpr depend on some of its inputs, sub-jaxprs included."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex

from lora_jax.core import jax_compat


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def dependents(jaxpr: Any, inputs: Sequence[bool], see: Callable[[Any, Any], None]) -> list[bool]:
    """Which results depend on the marked inputs; `see(eqn, aval)` is called for every value that does.

    A loop's carry is followed to a fixed point; a primitive whose sub-jaxprs are not known here taints all its results.
    """
    jaxpr = _open(jaxpr)
    marked = {v for v, mark in zip(jaxpr.invars, inputs, strict=True) if mark}
    for eqn in jaxpr.eqns:
        operands = [not isinstance(v, jex.Literal) and v in marked for v in eqn.invars]
        results = _results(eqn, operands, see) if any(operands) else [False] * len(eqn.outvars)
        for v, mark in zip(eqn.outvars, results, strict=True):
            if mark:
                marked.add(v)
                see(eqn, v.aval)
    return [not isinstance(v, jex.Literal) and v in marked for v in jaxpr.outvars]


def _results(eqn: Any, operands: list[bool], see: Callable[[Any, Any], None]) -> list[bool]:
    params = eqn.params
    if eqn.primitive.name == "scan":
        parts = jax_compat.scan_parts(eqn, operands)
        return _loop(params["jaxpr"], parts.consts, parts.carry, parts.xs, see)
    if eqn.primitive.name == "while":
        n = params["cond_nconsts"]
        m = n + params["body_nconsts"]
        return _loop(params["body_jaxpr"], operands[n:m], operands[m:], [], see)
    if eqn.primitive.name == "cond":
        outs = [dependents(branch, operands[1:], see) for branch in params["branches"]]
        return [any(marks) or operands[0] for marks in zip(*outs)]
    inner = params.get("jaxpr") or params.get("call_jaxpr")
    if inner is not None and len(_open(inner).invars) == len(operands):
        return dependents(inner, operands, see)
    return [True] * len(eqn.outvars)


def _loop(body: Any, consts: list[bool], carry: list[bool], xs: list[bool], see: Any) -> list[bool]:
    while True:
        results = dependents(body, [*consts, *carry, *xs], see)
        grown = [old or new for old, new in zip(carry, results)]
        if grown == carry:
            return results
        carry = grown

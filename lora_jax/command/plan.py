"""`lora-jax plan`: the answer of `lora_jax.planning`, printed."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import jax

from lora_jax.command import arguments
from lora_jax.core import files
from lora_jax.core.errors import InputError
from lora_jax.planning import fit, plan, table
from lora_jax.sharding import read_axes


def plan_command(line: argparse.Namespace) -> int:
    """`lora-jax plan`; returns the exit code."""
    given = arguments.given(line, plan.Request)
    if jax.config.jax_platforms is None and not given.get("topology", "").startswith("here"):
        jax.config.update("jax_platforms", "cpu")  # to plan takes no chip, not even where there is one
    if "mesh" in given:
        given["mesh"] = read_axes(given["mesh"])
    request = plan.Request(**given)
    if line.fit:
        return _fit(request, given, line)
    if line.plot is not None:
        from lora_jax.planning import plot  # which needs matplotlib

        plot.check(line.plot)
    found = plan.make(request, say)
    print(found.to_json() if line.json else table.table(found))
    if line.plot is not None:
        files.write(line.plot, plot.draw(found))
    return 0


def _fit(request: plan.Request, given: Mapping[str, Any], line: argparse.Namespace) -> int:
    """Print what a search finds; returns the exit code, 2 where nothing fits."""
    if line.json or line.plot is not None or request.compare:
        raise InputError("--fit prints a table of its own: leave --json, --plot and --compare out")
    found = fit.search(request, given, say)
    print(table.fit_table(found))
    return 0 if found.best is not None else 2


def say(text: str) -> None:
    """What is being done, beside what is printed as the answer."""
    print(f"lora-jax: {text}", file=sys.stderr, flush=True)

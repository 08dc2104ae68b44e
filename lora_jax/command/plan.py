"""`lora-jax plan`: the answer of `lora_jax.planning`, printed."""

import argparse
import sys

import jax

from lora_jax.command import options
from lora_jax.core import files
from lora_jax.planning import plan, table
from lora_jax.sharding import read_axes


def plan_command(line: argparse.Namespace) -> int:
    """`lora-jax plan`; returns the exit code."""
    given = options.given(line, plan.Request)
    if jax.config.jax_platforms is None and not given.get("topology", "").startswith("here"):
        jax.config.update("jax_platforms", "cpu")  # to plan takes no chip, not even where there is one
    if "mesh" in given:
        given["mesh"] = read_axes(given["mesh"])
    request = plan.Request(**given)
    if line.plot is not None:
        from lora_jax.planning import plot  # which needs matplotlib

        plot.check(line.plot)
    found = plan.make(request, _say)
    print(found.to_json() if line.json else table.table(found))
    if line.plot is not None:
        files.write(line.plot, plot.draw(found))
    return 0


def _say(text: str) -> None:
    print(f"lora-jax: {text}", file=sys.stderr, flush=True)

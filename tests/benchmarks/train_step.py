"""What a LoRA train step costs, next to the floor, to what it replaces and to other libraries.

    python tests/benchmarks/train_step.py                       # the whole table, about ten minutes on 2 cores
    python tests/benchmarks/train_step.py --no-time --repeats 1 --flavours unrolled

FLOPs of products are counted in the jaxpr (a scan's body times its length); XLA's own count takes a scan's body once and
adds what is not a product. The floor is what remains when nothing can be left out: see `decoder.floor`. Wall times are
compared within rounds in which every variant takes a step, and traces and compilations by the CPU's seconds, so that a
busy machine changes the ratios little.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # so that it runs as a script, too

from tests.benchmarks import decoder, measure, variants

REFERENCES = ("by hand", "qwix", "full fine-tuning")
COLUMNS = {
    "dot GFLOP": lambda c: f"{c.dot_gflop:.3f}",
    "XLA GFLOP": lambda c: f"{c.xla_gflop:.2f}",
    "temp MiB": lambda c: f"{c.temp_mib:.1f}",
    "args MiB": lambda c: f"{c.argument_mib:.1f}",
    "trace s": lambda c: f"{c.trace_s:.2f}",
    "compile s": lambda c: f"{c.compile_s:.2f}",
    "traces": lambda c: "-" if c.traces_of_10_steps is None else str(c.traces_of_10_steps),
    "compiles": lambda c: "-" if c.compiles_of_10_steps is None else str(c.compiles_of_10_steps),
    "step ms": lambda c: "-" if c.step_ms is None else f"{c.step_ms:.0f}",
}


def compare(flavour: decoder.Flavour, options: argparse.Namespace) -> list[measure.Cost]:
    """The figures of every variant of one flavour of the model."""
    found = [v for v in variants.all_variants(decoder.Sizes(), flavour) if not options.only or options.only in v.name]
    costs, compiled = measure.costs(found, options.repeats)
    if options.time:
        times = measure.wall_times(found, compiled, options.rounds)
        for cost, variant, seconds in zip(costs, found, times):
            cost.step_ms = 1000 * sorted(seconds)[len(seconds) // 2]
            for name, others in zip([v.name for v in found], times):
                if name in REFERENCES:
                    cost.ratios[f"step / {name}"] = measure.median_ratio(seconds, others)
            if variant.name.startswith("ours"):
                cost.traces_of_10_steps, cost.compiles_of_10_steps = measure.traces_and_compiles(variant)
    for reference in (c for c in costs if c.name in REFERENCES):
        for cost in costs:
            cost.ratios[f"trace / {reference.name}"] = measure.median_ratio(cost.trace_cpu_s, reference.trace_cpu_s)
            cost.ratios[f"compile / {reference.name}"] = measure.median_ratio(cost.compile_cpu_s, reference.compile_cpu_s)
    return costs


def table(flavour: decoder.Flavour, costs: Sequence[measure.Cost]) -> str:
    """The figures as text, ratios last."""
    ratios = list(dict.fromkeys(name for cost in costs for name in cost.ratios))
    header = [flavour, *COLUMNS, *ratios]
    rows = [header, ["floor", f"{decoder.floor(decoder.Sizes(), flavour) / 1e9:.3f}", *[""] * (len(header) - 2)]]
    for cost in costs:
        rows.append([cost.name, *(show(cost) for show in COLUMNS.values()), *(f"{cost.ratios[r]:.3f}" for r in ratios)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    align = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
    return "\n".join("  ".join(align(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavours", nargs="+", choices=["unrolled", "remat", "scan"], default=["unrolled", "remat", "scan"])
    parser.add_argument("--only", default="", help="only the variants with this in their name")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is traced and compiled")
    parser.add_argument("--rounds", type=int, default=7, help="how many steps each takes for the wall time")
    parser.add_argument("--no-time", dest="time", action="store_false", help="leave the wall times out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(arguments)
    figures: dict[str, Any] = {
        "jax": jax.__version__,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
    }
    for flavour in options.flavours:
        costs = compare(flavour, options)
        figures[flavour] = {
            "floor_gflop": decoder.floor(decoder.Sizes(), flavour) / 1e9,
            "variants": [dataclasses.asdict(cost) for cost in costs],
        }
        if not options.json:
            print(table(flavour, costs), end="\n\n", flush=True)
    if options.json:
        print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

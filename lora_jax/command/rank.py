"""How many ranks the adapters of a run use: what `lora-jax rank` does."""

import argparse
import pathlib

import numpy as np

from lora_jax.adapters import algebra
from lora_jax.command import inspect, run
from lora_jax.core import files
from lora_jax.core.adapter import LowRank
from lora_jax.core.errors import InputError
from lora_jax.core.text_table import text_table


def rank_command(line: argparse.Namespace) -> int:
    """`lora-jax rank`; returns the exit code."""
    if line.truncate != (line.out is not None):
        raise InputError("--truncate and --out, the directory of the truncated run, go together")
    if not 0 < line.keep <= 1:
        raise InputError(f"--keep must be above 0 and at most 1, not {line.keep:g}")
    if line.truncate:
        files.check_empty(line.out)
    rows = [_cells(row, line.keep) for row in inspect.inspect(line.run) if row.rank is not None]
    titles = ("parameter", "rank", "effective rank", f"rank of {line.keep:.4g}", "|dW|", "|dW|/|W|")
    print(text_table([titles, *rows], "lrrrrr"))
    if line.truncate:
        truncate(line.run, line.keep, line.out)
        print(f"run: {line.out}")
    return 0


def _cells(row: inspect.Row, keep: float) -> tuple[str, ...]:
    norm, needed = None, "-"
    if row.values is not None:
        norm, needed = float(np.linalg.norm(row.values)), str(int(algebra.needed_rank(row.values, keep)))
    show = inspect.show
    return row.path, str(row.rank), show(row.effective_rank, ".2f"), needed, show(norm, ".4g"), show(row.change, ".4f")


def truncate(directory: pathlib.Path, keep: float, out: pathlib.Path) -> None:
    """Make a run whose pairs have the smallest ranks that keep a share of their squared norms.

    Raises:
      InputError: there is no such run, a pair has a magnitude, or `out` has files.
    """
    config, adapters = run.read_config(directory), run.load_adapters(directory)
    for path, adapter in adapters.items():
        if isinstance(adapter, LowRank) and adapter.magnitude is not None:
            raise InputError(f"{path}: a pair with a magnitude (DoRA) changes more than its product, so it can't be truncated")
    made = {"command": "rank", "runs": [str(directory.absolute())], "keep": keep}
    run.derive(out, config, algebra.truncate(adapters, energy=keep), made, own=run.own_base(directory))

"""The adapters of several runs made one: what `lora-jax merge` does."""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import jax

from lora_jax.adapters.combine import combine
from lora_jax.command import arguments, run, several
from lora_jax.command.options import MergeOptions
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, Full
from lora_jax.core.errors import InputError


def merge_command(line: argparse.Namespace) -> int:
    """`lora-jax merge`; returns the exit code."""
    merge(line.runs, MergeOptions(**arguments.given(line, MergeOptions)), line.out)
    print(f"run: {line.out}")
    return 0


def merge(directories: Sequence[pathlib.Path], how: MergeOptions, out: pathlib.Path) -> None:
    """Make a run of several, whose adapters `lora_jax.combine` makes one; parameters trained whole are averaged.

    Raises:
      InputError: there are fewer than two runs, one of them does not go with the first, the options do not go together, an
        adapter is more than a pair, or `out` has files.
    """
    if len(directories) < 2:
        raise InputError(f"merge takes two runs or more, not {len(directories)}")
    files.check_empty(out)
    configs = several.read(directories)
    weights = how.weights or [1 / len(directories)] * len(directories)
    if len(weights) != len(directories):
        raise InputError(f"--weights has {len(weights)} numbers for {len(directories)} runs: give one for each")
    sets = [run.load_adapters(directory) for directory in directories]
    whole = _averaged(sets, weights)
    pairs = [{path: adapter for path, adapter in one.items() if path not in whole} for one in sets]
    more = {"rank": how.rank, "density": how.density, "majority": how.majority}
    key = jax.random.key(how.seed) if "dare" in how.method else None
    found = combine(pairs, weights, how.method, key=key, **more)
    ends = sorted({end for config in configs for end in config.ends})
    made = {"command": "merge", "runs": [str(one.absolute()) for one in directories], **dataclasses.asdict(how)}
    run.derive(out, dataclasses.replace(configs[0], ends=ends), {**found, **whole}, {**made, "weights": list(weights)})


def _averaged(sets: Sequence[Mapping[str, Adapter]], weights: Sequence[float]) -> dict[str, Adapter]:
    """The parameters that are trained whole: the mean of the runs' values by their weights."""
    found: dict[str, Adapter] = {}
    for path in (path for path, adapter in sets[0].items() if isinstance(adapter, Full)):
        values = [one[path] for one in sets if path in one]
        if len(values) < len(sets) or not all(isinstance(value, Full) for value in values):
            raise InputError(f"{path} is trained whole in one run and not in another, so that no mean of it is known")
        if not sum(weights) > 0:
            raise InputError(f"{path} is trained whole, of which a mean needs weights with a sum above 0, not {sum(weights):g}")
        found[path] = _mean(values, [weight / sum(weights) for weight in weights])
    return found


def _mean(values: Sequence[Adapter], shares: Sequence[float]) -> Adapter:
    return jax.tree.map(lambda *leaves: sum(share * leaf for share, leaf in zip(shares, leaves)), *values)

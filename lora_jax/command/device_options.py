"""What the device that a run is on decides where the command line leaves it open."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import rich.console

from lora_jax.command.options import DECODERS, RunConfig
from lora_jax.command.tasks import lm
from lora_jax.planning import memory_estimate, plan, topology, train_steps
from lora_jax.planning.topology import Topology

_ACCELERATED = {"dtype": "bfloat16", "scan_layers": True}
# What a step keeps, from the fastest to the smallest.
_MEMORY: tuple[dict[str, Any], ...] = (
    {"remat": "none"},
    {"remat": "products", "attention_block": 256},
    {"remat": "full", "attention_block": 256},
)
_SHARE = 0.9  # of the memory, which an estimate may fill


def here(
    config: RunConfig, given: Collection[str], axes: Mapping[str, int], console: rich.console.Console, members: int = 1
) -> RunConfig:
    """The options of a run on this machine's devices; says what it decided.

    Args:
      config: the options, defaults included.
      given: those that the command line says.
      axes: of the mesh.
      console: where to say it.
      members: how many runs there are in one program.
    """
    target = topology.read(f"here:{math.prod(axes.values())}")
    together = dataclasses.replace(config, batch_size=members * config.batch_size)
    found = dataclasses.replace(settled(together, given, axes, target), batch_size=config.batch_size)
    console.out(described(config, found, target), end="", highlight=False)
    return found


def settled(config: RunConfig, given: Collection[str], axes: Mapping[str, int], target: Topology) -> RunConfig:
    """The options of a run on a device.

    On TPUs and GPUs a language model is in bfloat16, and its layers are scanned and keep as much for the backward pass as fits,
    by the estimate of `planning.memory_estimate`. On a CPU nothing changes.

    Args:
      config: the options, defaults included.
      given: those that the command line says, which stay.
      axes: of the mesh; without one, none.
      target: the devices.
    """
    if config.task not in DECODERS or target.platform == "cpu":
        return config
    ways = [
        dataclasses.replace(config, **{name: value for name, value in {**_ACCELERATED, **memory}.items() if name not in given})
        for memory in _MEMORY
    ]
    if target.hbm_bytes is None:
        return ways[-1]
    sizes = _sizes(ways, axes)
    return next((way for way, size in zip(ways, sizes) if size <= _SHARE * target.hbm_bytes), ways[-1])


def _sizes(ways: Sequence[RunConfig], axes: Mapping[str, int]) -> Iterator[int]:
    """About what each run's step holds on a chip; they differ in what they keep, and have the same arguments."""
    if ways[0].task == "dpo":  # a row for each of two answers
        ways = [dataclasses.replace(way, batch_size=2 * way.batch_size) for way in ways]
    mesh, first = plan.mesh_of(axes, None) if axes else None, ways[0]
    if not first.targets:  # those of --adapter, which are not read yet
        ways = [dataclasses.replace(way, targets="all-linear") for way in ways]
    setup = train_steps.prepare(lm.train_step(ways[0], mesh), lm.sizes(first))
    arguments = train_steps.chip_bytes(train_steps.low_rank(setup).args)
    for way in ways:
        here = dataclasses.replace(setup, step=lm.train_step(way, mesh))
        yield arguments + memory_estimate.temporary_bytes("lora", here)


def described(before: RunConfig, after: RunConfig, target: Topology) -> str:
    """What was decided, in words; nothing where nothing was."""
    ours, theirs = dataclasses.asdict(before), dataclasses.asdict(after)
    chosen = [f"{name} {value}" for name, value in theirs.items() if value != ours[name]]
    return f"for a {target.chip}: {', '.join(chosen)}\n" if chosen else ""

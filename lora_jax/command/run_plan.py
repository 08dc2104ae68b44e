"""`lora-jax finetune --plan`: what a run needs, said before it begins."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.command import device_options, options
from lora_jax.command.hosts import Hosts
from lora_jax.command.options import RunConfig
from lora_jax.command.plan import say
from lora_jax.command.tasks import lm
from lora_jax.command.trainer import optimizer
from lora_jax.core.errors import InputError
from lora_jax.planning import plan, table, topology


def plan_run(given: Mapping[str, Any], hosts: Hosts, name: str | None) -> int:
    """Print the plan of the run that these options describe; returns the exit code."""
    if name is not None and jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")  # to plan for other chips takes none of this machine
    print(table.table(make(given, hosts, name, say)))
    return 0


def make(
    given: Mapping[str, Any], hosts: Hosts, name: str | None, progress: Callable[[str], None] = lambda text: None
) -> plan.Plan:
    """The plan of a run.

    Args:
      given: its options.
      hosts: its mesh.
      name: the chips; `None`: the devices of this machine that it would be on.
      progress: called with what is being done.

    Raises:
      InputError: an option is out of range, or has no plan.
    """
    config = options.new_run(given.get("task", "classify"), {key: value for key, value in given.items() if key != "task"})
    _check(config, hosts)
    count = math.prod(hosts.axes.values())
    target = topology.read(name or f"here:{count}")
    if target.count != count:
        raise InputError(
            f"--topology {name} has {target.count} chips, and the run is on {count}: say how it uses them, as --mesh "
            f"fsdp={target.count}"
        )
    config = device_options.settled(config, given, hosts.axes, target)
    sizes = lm.sizes(config)
    lm.check_sizes(config, sizes)
    step = lambda mesh: lm.train_step(config, mesh)
    return plan.make_for(_request(config, hosts, target), step, sizes, optimizer(config), progress)


def _check(config: RunConfig, hosts: Hosts) -> None:
    if config.task != "lm":
        raise InputError("--plan is for --task lm: a classifier is small, and fits")
    if config.adapter is not None:
        raise InputError("--plan does not read --adapter: leave it out, and say its --rank and --targets")
    if hosts.coordinator is not None:
        raise InputError("--plan is made by one process: leave --coordinator and what goes with it out, and say --topology")


def _request(config: RunConfig, hosts: Hosts, target: topology.Topology) -> plan.Request:
    """What the plan is called."""
    same = ("rank", "targets", "block", "dtype", "scan_layers", "remat", "accumulate")
    fields: dict[str, Any] = {name: getattr(config, name) for name in same}
    fields |= {"quantize": config.quantize or "none", "attention_block": config.attention_block or config.max_length}
    rows = {"batch": config.batch_size, "sequence": config.max_length}
    return plan.Request(
        model=config.model or str(lm.location(config)), topology=target.name, mesh=hosts.axes or None, **rows, **fields
    )

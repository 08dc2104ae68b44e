"""Compiling for TPUs on a machine that has none, and what the compilers say of a program."""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

# Usable bytes of memory, as the TPU compiler states them where a program is too large.
HBM_BYTES = {"TPU v5 lite": 15.75 * 2**30, "TPU v5": 95.73 * 2**30, "TPU v6 lite": 31.24 * 2**30}
# The compiler needs no TPU, but asks where it is; as it holds none, several processes may use it at once.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
_NAME = re.compile(r"(v5e|v5p|v6e):\d+x\d+(x\d+)?")
_TOO_LARGE = re.compile(r"\(?([\d.]+)([KMGT])\)? exceeds available HBM|Used ([\d.]+)([KMGT]) of")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program on one chip; `None` where it says nothing.

    Args:
      argument_bytes: of the arguments.
      temporary_bytes: of all else that the compiler reserves; that of TPUs counts the results that replace arguments, too.
      peak_bytes: the most that is held at once.
      compiler_flops: as the compiler counts them: the body of a scan once, not once for each layer.
      compiler_seconds: how long a TPU's compiler expects it to take, with the body of a scan once.
      error: why there are no figures: it does not fit.
    """

    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    compiler_flops: float | None = None
    compiler_seconds: float | None = None
    error: str | None = None


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def check_name(name: str) -> None:
    """Raise a ValueError unless the name is `cpu` or that of a topology.

    >>> check_name("v5e:2x2")
    """
    if name != "cpu" and not _NAME.fullmatch(name):
        raise ValueError(f"topology must be cpu, or a TPU and its shape such as v5e:2x2, v5p:1x1x1 or v6e:2x2, not {name!r}")


def chip_kind(name: str) -> str:
    """What JAX calls the chips of a topology."""
    return "cpu" if name == "cpu" else _KINDS[name.partition(":")[0]]


def first_chip(name: str) -> Any:
    """The first chip of a topology, to compile for.

    Raises:
      ValueError: there is no such topology.
    """
    if name == "cpu":
        return jax.devices("cpu")[0]
    for variable, value in _SETTINGS.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology: the TPU compiler does not take {name!r}: {_first_line(error)}") from None


def compile_for(chip: Any, traced: Any) -> Compiled:
    """Compile a traced function for a chip.

    Returns:
      What the compiler says. If the program does not fit, that, and the bytes it would need if they are told.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(peak_bytes=_needed(str(error)), error=_first_line(error))
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    seconds = cost.get("optimal_seconds", 0.0)
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes,
        cost["flops"],
        seconds if chip.platform == "tpu" and seconds > 0 else None,  # it may be negative for integers
    )


def place(chip: Any, tree: Any) -> Any:
    """The shapes of a tree, on a chip."""
    sharding = jax.sharding.SingleDeviceSharding(chip)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _needed(message: str) -> int | None:
    """The bytes that the compiler would need.

    >>> _needed("the total memory required (62.5G) exceeds available HBM (15.75G)") == 62.5 * 2**30
    True
    """
    found = _TOO_LARGE.search(message)
    if found is None:
        return None
    number, unit = found.group(1, 2) if found.group(1) else found.group(3, 4)
    return int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[unit])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]

"""Chips to plan for, compiling for TPUs on a machine that has none, and what the compilers say of a program."""

import contextlib
import dataclasses
import importlib.util
import math
import re
from typing import Any, Literal

import jax
from jax.experimental import topologies

from lora_jax.core.errors import InputError
from lora_jax.planning import collectives, cycles, libtpu


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a chip does in a second, as its maker states it.

    Args:
      flops: of bfloat16 products.
      memory: bytes to and from its memory.
      network: bytes to and from its neighbours.
      cycles: of its matrix unit; `None` where its compiler counts none.
    """

    flops: float
    memory: float
    network: float
    cycles: float | None = None


# What JAX calls them, the axes of the largest, and the usable bytes of memory, as the TPU compiler states them where a program
# is too large.
_TPUS = {
    "v4": ("TPU v4", (16, 16, 16), 30.75 * 2**30, Speed(275e12, 1228e9, 300e9, 1.05e9)),
    "v5e": ("TPU v5 lite", (16, 16), 15.75 * 2**30, Speed(197e12, 819e9, 200e9, 1.5e9)),
    "v5p": ("TPU v5", (16, 20, 28), 95.73 * 2**30, Speed(459e12, 2765e9, 600e9, 1.75e9)),
    "v6e": ("TPU v6 lite", (16, 16), 31.24 * 2**30, Speed(918e12, 1640e9, 448e9, 1.75e9)),
}
# The memory on their makers' data sheets, a GB as 10^9 bytes.
_GPUS = {
    "h200": ("NVIDIA H200", 141e9, Speed(989e12, 4800e9, 450e9)),
    "h100": ("NVIDIA H100", 80e9, Speed(989e12, 3350e9, 450e9)),
    "a100-80": ("NVIDIA A100 80GB", 80e9, Speed(312e12, 2039e9, 300e9)),
    "a100-40": ("NVIDIA A100 40GB", 40e9, Speed(312e12, 1555e9, 300e9)),
    "l4": ("NVIDIA L4", 24e9, Speed(121e12, 300e9, 32e9)),
    "rtx4090": ("NVIDIA RTX 4090", 24e9, Speed(165e12, 1008e9, 32e9)),
}
_SAME_SPEED = {"GEFORCE", "SXM4", "80GB", "HBM3"}  # what drivers add to those names
_TPU = re.compile(rf"({'|'.join(_TPUS)}):([1-9]\d*x[1-9]\d*(?:x[1-9]\d*)?)")
_OTHER = re.compile(rf"({'|'.join(_GPUS)}|cpu|here)(?::([1-9]\d*))?")
_TOO_LARGE = re.compile(r"\(?([\d.]+)([KMGT])\)? exceeds available HBM|Used ([\d.]+)([KMGT]) of")


@dataclasses.dataclass(frozen=True)
class Topology:
    """The chips of a plan.

    Args:
      name: as it was asked for.
      platform: of what kind they are.
      chip: what one is called.
      count: how many there are.
      hbm_bytes: of memory that a program can use on each; `None` where it is not known.
      speed: what each does in a second; `None` where it is not known.
    """

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    chip: str
    count: int
    hbm_bytes: int | None
    speed: Speed | None = None

    @property
    def is_here(self) -> bool:
        """Whether they are the devices of this machine."""
        return self.name.partition(":")[0] == "here"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says of a program on one chip; `None` where it says nothing.

    Args:
      argument_bytes: of the arguments.
      temporary_bytes: of all else that the compiler reserves, which for TPUs may be more than is held at once.
      peak_bytes: the most that is held at once.
      compiler_flops: as the compiler counts them: the body of a scan once, not once for each layer.
      compiler_seconds: how long a TPU's compiler expects it to take, with the body of a scan once.
      step_seconds: the same with all iterations, from the cycles that it estimates for each operation; see `cycles`.
      traffic: what it moves between the chips.
      error: why there are no figures: it does not fit.
    """

    argument_bytes: int | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None
    compiler_flops: float | None = None
    compiler_seconds: float | None = None
    step_seconds: float | None = None
    traffic: collectives.Traffic | None = None
    error: str | None = None


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def read(name: str) -> Topology:
    """The topology of a name: a TPU and its shape, or a GPU, `cpu` or `here` (this machine's devices) and how many.

    Raises:
      InputError: it is no such name.

    >>> read("v5e:2x4").count, read("h100:8").chip, read("cpu").count
    (8, 'NVIDIA H100', 1)
    """
    if found := _TPU.fullmatch(name):
        (chip, largest, hbm, speed), shape = _TPUS[found[1]], [int(size) for size in found[2].split("x")]
        if len(shape) != len(largest) or any(size > most for size, most in zip(sorted(shape), largest)):
            raise InputError(
                f"topology: {name} is not within {found[1]}:{'x'.join(map(str, largest))}, the largest of its kind"
            )
        return Topology(name, "tpu", chip, math.prod(shape), int(hbm), speed)
    if found := _OTHER.fullmatch(name):
        count = int(found[2] or 1)
        if found[1] == "here":
            return _here(name, count)
        if found[1] == "cpu":
            return Topology(name, "cpu", "cpu", count, None)
        chip, hbm, speed = _GPUS[found[1]]
        return Topology(name, "gpu", chip, count, int(hbm), speed)
    raise InputError(
        f"topology must be a TPU and its shape, such as v5e:2x2, v5p:1x1x1 or v6e:4x4 (of {', '.join(_TPUS)}), or one of "
        f"{', '.join(_GPUS)}, cpu, here (this machine's devices), with a number of chips such as h100:8, not {name!r}"
    )


def _here(name: str, count: int) -> Topology:
    """The first of the devices that JAX has."""
    found, first = jax.devices(), jax.local_devices()[0]
    if count > len(found):
        raise InputError(f"topology: {name} asks for {count} devices, and there are {len(found)}")
    platform: Any = first.platform if first.platform in ("cpu", "tpu") else "gpu"
    hbm = (first.memory_stats() or {}).get("bytes_limit")
    return Topology(name, platform, first.device_kind, count, hbm, speed_of(first.device_kind))


def speed_of(kind: str) -> Speed | None:
    """What a chip does that JAX calls so (`device_kind`); `None` where it is not in the table.

    >>> speed_of("NVIDIA H100 80GB HBM3").flops, speed_of("TPU v5 lite").flops, speed_of("NVIDIA H100 PCIe"), speed_of("cpu")
    (989000000000000.0, 197000000000000.0, None, None)
    """
    known = {chip: speed for chip, *_, speed in (*_TPUS.values(), *_GPUS.values())}
    words = lambda name: set(re.findall(r"\w+", name.replace("-", " ").upper()))
    return next((speed for chip, speed in known.items() if words(chip) <= words(kind) <= words(chip) | _SAME_SPEED), None)


def devices(topology: Topology) -> list[Any]:
    """The devices to compile for: those of this machine, of a TPU, or as many CPUs as there are chips.

    Raises:
      InputError: the TPU compiler knows no such topology, or JAX was started with fewer CPU devices.
    """
    if topology.is_here:
        return jax.devices()[: topology.count]
    if topology.platform != "tpu":
        return _cpus(topology.count)
    libtpu.without_tpu()
    # A chip of a v4 has two cores, which one program uses as if they were one.
    options = {"chip_config_name": "megacore"} if topology.name.startswith("v4") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology: the TPU compiler does not take {topology.name!r}: {_first_line(error)}") from None
    if len(found) != topology.count:
        raise InputError(f"topology: {topology.name} has {len(found)} devices for the TPU compiler, not {topology.count}")
    return list(found)


def _cpus(count: int) -> list[Any]:
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX has started: it has what it has
            jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"topology: {count} CPU devices are needed and JAX has {len(found)}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def compile_for(topology: Topology, traced: Any) -> Compiled:
    """Compile a traced function whose arguments are on the devices of a topology.

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
    seconds, on_tpu = cost.get("optimal_seconds", 0.0), topology.platform == "tpu"
    # The peak that a CPU's compiler states is without temporaries.
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    text = compiled.as_text()
    clock = None if topology.speed is None else topology.speed.cycles
    count = None if clock is None else cycles.read(text)
    return Compiled(
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes if on_tpu else held,
        cost["flops"],
        seconds if on_tpu and seconds > 0 else None,  # it may be negative for integers
        None if count is None or clock is None else count / clock,
        collectives.read(text),
    )


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

"""What a jitted step costs: FLOPs from its jaxpr and from XLA, bytes, trace and compile seconds, wall-time ratios."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax.planning.flops import dot_flops


@dataclasses.dataclass
class Variant:
    """One way to do the train step.

    Args:
      name: as in the table.
      step: a jitted function.
      args: its first arguments.
      advance: `(args, results) -> args` of the next step.
    """

    name: str
    step: Any
    args: tuple[Any, ...]
    advance: Callable[[tuple[Any, ...], Any], tuple[Any, ...]]


@dataclasses.dataclass
class Cost:
    """The figures of one variant. Seconds are medians of the wall time; the CPU's seconds, for ratios, are kept all."""

    name: str
    dot_gflop: float
    xla_gflop: float
    temp_mib: float
    argument_mib: float
    trace_s: float
    compile_s: float
    trace_cpu_s: list[float]
    compile_cpu_s: list[float]
    traces_of_10_steps: int | None = None
    compiles_of_10_steps: int | None = None
    step_ms: float | None = None
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)


class Clock:
    """Takes the wall time and the CPU time of a step, which a busy machine disturbs less."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def time(self, fn: Callable[..., Any], *args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = fn(*args)
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result


def costs(variants: Sequence[Variant], repeats: int) -> tuple[list[Cost], list[Any]]:
    """Trace and compile each variant `repeats` times, taking turns, with JAX's caches cleared before each trace."""
    traces, compiles = ([Clock() for _ in variants] for _ in range(2))
    results: list[Any] = [None] * len(variants)
    for _ in range(repeats):
        for i, variant in enumerate(variants):
            shapes = jax.tree.map(_shape, variant.args)
            jax.clear_caches()
            traced = traces[i].time(variant.step.trace, *shapes)
            results[i] = traced.jaxpr, compiles[i].time(traced.lower().compile)
    figures = [_figures(v.name, *result, t, c) for v, result, t, c in zip(variants, results, traces, compiles)]
    return figures, [compiled for _, compiled in results]


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def _figures(name: str, jaxpr: Any, compiled: Any, trace: Clock, compile: Clock) -> Cost:
    memory = compiled.memory_analysis()
    return Cost(
        name=name,
        dot_gflop=dot_flops(jaxpr) / 1e9,
        xla_gflop=compiled.cost_analysis()["flops"] / 1e9,
        temp_mib=memory.temp_size_in_bytes / 2**20,
        argument_mib=memory.argument_size_in_bytes / 2**20,
        trace_s=statistics.median(trace.wall),
        compile_s=statistics.median(compile.wall),
        trace_cpu_s=trace.cpu,
        compile_cpu_s=compile.cpu,
    )


def wall_times(variants: Sequence[Variant], compiled: Sequence[Any], rounds: int) -> list[list[float]]:
    """The seconds of each variant's step in each round, in which all take one step each, every other time backwards.

    The first round is for warming up and is left out. The variants' arguments move on, since steps donate them.
    """
    seconds: list[list[float]] = [[] for _ in variants]
    for number in range(rounds + 1):
        order = range(len(variants)) if number % 2 else reversed(range(len(variants)))
        for i in order:
            start = time.perf_counter()
            result = jax.block_until_ready(compiled[i](*variants[i].args))
            seconds[i].append(time.perf_counter() - start)
            variants[i].args = variants[i].advance(variants[i].args, result)
    return [times[1:] for times in seconds]


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of how much longer one takes than the other."""
    return statistics.median(time / other for time, other in zip(times, others))


def traces_and_compiles(variant: Variant, steps: int = 10) -> tuple[int, int]:
    """How often JAX traces and XLA compiles over a number of steps through `jit`, by JAX's own monitoring."""
    events: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        events.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(steps):
            variant.args = variant.advance(variant.args, variant.step(*variant.args))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    names = ("jaxpr_trace", "backend_compile")
    traces, compiles = (events.count(f"/jax/core/compile/{name}_duration") for name in names)
    return traces, compiles

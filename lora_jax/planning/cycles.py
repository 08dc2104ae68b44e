"""How long a program takes by the TPU compiler's own estimates, over all iterations of its loops."""

import functools
import re

from lora_jax.planning.collectives import Computation, Instruction, called_by, parse, trips

_CYCLES = re.compile(r'"estimated_cycles":"(\d{1,15})"')  # more digits, the largest integer's, stand for what is not known


def read(hlo: str) -> int | None:
    """The estimated cycles of all operations: in a loop once for each iteration, of a conditional the dearest branch's.

    What a chip moves meanwhile, to other chips or between its memories, has no estimate and counts nothing.

    Args:
      hlo: `compiled.as_text()`.

    Returns:
      The cycles; `None` where the compiler estimates none, or does not say how often a loop runs.

    >>> read('''
    ... ENTRY %main (x: f32[2,4]) -> f32[2,4] {
    ...   %x = f32[2,4]{1,0} parameter(0)
    ...   ROOT %y = f32[2,4]{1,0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"1881"}
    ... }''')
    1881
    """
    computations, entry = parse(hlo)

    @functools.cache
    def walk(name: str) -> int | None:
        return _total([one(computations[name], line) for line in computations[name].values()])

    def one(computation: Computation, line: Instruction) -> int | None:
        if found := _CYCLES.search(line.text):
            return int(found[1])
        called = [walk(name) for name in called_by(line) if name in computations]
        if not called or line.opcode in ("async-update", "async-done", "reduce", "all-reduce", "reduce-scatter"):
            return 0
        if line.opcode == "conditional":
            return None if None in called else max(called, key=lambda cycles: cycles or 0)
        inner = _total(called)
        times = trips(computations, computation, line) if line.opcode == "while" and inner else 1
        return None if inner is None or times is None else times * inner

    return walk(entry) or None


def _total(cycles: list[int | None]) -> int | None:
    """The sum; `None` where a part is not known."""
    known = [one for one in cycles if one is not None]
    return sum(known) if len(known) == len(cycles) else None

"""What a compiled program moves between chips, read from its HLO text."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|body|true_computation|false_computation|branch_computations|called_computations)=(\{.*?\}|%[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind that a chip takes part in.

    Args:
      count: how often, over all iterations of loops.
      bytes: of the arrays: as a chip gets them, for a reduce-scatter as it gives them. How much of it goes over the wires
        is the hardware's: for an all-gather on a ring of n chips (n - 1) / n, for an all-reduce twice that.
      largest: the arrays of the largest one, such as `bf16[4096,1024]`.
      largest_bytes: their bytes.
    """

    count: int
    bytes: int
    largest: str
    largest_bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program moves.

    Args:
      kinds: `{kind: Collective}`, those of `KINDS` that occur.
      unknown_loops: how many loops with collectives in them have an unknown number of iterations; they count as one.
    """

    kinds: Mapping[str, Collective]
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    type: str
    opcode: str
    operands: tuple[str, ...]
    text: str
    root: bool


Computation = Mapping[str, Instruction]
Computations = Mapping[str, Computation]
_NOTHING = Traffic({}, 0)


def read(hlo: str) -> Traffic:
    """The collectives of a compiled program: in a loop once for each iteration, and of a conditional the dearest branch's.

    Args:
      hlo: `compiled.as_text()`.

    >>> hlo = '''
    ... ENTRY %main (x: f32[2,4]) -> f32[8,4] {
    ...   %x = f32[2,4]{1,0} parameter(0)
    ...   ROOT %all = f32[8,4]{1,0} all-gather(%x), dimensions={0}
    ... }'''
    >>> read(hlo).kinds
    {'all-gather': Collective(count=1, bytes=128, largest='f32[8,4]', largest_bytes=128)}
    """
    computations, entry = parse(hlo)

    @functools.cache
    def walk(name: str) -> Traffic:
        return functools.reduce(_add, (one(computations[name], line) for line in computations[name].values()), _NOTHING)

    def one(computation: Computation, line: Instruction) -> Traffic:
        if _goes_on(computation, line):
            return _NOTHING
        if (kind := _kind(line)) is not None:
            return Traffic({kind: _collective(computation, line)}, 0)
        called = [_scattered(name, walk(name)) for name in called_by(line)]
        if not called or line.opcode in ("async-update", "async-done"):
            return _NOTHING
        if line.opcode == "conditional":
            return max(called, key=lambda traffic: sum(moved.bytes for moved in traffic.kinds.values()))
        found = functools.reduce(_add, called)
        return _repeat(found, trips(computations, computation, line)) if line.opcode == "while" else found

    return walk(entry)


def parse(hlo: str) -> tuple[Computations, str]:
    """The instructions of each computation by name, and the name of the program's own."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif (found := _INSTRUCTION.match(line)) and (parts := _split(found[3])):
            current[found[2]] = Instruction(*parts, found[3], bool(found[1]))
    return computations, entry


def called_by(line: Instruction) -> list[str]:
    """The computations that an instruction runs; of a loop its body alone, which it runs several times."""
    return [name for match in _CALLED.finditer(line.text) for name in _NAME.findall(match[2])]


def _split(text: str) -> tuple[str, str, tuple[str, ...]] | None:
    """The type, opcode and operands of `type opcode(operands), attributes`.

    >>> _split("(f32[2]{0:T(8)}, u32[]) all-gather-start(%x, /*index=1*/%y), dimensions={0}")
    ('(f32[2]{0:T(8)}, u32[])', 'all-gather-start', ('x', 'y'))
    """
    end = _closing(text) if text.startswith("(") else text.find(" ")
    opcode, bracket, rest = text[end:].strip().partition("(")
    if not bracket:
        return None
    operands = rest[: _closing(bracket + rest) - 2]
    return text[:end], opcode, tuple(_NAME.findall(operands))


def _closing(text: str) -> int:
    """The place after the bracket that closes the one at the start."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _kind(line: Instruction) -> str | None:
    """The kind of a collective. One in two halves counts at its end, whose type is that of the result alone."""
    name = line.opcode.removesuffix("-done")
    return name if name in KINDS else None


def _goes_on(computation: Computation, line: Instruction) -> bool:
    """Whether a line is a piece of a collective that a TPU's compiler spreads over several fusions, and not the last one."""
    return "chain_id=" in line.text and not any("AsyncCollectiveDone" in other.text for other in computation.values())


def _collective(computation: Computation, line: Instruction) -> Collective:
    given = " ".join(computation[name].type for name in line.operands if name in computation)
    arrays = _ARRAY.findall(given if line.opcode == "reduce-scatter" else line.type)
    size = sum(map(_bytes, *zip(*arrays)))
    return Collective(1, size, ", ".join(f"{dtype}[{shape}]" for dtype, shape in arrays), size)


def _bytes(dtype: str, shape: str) -> int:
    """The bytes of an array.

    >>> _bytes("bf16", "2,3"), _bytes("pred", ""), _bytes("s4", "3")
    (12, 1, 2)
    """
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 8
    return -(-bits * math.prod(int(size) for size in shape.split(",") if size) // 8)


def _scattered(name: str, traffic: Traffic) -> Traffic:
    """The same, but a reduce-scatter is one where the TPU compiler writes it as an all-reduce and a slice under that name."""
    if not name.startswith("all-reduce-scatter"):
        return traffic
    return Traffic({"reduce-scatter": traffic.kinds["all-reduce"]}, traffic.unknown_loops)


def _add(x: Traffic, y: Traffic) -> Traffic:
    kinds = dict(x.kinds)
    for kind, new in y.kinds.items():
        old = kinds.get(kind, new)
        largest = max(old, new, key=lambda moved: moved.largest_bytes)
        sums = {} if kind not in kinds else {"count": old.count + new.count, "bytes": old.bytes + new.bytes}
        kinds[kind] = dataclasses.replace(largest, **({"count": new.count, "bytes": new.bytes} | sums))
    return Traffic(kinds, x.unknown_loops + y.unknown_loops)


def _repeat(traffic: Traffic, times: int | None) -> Traffic:
    """The traffic of so many iterations."""
    if times is None:
        return dataclasses.replace(traffic, unknown_loops=traffic.unknown_loops + bool(traffic.kinds))
    kinds = {
        kind: dataclasses.replace(moved, count=times * moved.count, bytes=times * moved.bytes)
        for kind, moved in traffic.kinds.items()
    }
    return Traffic(kinds, traffic.unknown_loops)


# --- loops ------------------------------------------------------------------------------------------------------------


def trips(computations: Computations, outer: Computation, loop: Instruction) -> int | None:
    """How often a loop runs: as the compiler notes it, or where it counts from one constant up to another."""
    if noted := _TRIPS.search(loop.text):
        return int(noted[1])
    condition, body = (computations[_find(rf"{role}=%?([\w.\-]+)", loop)] for role in ("condition", "body"))
    test, last = _root(condition), _root(body)

    def start(place: int) -> int | None:
        return _constant(outer, outer[loop.operands[0]].operands[place])

    def invariant(name: str) -> int | None:
        """A constant of the loop's body, or one that the loop carries along unchanged."""
        place = _place(body, name)
        return start(place) if place is not None and _place(body, last.operands[place]) == place else _constant(body, name)

    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    place, limit = _place(condition, test.operands[0]), _constant(condition, test.operands[1])
    if place is None or limit is None or (first := start(place)) is None:
        return None
    step = body[last.operands[place]]
    steps = [invariant(name) for name in step.operands if _place(body, name) != place]
    if step.opcode != "add" or len(steps) != 1 or not steps[0]:
        return None
    return max(0, -(-(limit - first) // steps[0]))


def _root(computation: Computation) -> Instruction:
    return next(line for line in computation.values() if line.root)


def _find(pattern: str, line: Instruction) -> str:
    found = re.search(pattern, line.text)
    assert found is not None, f"{pattern} is not in {line.text}"
    return found[1]


def _place(computation: Computation, name: str) -> int | None:
    """Which element of a tuple a name is."""
    line = _source(computation, name)
    return int(_find(r"index=(\d+)", line)) if line is not None and line.opcode == "get-tuple-element" else None


def _constant(computation: Computation, name: str) -> int | None:
    """The whole number that a name stands for."""
    line = _source(computation, name)
    found = None if line is None or line.opcode != "constant" else re.search(r"constant\((-?\d+)\)", line.text)
    return int(found[1]) if found else None


def _source(computation: Computation, name: str) -> Instruction | None:
    """What a name is a copy of."""
    line = computation.get(name)
    while line is not None and line.opcode in ("copy", "copy-done", "copy-start", "bitcast"):
        line = computation.get(line.operands[0])
    return line

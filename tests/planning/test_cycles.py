"""How long a program takes by the TPU compiler's estimates, which it notes beside each operation."""

from lora_jax.planning import cycles


def operation(name, estimate):
    return f'  %{name} = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%f, backend_config={{"estimated_cycles":"{estimate}"}}'


def program(*lines, before=""):
    return "\n".join([before, "ENTRY %main (x: f32[4]) -> f32[4] {", "  %x = f32[4]{0} parameter(0)", *lines, "}"])


def loop(trips):
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    return f"  ROOT %loop = f32[4]{{0}} while(%x), condition=%more, body=%body{known}"


BODY = "\n".join(["%body (x: f32[4]) -> f32[4] {", "  %x = f32[4]{0} parameter(0)", operation("one", 7), "}"])


def test_operations_are_added():
    assert cycles.read(program(operation("a", 10), operation("b", 32))) == 42


def test_a_loop_counts_once_for_each_iteration():
    assert cycles.read(program(operation("a", 10), loop(5), before=BODY)) == 10 + 5 * 7


def test_the_largest_integer_is_no_estimate():
    """It stands beside what the compiler can't estimate."""
    assert cycles.read(program(operation("a", 10), operation("b", 2**63 - 1))) == 10


def test_no_estimates():
    assert cycles.read(program("  ROOT %y = f32[4]{0} add(%x, %x)")) is None

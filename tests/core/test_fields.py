"""Tables of options: types, bounds and words, each checked once."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import pytest

from lora_jax.core.errors import InputError
from lora_jax.core.fields import LARGEST, check, option, table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    data: Annotated[str, option("the data")]
    steps: Annotated[int, option("steps", ge=1)] = 3
    batch: Annotated[int | None, option("rows", ge=1, must_be="at least 1")] = None
    rate: Annotated[float, option("rate", gt=0, le=LARGEST, note="kept")] = 0.5
    kind: Annotated[Literal["a", "b"], option("kind")] = "a"
    names: Annotated[str | Sequence[str], option("names")] = ()
    quick: Annotated[bool, option("quick")] = False

    def __post_init__(self):
        check(self, lambda name: f"--{name}")


def test_values_are_converted():
    made = Options(data="a", rate=2, names=("x", "y"))
    assert (made.rate, type(made.rate), made.names, made.batch) == (2.0, float, ["x", "y"], None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": 3}, "--data must be a text, not 3"),
        ({"data": None}, "--data must be a text, not None"),
        ({"steps": 0}, "--steps must be a whole number of at least 1, not 0"),
        ({"steps": True}, "--steps must be a whole number of at least 1, not True"),
        ({"steps": 1.5}, "--steps must be a whole number of at least 1, not 1.5"),
        ({"steps": None}, "--steps must be a whole number of at least 1, not None"),
        ({"batch": 0}, "--batch must be at least 1, not 0"),
        ({"rate": 0}, "--rate must be positive and finite, not 0"),
        ({"rate": float("nan")}, "--rate must be positive and finite, not nan"),
        ({"rate": float("inf")}, "--rate must be positive and finite, not inf"),
        ({"rate": "0.5"}, "--rate must be positive and finite, not '0.5'"),
        ({"kind": "c"}, "--kind must be one of a, b, not 'c'"),
        ({"names": 3}, "--names must be a list of texts, not 3"),
        ({"quick": 1}, "--quick must be True or False, not 1"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(InputError) as error:
        Options(**{"data": "a", **changes})
    assert str(error.value) == message


def test_the_table():
    rows = table(Options)
    assert list(rows) == [field.name for field in dataclasses.fields(Options)]
    assert (rows["batch"].kind, rows["batch"].default, rows["batch"].help) == (int, None, "rows")
    assert rows["data"].default is dataclasses.MISSING and rows["rate"].more["note"] == "kept"

"""The words that options of adapters may be, and their checks: without JAX, so that a command line can list and check them."""

from collections.abc import Sequence
from typing import Any, Literal

from lora_jax.core.errors import InputError

WORDS = ("all-linear", "attention")  # of `LoraConfig.targets`
DTYPES = {"nf4": "nf4", "int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}  # of `quantize`, and what qwix calls them

# Of `combine`.
Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
Majority = Literal["total", "frequency"]


def targets(given: Any) -> Any:
    """The targets as a command line gives them: a word alone is no pattern.

    >>> targets(["attention"]), targets(["attention", "head"])
    ('attention', ['attention', 'head'])
    """
    return given[0] if isinstance(given, list) and len(given) == 1 and given[0] in WORDS else given


def check(option: str, dtype: Any, block: Any) -> None:
    """Raise an InputError unless there is such a kind and such a block; `option` is what the kind is called."""
    if dtype not in DTYPES:
        raise InputError(f"{option} must be one of {', '.join(map(repr, DTYPES))}, not {dtype!r}")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise InputError(f"block must be None or a whole number of at least 1, not {block!r}")


def check_base(dtype: str | None, block: int | None) -> None:
    """Raise an InputError unless the options `quantize` and `block` go together; `None`: the base stays dense."""
    if dtype is not None:
        check("quantize", dtype, block)
    elif block is not None:
        raise InputError("block is for a quantised base: leave it out, or say how to quantise")


def numbers(given: Sequence[Any]) -> list[int]:
    """Numbers, and ranges of them, as a command line gives them.

    Raises:
      InputError: a text is neither.

    >>> numbers(["3", "8-11"])
    [3, 8, 9, 10, 11]
    """
    found: list[int] = []
    for text in map(str, given):
        first, dash, last = text.partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise InputError(f"{text!r} is neither a number from 0 on nor a range such as 8-15")
        found += range(int(first), int(last or first) + 1)
    return found


def by_pattern(given: Sequence[Any]) -> dict[str, float]:
    """`PATTERN=NUMBER` as a command line gives it, several times.

    Raises:
      InputError: a text is not of that form.

    >>> by_pattern(["q_proj=4", "re:.*/mlp/.*=16"])
    {'q_proj': 4, 're:.*/mlp/.*': 16}
    """
    found: dict[str, float] = {}
    for text in map(str, given):
        pattern, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise InputError(f"{text!r} is not of the form PATTERN=NUMBER")
        found[pattern] = int(value) if value.is_integer() else value
    return found


def decimals(given: Sequence[Any]) -> Sequence[Any]:
    """Numbers as a command line gives them; what is none stays a text, for the check that names the option.

    >>> decimals(["0.5", "-1"])
    [0.5, -1.0]
    """
    try:
        return [float(text) for text in given]
    except (TypeError, ValueError):
        return given

"""The words that options of adapters may be, and their checks: without JAX, so that a command line can list and check them."""

from typing import Any

from lora_jax.core.errors import InputError

WORDS = ("all-linear", "attention")  # of `LoraConfig.targets`
DTYPES = {"nf4": "nf4", "int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}  # of `quantize`, and what qwix calls them


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

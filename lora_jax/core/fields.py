"""Dataclasses whose fields say what they take: type, default, help and bounds stand once, in the annotation.

    steps: Annotated[int, option("training steps", ge=1)] = 180

`check` holds the values against it, and `lora_jax.command.options` makes command lines of it. msgspec converts and validates:
it is one small package that depends on nothing and leaves the command line and the texts of errors as they are, where tyro and
draccus bring their own, and pydantic would be ten times as large.
"""

import dataclasses
import functools
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec

from lora_jax.core.errors import InputError

LARGEST = sys.float_info.max  # as a bound: neither infinite nor NaN
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def option(
    help: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    must_be: str | None = None,
    **more: Any,
) -> msgspec.Meta:
    """What the annotation of a field says beside its type.

    Args:
      help: what the field is.
      ge: it is at least this.
      gt: it is above this.
      le: it is at most this.
      must_be: the values in words, for errors; `None`: the type and the bounds in words.
      more: what whoever uses the table wants to know.
    """
    bounds: Any = {"ge": ge, "gt": gt, "le": le}
    return msgspec.Meta(**bounds, description=help, extra={"must_be": must_be, **more})


@dataclasses.dataclass(frozen=True)
class Option:
    """A field as its annotation describes it.

    Args:
      name: the field.
      kind: its type; where `None` stands for a value that is left out, without that.
      default: its default, or `dataclasses.MISSING`.
      meta: what `option` made.
    """

    name: str
    kind: Any
    default: Any
    meta: msgspec.Meta

    @property
    def help(self) -> str:
        """What the field is."""
        return self.meta.description or ""

    @property
    def more(self) -> Mapping[str, Any]:
        """What else the annotation says."""
        return self.meta.extra or {}

    def convert(self, value: Any, label: str) -> Any:
        """The value in the field's type.

        Raises:
          InputError: it is of another type or out of range; `label` is what the message calls the field.
        """
        if value is None and self.default is None:
            return None
        try:
            return msgspec.convert(value, Annotated[self.kind, self.meta])
        except msgspec.ValidationError:
            raise InputError(f"{label} must be {self._valid()}, not {value!r}") from None

    def _valid(self) -> str:
        if self.more["must_be"] is not None:
            return self.more["must_be"]
        if typing.get_origin(self.kind) is typing.Literal:
            return f"one of {', '.join(typing.get_args(self.kind))}"
        if self.meta.gt == 0:
            return "positive and finite"
        least = "" if self.meta.ge is None else f" of at least {self.meta.ge}"
        return _WORDS.get(self.kind, "a list of texts") + least


@functools.cache
def table(cls: type) -> Mapping[str, Option]:
    """The fields of a dataclass by their names.

    >>> @dataclasses.dataclass
    ... class Training:
    ...     steps: Annotated[int | None, option("training steps", ge=1)] = None
    >>> table(Training)["steps"].kind, table(Training)["steps"].help
    (<class 'int'>, 'training steps')
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = {}
    for field in dataclasses.fields(cls):
        kind, meta = typing.get_args(hints[field.name])
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        rows[field.name] = Option(field.name, _without_none(kind), made, meta)
    return rows


def _without_none(kind: Any) -> Any:
    kinds = [one for one in typing.get_args(kind) if one is not type(None)]
    return functools.reduce(lambda one, other: one | other, kinds) if type(None) in typing.get_args(kind) else kind


def check(config: Any, label: Callable[[str], str] = str) -> None:
    """Convert all fields of a frozen dataclass, in `__post_init__`.

    Args:
      config: the dataclass.
      label: what errors call a field of a name.

    Raises:
      InputError: a value is of another type or out of range.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Training:
    ...     steps: Annotated[int, option("training steps", ge=1)] = 180
    ...     __post_init__ = check
    >>> Training(steps=0)
    Traceback (most recent call last):
    lora_jax.core.errors.InputError: steps must be a whole number of at least 1, not 0
    """
    for name, row in table(type(config)).items():
        object.__setattr__(config, name, row.convert(getattr(config, name), label(name)))

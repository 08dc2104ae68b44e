"""Tables of texts: `.csv` files with a header, and `.jsonl` files with an object per line."""

import csv
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from lora_jax.core.errors import InputError, MissingError
from lora_jax.core.files import parse_json, reading

SUFFIXES = (".csv", ".jsonl")


def existing(file: str | pathlib.Path, suffixes: tuple[str, ...] = SUFFIXES) -> pathlib.Path:
    """The file, if it is there and of one of these kinds.

    Raises:
      MissingError: there is no such file.
      InputError: it is of another kind.
    """
    file = pathlib.Path(file)
    if file.suffix.lower() not in suffixes:
        *most, last = (f"a {suffix}" for suffix in suffixes)
        raise InputError(f"{file}: the data must be {', '.join(most)} or {last} file")
    if not file.is_file():
        raise MissingError(f"there is no file {file}")
    return file


def columns(file: pathlib.Path) -> tuple[str, ...]:
    """The columns of a table: of its header, or of its first object.

    Raises:
      InputError: the file is damaged, or holds no rows.
    """
    for _, row in rows(file, ()):
        return tuple(column for column in row if column is not None)  # what is beyond the header has no name
    raise InputError(f"{file} holds no rows")


def rows(file: pathlib.Path, fields: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with the number of its line: the value of every column.

    Args:
      file: a `.csv` or `.jsonl` file.
      fields: columns that every row must have.

    Raises:
      InputError: the file is damaged or not UTF-8, or a column is missing; the message names the line.
    """
    read = _csv_rows if file.suffix.lower() == ".csv" else _jsonl_rows
    with reading(file):
        yield from read(file, tuple(fields))


def _csv_rows(file: pathlib.Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit refuses long texts
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        try:
            check_fields(file, fields, reader.fieldnames or ())
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: {error}") from None


def _jsonl_rows(file: pathlib.Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            row = parse_json(line, f"{file}, line {number}")
            if not isinstance(row, dict):
                raise InputError(f"{file}, line {number} must be a JSON object, not {type(row).__name__}")
            check_fields(f"{file}, line {number}", fields, row)
            yield number, row


def check_fields(where: Any, fields: Iterable[str], present: Iterable[str]) -> None:
    """Raise an InputError unless every field is among the columns present."""
    present = tuple(present)
    for field in fields:
        if field not in present:
            columns = ", ".join(map(repr, present)) or "none"
            raise InputError(f"{where}: there is no column {field!r}; the columns are {columns}")


def refuse_empty(file: pathlib.Path, lines: list[int], fields: Iterable[str]) -> None:
    """Raise an InputError if there are rows, on these lines, in which one of the fields is empty."""
    if lines:
        raise InputError(
            f"{file}: {len(lines)} rows have an empty {' or '.join(map(repr, fields))}, on the lines "
            f"{', '.join(map(str, lines[:5]))}{' and more' if len(lines) > 5 else ''}: fill or remove them"
        )

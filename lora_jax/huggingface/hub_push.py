"""Directories put on the Hugging Face hub, by `huggingface_hub` with its login and settings (extra `hub`)."""

import contextlib
import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.huggingface import hub


def check(name: str, private: bool = False) -> None:
    """Raise an error if a directory can't be pushed to this name; nothing is made on the hub.

    Raises:
      InputError: the name is none of the hub's, nobody is logged in, the token may not write, the owner is neither the user nor
        an organisation of theirs, the hub can't be reached, or the repository is there already and is public where it is to
        be private.
      ImportError: `huggingface_hub` is not installed.
    """
    repository = hub.parse(name)
    if repository is None or repository.revision is not None:
        raise InputError(f"--push-to-hub: {name!r} is no name of a repository on the Hugging Face hub, which is owner/name")
    package = hub.package()
    if package.get_token() is None:
        raise InputError(
            "--push-to-hub: nobody is logged in to the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    with _refused(name):
        api = package.HfApi()
        _check_owner(name, api.whoami())
        if private and api.repo_exists(name) and not api.model_info(name).private:
            raise InputError(
                f"--private: {name} is there already and is public: make it private in its settings, or choose another name"
            )


def _check_owner(name: str, user: Mapping[str, Any]) -> None:
    """Raise an InputError unless this user, as the hub describes them and their token, may push to a name."""
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(
            "--push-to-hub: the token only reads: make one that may write at https://huggingface.co/settings/tokens, and log "
            "in with it (`hf auth login`) or set HF_TOKEN to it"
        )
    owner, owners = name.partition("/")[0], [user["name"], *(one["name"] for one in user.get("orgs", ()))]
    if owner.lower() not in map(str.lower, owners):
        raise InputError(f"--push-to-hub: {name} is not yours: give one of {', '.join(owners)} as its owner")


def push(directory: pathlib.Path, name: str, *, private: bool = False, message: str) -> str:
    """Upload a directory's files in one commit; the repository is made if it is not there.

    Args:
      directory: the files.
      name: `owner/name`.
      private: whether a new repository is private.
      message: of the commit.

    Returns:
      The repository's address.

    Raises:
      InputError: the hub refuses it, or can't be reached; the message has a command that tries again.
      ImportError: `huggingface_hub` is not installed.
    """
    api = hub.package().HfApi()
    again = ["hf", "upload", name, str(directory), *(["--private"] if private else []), "--commit-message", message]
    with _refused(name, f"; the export is in {directory}, and `{shlex.join(again)}` sends it"):
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=message)
    return str(made)


@contextlib.contextmanager
def _refused(name: str, advice: str = "") -> Iterator[None]:
    """Within it, what the hub has against a push is bad input; the message ends in the advice."""
    errors: Any = hub.package().errors
    try:
        yield
    except InputError:
        raise
    # The bases of HfHubHTTPError: what the library beneath raises without a connection is no OSError in newer versions.
    except (OSError, errors.HFValidationError, *errors.HfHubHTTPError.__bases__) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise InputError(f"--push-to-hub: {name} can't be pushed to: {reason}{advice}") from None

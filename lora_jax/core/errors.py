"""Bad input as classes of its own: whatever else is raised is a bug, and keeps its traceback."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """What was asked for can't be done: one sentence for the user, that names what is wrong and what to do.

    >>> import lora_jax as lj
    >>> try:
    ...     lj.LoraConfig(rank=0)
    ... except lj.InputError as error:
    ...     print(error)
    rank must be a whole number of at least 1, not 0
    """


class FileError(InputError, OSError):
    """The system can't read or write a file or directory that was named."""


class MissingError(InputError, FileNotFoundError):
    """A file or directory that was named is not there."""


class OccupiedError(InputError, FileExistsError):
    """What was to be written would replace something."""


class NotLowRankError(InputError):
    """A function uses an adapted parameter in a way that needs `W + AB` as one array.

    The message names the parameter, the primitive and the place, and what to do; `lora_jax.explain` says it before.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> params = {"w": jnp.ones((2, 2))}
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), lj.Layout((), (0,), (1,)))
    >>> try:
    ...     lj.lora(lambda p: jnp.exp(p["w"]))(lj.attach(params, {"w": pair}))
    ... except lj.NotLowRankError as error:
    ...     print(str(error).partition(" at ")[0])
    w (shape (2, 2)) cannot stay low-rank in `exp`
    """


def meant(name: str, known: Iterable[str]) -> str:
    """What to add to a message about a name that is not known: the nearest of those that are, if one is near.

    >>> meant("tensorbord", ["tensorboard", "wandb"]), meant("x", ["tensorboard"])
    ('; do you mean tensorboard?', '')
    """
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; do you mean {near[0]}?" if near else ""


@contextlib.contextmanager
def within(where: object) -> Iterator[None]:
    """An InputError of the block says first where it is: in which file, or in which line of it.

    >>> with within("config.json"):
    ...     raise InputError("it lacks num_labels")
    Traceback (most recent call last):
    lora_jax.core.errors.InputError: config.json: it lacks num_labels
    """
    try:
        yield
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None

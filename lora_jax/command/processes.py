"""Several processes as one program: what they agree on. How they begin and end is in `hosts`.

Each process runs the same program on devices of its own; the first one alone writes and prints. Where one of them dies, the
others end, too: a sum over all devices fails at once when a connection breaks, and JAX ends a process that has not heard of
the others for some time. Every process has to call the functions here.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax.core.errors import InputError


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def largest(number: int) -> int:
    """The largest number of all processes."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def from_first(value: Any) -> Any:
    """The first process's value, of JSON's own types, in all of them."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(text, size))))


def first(fn: Callable[[], object]) -> None:
    """Call `fn` in the first process alone; where it fails, all of them raise an error."""
    with all_or_none():
        if is_first():
            fn()


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """Raise an error in every process where one of them raises one within; nothing within may wait for another process.

    Raises:
      InputError: another process raised an error, and this one did not.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    which = largest(-1 if failed is None else jax.process_index())
    if failed is not None:
        raise failed
    if which >= 0:
        raise InputError(f"process {which} of {jax.process_count()} can't go on, and says why")

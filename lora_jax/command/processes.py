"""Several processes as one program: how they begin, what they agree on, and how they end.

Each process runs the same program on devices of its own; the first one alone writes and prints. Where one of them dies, the
others end, too: a sum over all devices fails at once when a connection breaks, and JAX ends a process that has not heard of
the others for `_HEARTBEAT` seconds.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lora_jax.core.errors import InputError
from lora_jax.core.fields import check, option
from lora_jax.sharding import make_mesh, read_axes

_HEARTBEAT = 30  # seconds after which a silent process counts as dead
_SHUTDOWN = 60  # seconds that a process waits at its end for the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """The devices of a program.

    Raises:
      InputError: an option is malformed or out of range, or the others that it needs are missing.

    >>> Hosts(mesh="data=2,model=4").axes
    {'data': 2, 'model': 4}
    """

    mesh: Annotated[
        str | None,
        option("train on all devices: axes among data, fsdp and model, the slowest first, and their sizes, as "
               "data=2,model=4 (default: one device); also with --resume, whatever it was", metavar="AXES"),
    ] = None  # fmt: skip
    coordinator: Annotated[
        str | None,
        option("a free port of the first process's host; with the next two, to train in several processes, each started by "
               "a command of its own", metavar="HOST:PORT"),
    ] = None  # fmt: skip
    processes: Annotated[int | None, option("how many processes there are", metavar="N")] = None
    process_id: Annotated[int | None, option("which of them this is, from 0; the first writes and prints", metavar="I")] = None

    def __post_init__(self):
        check(self)
        _ = self.axes
        together = {"--coordinator": self.coordinator, "--processes": self.processes, "--process-id": self.process_id}
        missing = [name for name, value in together.items() if value is None]
        if 0 < len(missing) < len(together):
            raise InputError(f"{', '.join(together)} belong together: give {' and '.join(missing)}, too, or none of them")
        if self.coordinator is None or self.processes is None or self.process_id is None:
            return
        found = re.fullmatch(r"\S+:(\d{1,5})", self.coordinator)
        if found is None or not 0 < int(found[1]) < 2**16:
            raise InputError(f"--coordinator must be HOST:PORT, with a port from 1 to 65535, not {self.coordinator!r}")
        if self.processes < 1:
            raise InputError(f"--processes must be at least 1, not {self.processes}")
        if not 0 <= self.process_id < self.processes:
            last = self.processes - 1
            raise InputError(f"--process-id must be from 0 to {last} with --processes {self.processes}, not {self.process_id}")
        if self.mesh is None:
            raise InputError("--processes needs --mesh, which says how all their devices work together")

    @property
    def axes(self) -> dict[str, int]:
        """The size of each mesh axis; without a mesh, none."""
        return {} if self.mesh is None else read_axes(self.mesh)

    def make_mesh(self) -> Mesh | None:
        """The mesh of the devices of all processes.

        Raises:
          InputError: there are more devices or fewer.
        """
        try:
            return None if self.mesh is None else make_mesh(self.axes)
        except InputError as error:
            raise InputError(f"--mesh {self.mesh}: {error}") from None

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """The processes know of each other. Comes before anything that uses a device.

        An error that is no InputError ends this process at once: the others fail then, instead of waiting for it.
        """
        if self.coordinator is None:
            yield
            return
        self._look_up()
        jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM to itself
        jax.distributed.initialize(
            self.coordinator,
            self.processes,
            self.process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
        try:
            yield
        except InputError:
            jax.distributed.shutdown()
            raise
        except BaseException as error:
            self._end(error)
        jax.distributed.shutdown()

    def _look_up(self) -> None:
        """Raise an InputError where the coordinator's name is not known: JAX would try for minutes, and then abort."""
        host, _, port = str(self.coordinator).rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port))
        except OSError as error:
            raise InputError(f"--coordinator {self.coordinator}: the host {host} is not known ({error})") from None

    def _end(self, error: BaseException) -> NoReturn:
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = f"another one is gone, or a device failed ({str(error).splitlines()[0]}): start all of them again"
            print(f"lora-jax: process {self.process_id} of {self.processes} ends, since {reason}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # which asks no other process, as the usual way does


# --- what they agree on: every process has to call these -----------------------------------------------------------------


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

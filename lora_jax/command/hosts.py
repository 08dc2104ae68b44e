"""The options that say which devices and processes a program has, and how its processes meet and part.

JAX is imported where it is needed, so that a command line can list the options without it.
"""

import contextlib
import dataclasses
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, NoReturn

from lora_jax.core.errors import InputError, within
from lora_jax.core.fields import check, option

if TYPE_CHECKING:
    from jax.sharding import Mesh

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
        if self.mesh is None:
            return {}
        from lora_jax.sharding import read_axes

        return read_axes(self.mesh)

    def make_mesh(self) -> "Mesh | None":
        """The mesh of the devices of all processes.

        Raises:
          InputError: there are more devices or fewer.
        """
        from lora_jax.sharding import make_mesh

        with within(f"--mesh {self.mesh}"):
            return None if self.mesh is None else make_mesh(self.axes)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """The processes know of each other. Comes before anything that uses a device.

        An error that is no InputError ends this process at once: the others fail then, instead of waiting for it.
        """
        if self.coordinator is None:
            yield
            return
        import jax

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
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError):
            reason = f"another one is gone, or a device failed ({str(error).splitlines()[0]}): start all of them again"
            print(f"lora-jax: process {self.process_id} of {self.processes} ends, since {reason}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # which asks no other process, as the usual way does

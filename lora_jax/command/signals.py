"""Signals that ask a run to stop, heard by all of its processes."""

import signal
import sys
from typing import Any

from lora_jax.command import processes


class Interrupted(Exception):
    """A signal asked the run to stop.

    Args:
      signum: which.
      finished: whether the run was finished by then, and only its report was not.
    """

    def __init__(self, signum: int, finished: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.finished = signum, finished

    def report(self, how_to_go_on: str) -> int:
        """Say so in the first process; returns the exit code."""
        if processes.is_first():
            print(f"lora-jax: stopped by {self}; {how_to_go_on}", file=sys.stderr)
        return 128 + self.signum


class Signals:
    """Turns the first SIGINT or SIGTERM into a flag that `check` raises, in all processes; a second one acts at once."""

    def __init__(self):
        self._seen = 0

    def __enter__(self) -> "Signals":
        self._old: dict[int, Any] = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._seen = number
        signal.signal(number, self._old[number])

    def check(self) -> None:
        """Raise an Interrupted if a signal has come."""
        if seen := processes.largest(self._seen):
            raise Interrupted(seen)

"""Where else the metrics of a run go: TensorBoard and Weights & Biases, beside `metrics.jsonl`.

    RUN/tensorboard/    TensorBoard's event files, one each time that the run was begun or gone on with
    RUN/wandb/          the files of Weights & Biases, and `id`, what the run is called there

The first process alone has trackers. One that fails is left out from there on, and the run goes on: its metrics are in
`metrics.jsonl` all the same. A run that goes on does so in the same places, which get what they lack of the steps before. But
Weights & Biases offline does not say what it has: what it missed there stays missing.
"""

import contextlib
import importlib
import json
import os
import pathlib
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lora_jax.command import processes
from lora_jax.command.metrics import Log
from lora_jax.command.options import RunConfig
from lora_jax.core import files
from lora_jax.core.errors import InputError

Values = Mapping[str, float]
_FINAL = "final/"


class Tracker(Protocol):
    """One place where metrics go; it is made with the run's options, its directory and its log, and gets all steps of that."""

    def write(self, step: int, values: Values) -> None:
        """Take what was measured at a step, unless it has that already."""
        ...

    def close(self, summary: Values | None) -> None:
        """End with what the run ended with; `None`: it was stopped, or has failed."""
        ...


class TensorBoard:
    """An event file, with the options as hyperparameters and what is measured as scalars.

    It is written step by step, where tensorboardX's `SummaryWriter` has a queue, of which a run that is killed loses some.
    """

    def __init__(self, options: Mapping[str, Any], directory: pathlib.Path, log: Log):
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        folder = directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The suffix keeps the files of one second apart.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{len(list(folder.iterdir())):04}")
        # Hides the events of all files before: they come again.
        self._write(step=0, session_log=events.SessionLog(status=events.SessionLog.START))
        plain = {name: _plain(value) for name, value in options.items() if value is not None}
        shown = ("loss", log.metric.field, _FINAL + log.metric.field)
        begin, session, self._end = summary.hparams(plain, dict.fromkeys(shown, 0.0))
        self._write(summary=begin)
        self._write(summary=session)

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))
        self._writer.flush()

    def write(self, step: int, values: Values) -> None:
        """A scalar for each value."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))

    def close(self, summary: Values | None) -> None:
        """What the run ended with, as scalars `final/...` of its last step, and the end of the session."""
        if summary is not None:
            self.write(int(summary["steps"]), {_FINAL + name: value for name, value in summary.items()})
            self._write(summary=self._end)
        self._writer.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


class WandB:
    """A run of Weights & Biases, of the project `lora-jax` unless the environment names another."""

    def __init__(self, options: Mapping[str, Any], directory: pathlib.Path, log: Log):
        import wandb

        where: Any = {"project": os.environ.get("WANDB_PROJECT", "lora-jax"), "dir": str(directory), "id": _wandb_id(directory)}
        where |= {"name": "/".join(directory.absolute().parts[-2:]), "resume": "allow", "reinit": "create_new"}
        settings = wandb.Settings(console="off")
        self._run = wandb.init(config=dict(options), allow_val_change=True, settings=settings, **where)
        # What it has stays.
        self._first = log.reached + 1 if self._run.offline else self._run.starting_step

    def write(self, step: int, values: Values) -> None:
        """A row of the history, unless it is there."""
        if step >= self._first:
            self._run.log(dict(values), step=step, commit=True)

    def close(self, summary: Values | None) -> None:
        """What the run ended with, as its summary."""
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=0 if summary is not None else 1)


def _wandb_id(directory: pathlib.Path) -> str:
    """What a run is called there, from its first time on."""
    file = directory / "wandb" / "id"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        files.write(file, secrets.token_hex(8).encode())
    with files.reading(file):
        return file.read_text(encoding="utf-8").strip()


KINDS: Mapping[str, tuple[str, Callable[[Mapping[str, Any], pathlib.Path, Log], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WandB),
}


class Trackers:
    """The trackers of a run, as a context manager, which closes those that are still open after an error.

    Args:
      trackers: by name.
    """

    def __init__(self, trackers: Mapping[str, Tracker]):
        self._open = dict(trackers)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, *_: object) -> None:
        self._close(None)

    def write(self, line: Mapping[str, float | None]) -> None:
        """Send a line of `metrics.jsonl`, without what is not known in it."""
        values = _known(line)
        step = int(values.pop("step"))
        self._each(f"at step {step}", lambda tracker: tracker.write(step, values))

    def end(self, summary: Mapping[str, float | None] | None) -> None:
        """Close them all, with what the run ended with; `None`: it was stopped, or has diverged.

        Every process calls this, and waits for the first.
        """
        processes.first(lambda: self._close(summary))

    def _close(self, summary: Mapping[str, float | None] | None) -> None:
        self._each("at its end", lambda tracker: tracker.close(None if summary is None else _known(summary)))
        self._open = {}

    def _each(self, when: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._open[name]
                _warn(name, when, error)
                with contextlib.suppress(Exception):
                    tracker.close(None)


NONE = Trackers({})


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _warn(name: str, when: str, error: Exception) -> None:
    text = f"{type(error).__name__}: {error}"
    print(f"lora-jax: {name} failed {when} and is left out from here on; metrics.jsonl goes on ({text})", file=sys.stderr)


def check_installed(config: RunConfig) -> None:
    """Raise a ModuleNotFoundError where the package of a tracker is missing, in the process that needs it."""
    for name in config.track if processes.is_first() else ():
        importlib.import_module(KINDS[name][0])


def begin(config: RunConfig, directory: pathlib.Path, log: Log, advice: str) -> Trackers:
    """The trackers of a run, in its first process, with all steps so far; all processes call this.

    Args:
      config: its options, which name the trackers.
      directory: the run.
      log: its metrics, as far as they are there.
      advice: what to do where one can't begin.

    Raises:
      InputError: one can't begin, and the run is at its first step; a run that goes on does so without it.
    """
    found: dict[str, Tracker] = {}

    def make() -> None:
        options = json.loads(config.to_json())
        for name in config.track:
            try:
                found[name] = KINDS[name][1](options, directory, log)
            except Exception as error:
                if not log.lines:
                    with Trackers(found):
                        raise InputError(f"--track {name} can't begin: mend that and {advice} ({error})") from error
                _warn(name, "to begin", error)

    if config.track:
        processes.first(make)
    trackers = Trackers(found)
    for line in log.lines:
        trackers.write(line)
    return trackers

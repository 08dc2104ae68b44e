"""Fine-tuning a base model with adapters: what `lora-jax finetune` does, whatever the task.

A run can be stopped at any moment and resumed: checkpoints hold the adapters, the optimiser's state, the random key and
the position of the data, and a step is a function of those, so a resumed run ends as one that was never stopped. It may go
on with another mesh or number of processes: the batches are the same, and so are all sums but for rounding.
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.adapters import initializers, merging
from lora_jax.adapters.summary import summary
from lora_jax.command import device_options, metrics, options, processes, run, run_plan, starting
from lora_jax.command.hosts import Hosts
from lora_jax.command.options import RunConfig
from lora_jax.command.signals import Interrupted, Signals
from lora_jax.command.tasks.base import Session
from lora_jax.command.tasks.registry import prepare
from lora_jax.command.trainer import Diverged, Run, Trainer, optimizer
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import InputError
from lora_jax.training import checkpoint, recipe, train

Adapters = dict[str, Adapter]


def finetune_command(line: argparse.Namespace) -> int:
    """`lora-jax finetune`; returns the exit code."""
    given = options.given_run(line)
    hosts = Hosts(**options.given(line, Hosts))
    _check_plan(line)
    if line.resume is not None:
        more = options.more_steps(given.pop("steps")) if "steps" in given else 0
        if given or line.out is not None:
            raise InputError("--resume goes on with the run's own options: leave out all but --steps and those of the mesh")
        with hosts.connected():
            return _run(None, line.resume, hosts, more)
    starting.check(given)
    if line.plan:
        return run_plan.plan_run(given, hosts, line.topology)
    config = options.new_run(given.pop("task", "classify"), given)
    with hosts.connected():
        return _run(config, line.out, hosts, given=given)


def _check_plan(line: argparse.Namespace) -> None:
    if line.topology is not None and not line.plan:
        raise InputError("--topology says for which chips to --plan: give that, too")
    if line.plan and (line.resume is not None or line.out is not None):
        raise InputError("--plan makes no run, and is for a new one: leave --resume and --out out")


def _run(
    config: RunConfig | None,
    directory: pathlib.Path | None,
    hosts: Hosts,
    more: int = 0,
    given: Collection[str] = (),
) -> int:
    """A new run, or without a configuration the one in the directory, for so many steps more than it has."""
    console = rich.console.Console(quiet=not processes.is_first())
    with processes.all_or_none():
        mesh = hosts.make_mesh()
        if config is not None:
            config = device_options.here(config, given, hosts.axes, console)
    free = processes.from_first(str(run.free_directory(pathlib.Path("runs"))))
    directory = directory or pathlib.Path(free)
    try:
        if config is None:
            resume(directory, console, mesh, more)
        else:
            start(config, directory, console, mesh)
    except Interrupted as error:
        return error.report(f"go on with: lora-jax finetune --resume {directory}")
    except Diverged as error:
        return error.report()
    return 0


def start(config: RunConfig, directory: pathlib.Path, console: rich.console.Console, mesh: Mesh | None = None) -> None:
    """Make a run in `directory` and train it, on the mesh if there is one.

    Raises:
      InputError: bad input, found before any training.
      Interrupted: the run was stopped; it can be resumed.
      Diverged: it has no finite result.
    """
    session = starting.with_adapter(_prepare(config, directory, mesh))
    adapters = session.init(session.config)
    processes.first(lambda: run.create(directory, session.config))
    _train(*_begin(session, adapters, directory), directory, console)


def resume(directory: pathlib.Path, console: rich.console.Console, mesh: Mesh | None = None, more: int = 0) -> None:
    """Go on with a run that was stopped, on the mesh if there is one, whatever it was on before.

    Args:
      directory: the run.
      console: where to print.
      mesh: the devices.
      more: train a finished run for so many steps more, with its optimiser's state and a learning rate that rises and falls
        once more.

    Raises:
      InputError: there is no run, its data or base model is gone or changed, or there are more steps for one that isn't
        finished.
      Interrupted: the run was stopped again.
      Diverged: it has no finite result.
    """
    session = _prepare(None, directory, mesh, more)
    adapters = _first_adapters(session, directory)
    # With more steps, and for a run of before with what it did not record, such as the ends.
    processes.first(lambda: files.write(directory / "config.json", session.config.to_json().encode()))
    _train(*_begin(session, adapters, directory), directory, console)


def _first_adapters(session: Session, directory: pathlib.Path) -> Adapters:
    """Those that a run began with, or those of its newest checkpoint, which take their place."""
    if session.config.adapter is not None and processes.from_first(_last_step(directory)):
        return checkpoint.load(directory / "adapters", variables=session.task.variables)
    session = starting.with_adapter(session)
    return session.init(session.config)


def _last_step(directory: pathlib.Path) -> int:
    """The step of a run's newest checkpoint; 0 if there is none."""
    with checkpoint.Manager(directory / "adapters") as manager:
        return manager.latest_step() or 0


def _read(directory: pathlib.Path, more: int) -> RunConfig:
    config = run.read_config(directory)
    if config.imported is not None:
        raise InputError(
            f"{directory} was imported from {config.imported}: there is no training to go on with; begin a run with its "
            f"adapters: lora-jax finetune --adapter {config.imported}"
        )
    options.check_trainable(config)
    if not more:
        return config
    step = _last_step(directory)
    if step < config.steps:
        raise InputError(
            f"{directory} is at step {step} of {config.steps}: go on without --steps, which trains a finished run further"
        )
    return dataclasses.replace(config, steps=config.steps + more, finished=[*config.finished, config.steps])


def _prepare(config: RunConfig | None, directory: pathlib.Path, mesh: Mesh | None, more: int = 0) -> Session:
    """What a new run needs, or without a configuration the one in the directory: the same in all processes."""
    resume = config is None
    with processes.all_or_none():
        if config is None:
            config = _read(directory, more)
        elif processes.is_first():
            run.check_free(directory)
        sharding.check_batch(mesh, config.batch_size)
        session = prepare(config, mesh)
    axes = "" if mesh is None else ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    mine = dataclasses.asdict(session.config) | {"resume": resume, "directory": str(directory.absolute()), "mesh": axes}
    first = processes.from_first(mine)
    with processes.all_or_none():
        if odd := [f"{name} ({value!r}, not {first[name]!r})" for name, value in mine.items() if value != first[name]]:
            raise InputError(f"this process differs from the first in {', '.join(odd)}: start all with the same options")
    return session


def _begin(session: Session, adapters: Adapters, directory: pathlib.Path) -> tuple[Session, Adapters]:
    """The session and the adapters at step 0; where `init` changes the base, with the changed one.

    The run keeps those adapters, from which the base is changed again and the trained ones are converted.
    """
    if session.config.init not in options.CHANGE_THE_BASE:
        return session, adapters
    folder, variables = directory / "initial", session.task.variables
    if not processes.from_first(folder.exists()):
        _, adapters = getattr(initializers, session.config.init)(variables, adapters)
        with files.writing(folder):
            checkpoint.save(folder, adapters, config=session.config.lora)
    initial = checkpoint.load(folder, variables=variables)
    pairs = {path: adapter for path, adapter in initial.items() if isinstance(adapter, LowRank)}
    task = dataclasses.replace(session.task, variables=merging.unmerge(variables, pairs))
    return dataclasses.replace(session, task=task), initial


class _Program:
    """A run by itself, on the devices of its base; it goes on from its newest checkpoint, if there is one."""

    def __init__(self, session: Session, adapters: Adapters, manager: checkpoint.Manager):
        self._config, self._task, self._manager = session.config, session.task, manager
        config, task, tx = session.config, session.task, optimizer(session.config)
        self._batches = task.train_batches(config.seed)
        self.state = train.init_state(adapters, tx, key=jax.random.key(config.seed))
        self.saved, self.loss = _latest_step(manager), None
        if self.saved is not None:
            found = manager.restore(tx=tx, variables=task.variables)
            assert found.state is not None
            self.state, self.loss = found.state, found.data["loss"]
            self._batches.set_state(found.data["position"])
        self._train_step = recipe.train_step(task.loss, tx, accumulate=task.accumulate, like=self.state)
        self._measure = train.make_eval_step(task.measure)

    def advance(self) -> tuple[np.ndarray, np.ndarray]:
        """One training step; its loss, and how many steps were skipped so far."""
        self.state, found = self._train_step(self.state, self._task.variables, next(self._batches))
        return np.asarray([float(found["loss"])]), np.asarray([int(found["skipped"])])

    def measure(self, batch: Any) -> np.ndarray:
        """What the task measures on a held-out batch."""
        return np.asarray(sharding.gather(self._measure(self.state.adapters, self._task.variables, batch)))[None]

    def snapshot(self, step: int, losses: Sequence[float | None]) -> Sequence[Callable[[], None]]:
        """A copy of the state, which is written in the background once it is called."""
        state, data = _copy(self.state), {"position": self._batches.get_state(), "loss": losses[0]}
        save = functools.partial(self._manager.save, config=self._config.lora, step=step, state=state, data=data)
        return [lambda: save(state.adapters)]


@jax.jit
def _copy(state: train.TrainState) -> train.TrainState:
    return jax.tree.map(jnp.copy, state)


def _latest_step(manager: checkpoint.Manager) -> int | None:
    """The newest step, which all processes must see."""
    mine = manager.latest_step()
    first = processes.from_first(mine)
    with processes.all_or_none():
        if mine != first:
            places = f"this process finds the checkpoint of step {mine}, the first that of step {first}"
            raise InputError(f"{places}: the run's directory must be on a file system that all of them share")
    return mine


def _train(session: Session, adapters: Adapters, directory: pathlib.Path, console: rich.console.Console) -> None:
    config, task = session.config, session.task
    console.out(summary(task.variables, adapters), highlight=False)
    console.out("\n".join([*task.description, *_phase(config), f"run: {directory}"]), highlight=False)
    with checkpoint.Manager(directory / "adapters", keep=2) as manager, Signals() as signals:
        program = _Program(session, adapters, manager)
        with metrics.Log(directory, program.saved or 0, task.metric, write=processes.is_first()) as log:
            one = Run(config, directory, log, program.loss, int(program.state.skipped))
            trainer = Trainer(task, [one], program, save_every=config.save_every, saved=program.saved)
            try:
                trainer.train(console, signals)
            except Interrupted:
                manager.wait()  # in all processes, before one of them ends
                raise
            if processes.is_first():
                trainer.draw()
                _report(session, program.state.adapters, one, trainer.step, console)
            if one.fault is not None:
                manager.wait()
                raise _diverged(one, trainer.step, manager.latest_step())


def _phase(config: RunConfig) -> list[str]:
    """What a schedule means that is not the first of its run, in words."""
    if not config.finished:
        return []
    ended, rate = config.finished[-1], f"{config.learning_rate:g}"
    return [f"steps {ended + 1} to {config.steps}: the learning rate rises to {rate} and falls to 0 once more"]


def _diverged(one: Run, step: int, kept: int | None) -> Diverged:
    """The error for a run that diverged at a step, from its newest checkpoint."""
    left = (
        "It has no adapters: none were good" if kept is None else f"Its adapters are those of step {kept}, the last good ones"
    )
    return Diverged(
        f"{one.directory} diverged at step {step}: {one.fault}. {left}. Start again with a lower --learning-rate than "
        f"{one.config.learning_rate:g}, or look for bad numbers in the base or the data"
    )


def _report(session: Session, adapters: Adapters, one: Run, step: int, console: rich.console.Console) -> None:
    task, log = session.task, one.log
    before, after = log.score(0), log.score(step)
    found = summary(task.variables, adapters)
    adapter, whole = found.adapter_bytes, found.parameter_bytes
    console.out(
        f"{task.metric.held_out} on {task.held_out}: {before} before, {after} after\n"
        f"adapter: {adapter:,} bytes, base: {whole:,} bytes ({adapter / whole:.2%})\n"
        f"metrics and picture: {one.directory / 'metrics.jsonl'}, {one.directory / 'curve.png'}",
        highlight=False,
    )

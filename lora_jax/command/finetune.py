"""Fine-tuning a base model with adapters: what `lora-jax finetune` does, whatever the task.

A run can be stopped at any moment and resumed: checkpoints hold the adapters, the optimiser's state, the random key and
the position of the data, and a step is a function of those, so a resumed run ends as one that was never stopped. It may go
on with another mesh or number of processes: the batches are the same, and so are all sums but for rounding.
"""

import argparse
import contextlib
import dataclasses
import functools
import pathlib
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.adapters import initializers, merging
from lora_jax.adapters.summary import summary
from lora_jax.command import arguments, config_files, device_options, metrics, options, processes, run, run_plan, starting
from lora_jax.command import trackers as tracking
from lora_jax.command.hosts import Hosts
from lora_jax.command.meter import StepFlops
from lora_jax.command.options import RunConfig
from lora_jax.command.report import page
from lora_jax.command.signals import Interrupted, Signals
from lora_jax.command.tasks.base import Session
from lora_jax.command.tasks.registry import prepare
from lora_jax.command.trainer import Diverged, Run, Trainer, optimizer, reported
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import InputError
from lora_jax.planning.decoder_step import check_rows
from lora_jax.training import checkpoint, train

Adapters = dict[str, Adapter]


def finetune_command(line: argparse.Namespace) -> int:
    """`lora-jax finetune`; returns the exit code."""
    given = config_files.given_run(line)
    hosts = Hosts(**arguments.given(line, Hosts))
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
    if line.print_config:
        print(config_files.text(config, given), end="")
        return 0
    with hosts.connected():
        return _run(config, line.out, hosts, given=given)


def _check_plan(line: argparse.Namespace) -> None:
    if line.topology is not None and not line.plan:
        raise InputError("--topology says for which chips to --plan: give that, too")
    if line.print_config and (line.plan or line.resume is not None or line.out is not None):
        raise InputError("--print-config prints the options of a new run: leave --plan, --resume and --out out")
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
        how = "the run is finished, and its report is made by" if error.finished else "go on with"
        return error.report(f"{how}: lora-jax finetune --resume {directory}")
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
    if config.epochs is not None:
        console.out(f"{config.epochs:g} epochs are {session.config.steps} steps", highlight=False)
    adapters = session.init(session.config)
    processes.first(lambda: run.create(directory, session.config))
    _train(*_begin(session, adapters, directory), directory, console)


def resume(directory: pathlib.Path, console: rich.console.Console, mesh: Mesh | None = None, more: int = 0) -> None:
    """Go on with a run that was stopped, on the mesh if there is one, whatever it was on before.

    Args:
      directory: the run.
      console: where to print.
      mesh: the devices.
      more: train a finished run for so many steps more, with its optimiser's state; the learning rate follows its schedule once
        more.

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
    if config.made:
        raise InputError(
            f"{directory} was made of other runs by `lora-jax {config.made['command']}`: there is no training to go on with; "
            f"begin a run with its adapters: lora-jax finetune --adapter {directory}"
        )
    options.check_trainable(config)
    if not more:
        return config
    step = _last_step(directory)
    stopped = metrics.is_stale(metrics.best(metrics.read(directory), config.finished), config.patience)
    if step < config.steps and not stopped:
        raise InputError(
            f"{directory} is at step {step} of {config.steps}: go on without --steps, which trains a finished run further"
        )
    return dataclasses.replace(config, steps=step + more, finished=[*config.finished, step])


def _prepare(config: RunConfig | None, directory: pathlib.Path, mesh: Mesh | None, more: int = 0) -> Session:
    """What a new run needs, or without a configuration the one in the directory: the same in all processes."""
    resume = config is None
    with processes.all_or_none():
        if config is None:
            config = _read(directory, more)
        elif processes.is_first():
            run.check_free(directory)
        tracking.check_installed(config)
        sharding.check_batch(mesh, config.batch_size)
        check_rows(config.batch_size, config.accumulate, mesh)
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
    if processes.from_first(checkpoint.Manager(folder).latest_step()) is None:
        _, adapters = getattr(initializers, session.config.init)(variables, adapters)
        with files.writing(folder):
            checkpoint.save(folder, adapters, config=session.config.lora)
    initial = checkpoint.load(folder, variables=variables)
    pairs = {path: adapter for path, adapter in initial.items() if isinstance(adapter, LowRank)}
    task = dataclasses.replace(session.task, variables=merging.unmerge(variables, pairs))
    return dataclasses.replace(session, task=task), initial


class _Program:
    """A run by itself, on the devices of its base; it goes on from its newest checkpoint, if there is one."""

    def __init__(self, session: Session, adapters: Adapters, manager: checkpoint.Manager, best: checkpoint.Manager):
        self._config, self._task, self._manager, self._best = session.config, session.task, manager, best
        config, task, tx = session.config, session.task, optimizer(session.config)
        self._batches = task.train_batches(config.seed)
        self.state = train.init_state(adapters, tx, key=jax.random.key(config.seed))
        self.saved, self.last = _latest_step(manager), {}
        if self.saved is not None:
            found = manager.restore(tx=tx, variables=task.variables)
            assert found.state is not None
            self.state, self.last = found.state, dict(found.data)
            self._batches.set_state(self.last.pop("position"))
        how: Any = {"accumulate": config.accumulate, "max_grad_norm": config.max_grad_norm or None}
        self._train_step = train.make_train_step(task.loss, tx, like=self.state, **how)
        self.eval_step = train.make_eval_step(task.measure)
        self._flops = StepFlops(self._train_step)
        self.devices = jax.tree.leaves(self.state.adapters)[0].sharding.device_set

    def advance(self) -> Mapping[str, np.ndarray]:
        """One training step; its loss and more, and how many steps were skipped so far."""
        batch = next(self._batches)
        self._flops.taken(batch)
        self.state, found = self._train_step(self.state, self._task.variables, batch)
        return {name: np.asarray(value)[None] for name, value in reported(found).items()}

    def measure(self, batch: Any) -> np.ndarray:
        """What the task measures on a held-out batch."""
        return np.asarray(sharding.gather(self.eval_step(self.state.adapters, self._task.variables, batch)))[None]

    def flops(self) -> int | None:
        """Of the products of the last step."""
        return self._flops.last(self.state, self._task.variables)

    def snapshot(self, step: int, last: Sequence[Mapping[str, float | None]]) -> Sequence[Callable[[], None]]:
        """A copy of the state, which is written in the background once it is called."""
        state, data = jax.block_until_ready(_copy(self.state)), {"position": self._batches.get_state(), "loss": None, **last[0]}
        save = functools.partial(self._manager.save, config=self._config.lora, step=step, state=state, data=data)
        return [lambda: save(state.adapters)]

    def keep(self, step: int, better: Sequence[bool]) -> None:
        """Keep the adapters as the best, unless they are already; the checkpoint is written first."""
        if any(better) and _latest_step(self._best) != step:
            self._manager.wait()
            self._best.save(self.state.adapters, config=self._config.lora, step=step)
            self._best.wait()


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
    console.out(summary(task.variables, adapters).folded(), highlight=False)
    console.out("\n".join([*task.description, *_phase(config), f"run: {directory}"]), highlight=False)
    folders = directory / "adapters", directory / "best"
    with (
        checkpoint.Manager(folders[0], keep=2) as manager,
        checkpoint.Manager(folders[1], keep=1) as best,
        contextlib.ExitStack() as listening,
    ):
        signals = listening.enter_context(Signals())
        program = _Program(session, adapters, manager, best)
        with (
            metrics.Log(directory, program.saved or 0, task.metric, write=processes.is_first()) as log,
            tracking.begin(config, directory, log, f"go on with --resume {directory}, or start without it") as trackers,
        ):
            one = Run(config, directory, log, trackers, program.last, int(program.state.skipped))
            trainer = Trainer(task, [one], program, save_every=config.checkpoint_steps, saved=program.saved)
            try:
                trainer.train(console, signals)
                signals.check()  # one that came after the last step
            except Interrupted:
                manager.wait()  # in all processes, before one of them ends
                trackers.end(None)
                raise
            listening.close()
            manager.wait()
            before = None if config.adapter is not None and program.saved is not None else adapters
            try:
                _finish(session, before, one, trainer, program, console)
            except KeyboardInterrupt:
                raise Interrupted(signal.SIGINT, finished=one.fault is None) from None


def _finish(
    session: Session, before: Adapters | None, one: Run, trainer: Trainer, program: _Program, console: rich.console.Console
) -> None:
    """What is made of a run that has ended: the report, which may fail, after all else.

    Raises:
      Diverged: the run has no finite result.
    """
    task, ended = session.task, program.state.adapters
    one.trackers.end(trainer.summary(one) if one.fault is None else None)
    if processes.is_first():
        trainer.draw()
        _report(session, ended, one, trainer, console)
    at_hand = None if one.config.keeps_best or one.fault is not None else ended
    with console.status(f"writing {page.FILE}"):
        written = page.attempt(one, task, before, {task.measure: program.eval_step}, at_hand)
    if written:
        console.out(f"report: {one.directory / page.FILE}", highlight=False)
    if one.fault is not None:
        raise _diverged(one, trainer.step)


def _phase(config: RunConfig) -> list[str]:
    """What a schedule means that is not the first of its run, in words."""
    if not config.finished:
        return []
    ended, rate = config.finished[-1], f"{config.learning_rate:g}"
    return [f"steps {ended + 1} to {config.steps}: the learning rate follows its schedule once more, up to {rate}"]


def _diverged(one: Run, step: int) -> Diverged:
    """The error for a run that diverged at a step."""
    return Diverged(
        f"{one.directory} diverged at step {step}: {one.fault}. {page.left(one)}. Start again with a lower --learning-rate "
        f"than {one.config.learning_rate:g}, or look for bad numbers in the base or the data"
    )


def _report(session: Session, adapters: Adapters, one: Run, trainer: Trainer, console: rich.console.Console) -> None:
    task, log = session.task, one.log
    if one.is_stale and trainer.step < trainer.steps:
        console.out(f"stopped at step {trainer.step}: {session.config.patience} tests in a row were no better than the best")
    step = one.kept_step
    kept = "" if step == trainer.step else f" (of step {step}, the best)"
    before, after = log.score(0), log.score(step) + kept
    found = summary(task.variables, adapters)
    adapter, whole = found.adapter_bytes, found.parameter_bytes
    details = "".join(f"{text}\n" for text in log.details(0, step))
    console.out(
        f"{task.metric.held_out} on {task.held_out}: {before} before, {after} after\n{details}"
        f"adapter: {adapter:,} bytes, base: {whole:,} bytes ({adapter / whole:.2%})\n"
        f"metrics and picture: {one.directory / 'metrics.jsonl'}, {one.directory / 'curve.png'}",
        highlight=False,
    )

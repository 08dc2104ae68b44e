"""Fine-tuning a base model with adapters: what `lora-jax finetune` does, whatever the task.

A run can be stopped at any moment and resumed: checkpoints hold the adapters, the optimiser's state, the random key and
the position of the data, and a step is a function of those, so a resumed run ends as one that was never stopped. It may go
on with another mesh or number of processes: the batches are the same, and so are all sums but for rounding.
"""

import dataclasses
import math
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import optax
import rich.console
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.adapters import initializers, merging
from lora_jax.adapters.summary import summary
from lora_jax.command import metrics, plots, processes, run
from lora_jax.command.progress import Progress
from lora_jax.command.tasks.base import Session
from lora_jax.command.tasks.registry import prepare
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, LowRank
from lora_jax.core.errors import InputError
from lora_jax.training import checkpoint, optim, train

Adapters = dict[str, Adapter]


class Interrupted(Exception):
    """A signal asked the run to stop; `signum` says which."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def optimizer(config: run.RunConfig, learning_rate: Any = None) -> optax.GradientTransformation:
    """AdamW with a short warm-up to the learning rate and a cosine decay, in the way of the run's method.

    Args:
      config: the options.
      learning_rate: instead of the run's own; may be a traced number.
    """
    warmup = max(1, config.steps // 16)

    def adamw(rate: Any) -> optax.GradientTransformation:
        rise = optax.schedules.linear_schedule(0.0, rate, warmup)
        fall = optax.schedules.cosine_decay_schedule(rate, max(config.steps - warmup, 1))
        return optax.adamw(optax.schedules.join_schedules([rise, fall], [warmup]))

    rate = config.learning_rate if learning_rate is None else learning_rate
    if config.lora_plus is not None:
        return optim.lora_plus(adamw, rate, config.lora_plus)
    return optim.lora_fa(adamw(rate)) if config.method == "lora_fa" else adamw(rate)


def start(config: run.RunConfig, directory: pathlib.Path, console: rich.console.Console, mesh: Mesh | None = None) -> None:
    """Make a run in `directory` and train it, on the mesh if there is one.

    Raises:
      InputError: bad input, found before any training.
      Interrupted: the run was stopped; it can be resumed.
    """
    session = _prepare(config, directory, mesh)
    adapters = session.init(session.config)
    processes.first(lambda: run.create(directory, session.config))
    _train(*_begin(session, adapters, directory), directory, console)


def resume(directory: pathlib.Path, console: rich.console.Console, mesh: Mesh | None = None) -> None:
    """Go on with a run that was stopped, on the mesh if there is one, whatever it was on before.

    Raises:
      InputError: there is no run, or its data or base model is gone or changed.
      Interrupted: the run was stopped again.
    """
    session = _prepare(None, directory, mesh)
    _train(*_begin(session, session.init(session.config), directory), directory, console)


def _read(directory: pathlib.Path) -> run.RunConfig:
    config = run.read_config(directory)
    if config.imported is not None:
        raise InputError(f"{directory} was imported from {config.imported}: there is no training to go on with")
    return config


def _prepare(config: run.RunConfig | None, directory: pathlib.Path, mesh: Mesh | None) -> Session:
    """What a new run needs, or without a configuration the one in the directory: the same in all processes."""
    resume = config is None
    with processes.all_or_none():
        if config is None:
            config = _read(directory)
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
    if session.config.init not in run.CHANGE_THE_BASE:
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
        if seen := processes.largest(self._seen):
            raise Interrupted(seen)


class _Trainer:
    """The state of a run in training."""

    def __init__(self, session: Session, adapters: Adapters, manager: checkpoint.Manager, signals: Signals):
        self.session, self.config, self.manager, self.signals = session, session.config, manager, signals
        config, task = self.config, session.task
        tx = optimizer(config)
        self.batches = task.train_batches(config.seed)
        self.step, self.loss = 0, None
        self.state = train.init_state(adapters, tx, key=jax.random.key(config.seed))
        self._saved = _latest_step(manager)
        if self._saved is not None:
            found = manager.restore(tx=tx, variables=task.variables)
            assert found.state is not None
            self.state, self.step, self.loss = found.state, found.step, found.data["loss"]
            self.batches.set_state(found.data["position"])
        self._train_step = train.make_train_step(task.loss, tx, max_grad_norm=1.0, like=self.state)
        self._measure = train.make_eval_step(task.measure)

    def advance(self) -> None:
        """One training step."""
        self.state, metrics = self._train_step(self.state, self.session.task.variables, next(self.batches))
        loss = float(metrics["loss"])
        self.loss, self.step = loss if math.isfinite(loss) else None, self.step + 1
        if self.step % self.config.save_every == 0 or self.step == self.config.steps:
            self.save()

    def test(self, progress: Progress) -> float | None:
        """The score on the held-out texts; `None` if it is not finite."""
        task, sums = self.session.task, np.zeros(())
        for i, batch in enumerate(task.test_batches()):
            self.signals.check()
            progress.testing(i, task.test_count)
            found = sharding.gather(self._measure(self.state.adapters, task.variables, batch))
            sums = sums + np.asarray(found, np.float64)
        progress.testing(task.test_count, task.test_count)
        score = task.score(sums)
        return score if math.isfinite(score) else None

    def save(self) -> None:
        """Write a checkpoint of this step in the background, unless it has one."""
        if self._saved != self.step:
            data_state = {"position": self.batches.get_state(), "loss": self.loss}
            config, state = self.config.lora, self.state
            self.manager.save(state.adapters, config=config, step=self.step, state=state, data=data_state)
            self._saved = self.step


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
    console.out("\n".join([*task.description, f"run: {directory}"]), highlight=False)
    with checkpoint.Manager(directory / "adapters", keep=2) as manager, Signals() as signals:
        trainer = _Trainer(session, adapters, manager, signals)
        with metrics.Log(directory, trainer.step, task.metric, write=processes.is_first()) as log:
            with Progress(console, config.steps, trainer.step, task.per_step, task.unit, task.metric) as progress:
                _loop(trainer, log, progress)
            if processes.is_first():
                _finish(trainer, directory, log, console)


def _loop(trainer: _Trainer, log: metrics.Log, progress: Progress) -> None:
    config, signals = trainer.config, trainer.signals

    def record() -> None:
        score = None
        if trainer.step % config.test_every == 0 or trainer.step == config.steps:
            score = trainer.test(progress)
            progress.tested(trainer.step, score)
        log.append(trainer.step, trainer.loss, score)

    try:
        if processes.from_first(not log.lines or log.lines[-1]["step"] != trainer.step):
            record()  # of step 0, or of a checkpoint whose line was not written any more
        while trainer.step < config.steps:
            signals.check()
            trainer.advance()
            progress.step(trainer.step, trainer.loss)
            record()
    except Interrupted:
        trainer.save()
        trainer.manager.wait()
        raise


def _finish(trainer: _Trainer, directory: pathlib.Path, log: metrics.Log, console: rich.console.Console) -> None:
    task = trainer.session.task
    files.write(directory / "curve.png", plots.draw(log.lines, task.title, task.metric, task.baseline))
    before, after = log.score(0), log.score(trainer.config.steps)
    found = summary(task.variables, trainer.state.adapters)
    adapter, whole = found.adapter_bytes, found.parameter_bytes
    console.out(
        f"{task.metric.held_out} on {task.held_out}: {before} before, {after} after\n"
        f"adapter: {adapter:,} bytes, base: {whole:,} bytes ({adapter / whole:.2%})\n"
        f"metrics and picture: {directory / 'metrics.jsonl'}, {directory / 'curve.png'}",
        highlight=False,
    )

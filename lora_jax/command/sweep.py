"""Several fine-tuning runs as one program: what `lora-jax sweep` does.

    DIRECTORY/1, 2, ...      a run each, as `lora-jax finetune` makes it
    DIRECTORY/results.json   the options that differ, the last loss and the score of each run, the best first
    DIRECTORY/sweep.png      the losses by step, and the scores

The runs share the base and the data; their ranks, alphas, learning rates and seeds may differ. Each ends as a run of its own
would. A sweep that is stopped leaves its runs as they are, and each can be resumed by itself.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from lora_jax.command import metrics, plots, run
from lora_jax.command.finetune import Interrupted, Signals, optimizer
from lora_jax.command.progress import Progress
from lora_jax.command.tasks.base import Session
from lora_jax.command.tasks.registry import prepare
from lora_jax.core import files
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.training import checkpoint, many, train


def grid(given: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of each option, the last option changing fastest.

    Raises:
      InputError: a value is given twice.

    >>> grid({"rank": [4, 8], "seed": [0, 1]})[:3]
    [{'rank': 4, 'seed': 0}, {'rank': 4, 'seed': 1}, {'rank': 8, 'seed': 0}]
    """
    for name, values in given.items():
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise InputError(f"--{name.replace('_', '-')} has the value {twice[0]} more than once")
    return [dict(zip(given, values)) for values in itertools.product(*given.values())]


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    """The runs that a JSON file lists: `[{"rank": 8, "learning_rate": 1e-3}, ...]`.

    Raises:
      MissingError: there is no such file.
      InputError: it is not a list of objects, or one has an unknown option or a value of another type.
    """
    listed = files.read_json(file)
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise InputError(f"{file} must hold a list of objects, one for each run")
    for number, (name, value) in ((i, item) for i, one in enumerate(listed, 1) for item in one.items()):
        if name not in run.GRID:
            raise InputError(f"{file}, run {number}: {name!r} is none of {', '.join(run.GRID)}, which may differ in a sweep")
        if isinstance(value, bool) or not isinstance(value, (int, run.GRID[name])):
            raise InputError(f"{file}, run {number}: {name} must be a number ({run.GRID[name].__name__}), not {value!r}")
    return [{name: run.GRID[name](value) for name, value in one.items()} for one in listed]


def configurations(task: str, shared: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> list[run.RunConfig]:
    """The options of each run.

    Args:
      task: of all runs.
      shared: the options that all runs have.
      members: those of each.

    Raises:
      InputError: an option is out of range, there are fewer than two runs, or two are the same.
    """
    configs = [run.options(task, {**shared, **member}) for member in members]
    if configs[0].init in run.CHANGE_THE_BASE:
        raise InputError(
            f"the runs of a sweep share one base, which init={configs[0].init!r} would change for each: leave it out"
        )
    if len(configs) < 2:
        raise InputError("a sweep has two runs or more: give --rank, --alpha, --learning-rate or --seed several values")
    for i, config in enumerate(configs):
        if config in configs[:i]:
            raise InputError(f"the runs {configs.index(config) + 1} and {i + 1} of the sweep have the same options")
    return configs


def start(configs: Sequence[run.RunConfig], directory: pathlib.Path, console: rich.console.Console) -> None:
    """Train a run for each configuration, all in one program.

    Raises:
      InputError: bad input, found before any training.
      Interrupted: the sweep was stopped; each of its runs can be resumed.
    """
    files.check_empty(directory)
    session = prepare(configs[0])
    with contextlib.ExitStack() as logs:
        sweep = _Sweep(session, list(_members(session, configs, directory, logs)), directory)
        described = [*session.task.description, f"{len(configs)} runs as one program: {directory}"]
        console.out("\n".join([*described, "below: the mean loss and the best score of all runs"]), highlight=False)
        with Signals() as signals:
            try:
                sweep.train(console, signals)
            except Interrupted:
                sweep.save()
                raise
    _finish(sweep, console)


@dataclasses.dataclass
class _Member:
    """One run of a sweep."""

    config: run.RunConfig
    adapters: dict[str, Adapter]
    directory: pathlib.Path
    log: metrics.Log
    loss: float | None = None

    def first_state(self) -> train.TrainState:
        """The state of the run before the first step."""
        tx = optimizer(self.config)
        return train.init_state(self.adapters, tx, key=jax.random.key(self.config.seed))


def _members(
    session: Session, configs: Sequence[run.RunConfig], directory: pathlib.Path, logs: contextlib.ExitStack
) -> Iterator[_Member]:
    """The runs and their directories, which are made once all adapters are."""
    own = [dataclasses.replace(session.config, **{name: getattr(one, name) for name in run.GRID}) for one in configs]
    sets = [session.init(config) for config in own]
    for number, (config, adapters) in enumerate(zip(own, sets), 1):
        place = directory / str(number)
        run.create(place, config)
        yield _Member(config, adapters, place, logs.enter_context(metrics.Log(place, 0, session.task.metric)))


class _Sweep:
    """The state of a sweep in training."""

    def __init__(self, session: Session, members: Sequence[_Member], directory: pathlib.Path):
        self.task, self.config, self.members, self.directory = session.task, session.config, members, directory
        self.step, seeds = 0, [member.config.seed for member in members]
        self.batches = {seed: self.task.train_batches(seed) for seed in seeds}
        tx = functools.partial(optimizer, self.config)
        rates = {"learning_rate": np.array([member.config.learning_rate for member in members], np.float32)}
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self.states = many.init_states([member.adapters for member in members], tx, rates, keys=keys)
        axis = None if len(self.batches) == 1 else 0
        self._train_step = many.make_train_step(self.task.loss, tx, rates, batch_axis=axis, max_grad_norm=1.0)
        self._measure = many.make_eval_step(self.task.measure)

    def train(self, console: rich.console.Console, signals: Signals) -> None:
        """All steps, with tests and checkpoints in between."""
        task, steps, per_step = self.task, self.config.steps, self.task.per_step * len(self.members)
        with Progress(console, steps, 0, per_step, task.unit, task.metric) as progress:
            self._record(self._test(progress, signals))
            while self.step < steps:
                signals.check()
                self._advance()
                progress.step(self.step, _mean([member.loss for member in self.members]))
                if self.step % self.config.test_every == 0 or self.step == steps:
                    self.save()
                    self._record(self._test(progress, signals))
                else:
                    self._record([None] * len(self.members))

    def save(self) -> None:
        """Write a checkpoint of each run, as a run of its own would."""
        states = many.unstack(self.states, like=[jax.eval_shape(member.first_state) for member in self.members])
        for member, state in zip(self.members, states):
            data = {"position": self.batches[member.config.seed].get_state(), "loss": member.loss}
            with checkpoint.Manager(member.directory / "adapters", keep=2) as manager:
                if manager.latest_step() != self.step:
                    manager.save(state.adapters, config=member.config.lora, step=self.step, state=state, data=data)

    def _advance(self) -> None:
        """One step of all runs."""
        by_seed = {seed: next(stream) for seed, stream in self.batches.items()}
        batches = [by_seed[member.config.seed] for member in self.members]
        batch = batches[0] if len(by_seed) == 1 else {name: _together([one[name] for one in batches]) for name in batches[0]}
        self.states, found = self._train_step(self.states, self.task.variables, batch)
        self.step += 1
        for member, loss in zip(self.members, np.asarray(found["loss"], np.float64)):
            member.loss = _finite(loss)

    def _test(self, progress: Progress, signals: Signals) -> list[float | None]:
        """The scores of all runs on the held-out texts."""
        task, sums = self.task, np.zeros(())
        for i, batch in enumerate(task.test_batches()):
            signals.check()
            progress.testing(i, task.test_count)
            sums = sums + np.asarray(self._measure(self.states.adapters, task.variables, batch), np.float64)
        progress.testing(task.test_count, task.test_count)
        scores = [_finite(task.score(own)) for own in sums]
        progress.tested(self.step, task.metric.best([score for score in scores if score is not None], default=None))
        return scores

    def _record(self, scores: Sequence[float | None]) -> None:
        for member, score in zip(self.members, scores):
            member.log.append(self.step, member.loss, score)


def _together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array under a leading axis; the smaller are filled up with zeros, as a task pads its rows."""
    shape = np.max([array.shape for array in arrays], axis=0)
    return np.stack([np.pad(array, [(0, size - own) for own, size in zip(array.shape, shape)]) for array in arrays])


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- results ----------------------------------------------------------------------------------------------------------


def _results(sweep: _Sweep) -> list[dict[str, Any]]:
    """The options, the last loss and the score of each run, the best first and those that are not finite last."""
    metric, recent = sweep.task.metric, max(1, sweep.config.steps // 10)
    results = []
    for member in sweep.members:
        options = {name: getattr(member.config, name) for name in run.GRID}
        loss = _mean([line["loss"] for line in member.log.lines[-recent:]])
        results.append(
            {"run": member.directory.name, **options, "loss": loss, metric.field: member.log.lines[-1][metric.field]}
        )
    known = [result for result in results if result[metric.field] is not None]
    known.sort(key=lambda result: result[metric.field], reverse=metric.best is max)
    return known + [result for result in results if result[metric.field] is None]


def _finish(sweep: _Sweep, console: rich.console.Console) -> None:
    """The results as a table, a file and pictures."""
    task, directory, results = sweep.task, sweep.directory, _results(sweep)
    members = {member.directory.name: member for member in sweep.members}
    content = {"metric": task.metric.field, "held_out": task.held_out, "runs": results}
    files.write(directory / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    for member in sweep.members:
        picture = plots.draw(member.log.lines, task.title, task.metric, task.baseline)
        files.write(member.directory / "curve.png", picture)
    differing = [name for name in run.GRID if len({result[name] for result in results}) > 1]
    label = lambda one: f"{one['run']}: " + ", ".join(f"{name.replace('_', ' ')} {one[name]:g}" for name in differing)
    shown = {label(one): (members[one["run"]].log.lines, one[task.metric.field]) for one in results}
    files.write(directory / "sweep.png", plots.compare(shown, task.title, task.metric))
    console.out("\n".join(_table(results, differing, task.metric)), highlight=False)
    console.out(f"best run: {directory / results[0]['run']}", highlight=False)
    console.out(f"table and picture: {directory / 'results.json'}, {directory / 'sweep.png'}", highlight=False)


def _table(results: Sequence[Mapping[str, Any]], differing: Sequence[str], metric: metrics.Metric) -> Iterator[str]:
    show = lambda value, form: "not finite" if value is None else format(value, form)
    forms = {"run": "", **dict.fromkeys(differing, "g"), "loss": ".4f", metric.field: metric.form}
    cells = [[name.replace("_", " ") for name in forms]]
    cells += [[show(result[name], form) for name, form in forms.items()] for result in results]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths))

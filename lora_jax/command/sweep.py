"""Several fine-tuning runs as one program: what `lora-jax sweep` does.

    DIRECTORY/1, 2, ...      a run each, as `lora-jax finetune` makes it
    DIRECTORY/results.json   the options that differ, the last loss and the score of each run, the best first
    DIRECTORY/sweep.png      the losses by step, and the scores

The runs share the base and the data; their ranks, alphas, learning rates and seeds may differ. Each ends as a run of its own
would. A sweep that is stopped leaves its runs as they are, and each can be resumed by itself.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from lora_jax.adapters import merging
from lora_jax.command import config_files, device_options, metrics, options, plots
from lora_jax.command import trackers as tracking
from lora_jax.command.meter import StepFlops
from lora_jax.command.options import GRID, RunConfig
from lora_jax.command.report import page
from lora_jax.command.run import create, free_directory
from lora_jax.command.signals import Interrupted, Signals
from lora_jax.command.tasks.base import Task
from lora_jax.command.tasks.registry import prepare
from lora_jax.command.trainer import Diverged, Run, Trainer, mean, optimizer, reported
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, Full
from lora_jax.core.errors import InputError
from lora_jax.core.text_table import text_table
from lora_jax.training import checkpoint, many, train


def sweep_command(line: argparse.Namespace) -> int:
    """`lora-jax sweep`; returns the exit code."""
    given = config_files.given_run(line)
    found = {name: given.pop(name) for name in GRID if name in given}
    values = {name: value if isinstance(value, list) else [value] for name, value in found.items()}
    if line.configs is not None and values:
        raise InputError("give the runs either as a grid or by --configs: leave one of the two out")
    members = grid(values) if line.configs is None else read(line.configs)
    configs = configurations(given.pop("task", "classify"), given, members)
    console = rich.console.Console()
    one = device_options.here(configs[0], given, {}, console, members=len(configs))
    decided = {name: getattr(one, name) for name in options.DECIDED}
    configs = [dataclasses.replace(config, **decided) for config in configs]
    directory = line.out or free_directory(pathlib.Path("sweeps"))
    try:
        start(configs, directory, console)
    except Interrupted as error:
        each = f"lora-jax finetune --resume {directory}/N"
        return error.report(f"go on with each of the {len(configs)} runs N by: {each}")
    except Diverged as error:
        return error.report()
    return 0


def grid(given: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of each option, the last option changing fastest.

    Raises:
      InputError: a value is given twice.

    >>> grid({"rank": [4, 8], "seed": [0, 1]})[:3]
    [{'rank': 4, 'seed': 0}, {'rank': 4, 'seed': 1}, {'rank': 8, 'seed': 0}]
    """
    for name, values in given.items():
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise InputError(f"{options.flag(name)} has the value {twice[0]} more than once")
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
        if name not in GRID:
            raise InputError(f"{file}, run {number}: {name!r} is none of {', '.join(GRID)}, which may differ in a sweep")
        if isinstance(value, bool) or not isinstance(value, (int, GRID[name].kind)):
            raise InputError(f"{file}, run {number}: {name} must be a number ({GRID[name].kind.__name__}), not {value!r}")
    return [{name: GRID[name].kind(value) for name, value in one.items()} for one in listed]


def configurations(task: str, shared: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> list[RunConfig]:
    """The options of each run.

    Args:
      task: of all runs.
      shared: the options that all runs have.
      members: those of each.

    Raises:
      InputError: an option is out of range or not for a sweep, there are fewer than two runs, or two are the same.
    """
    configs = [options.new_run(task, {**shared, **member}) for member in members]
    if configs[0].init in options.CHANGE_THE_BASE:
        raise InputError(
            f"the runs of a sweep share one base, which init={configs[0].init!r} would change for each: leave it out"
        )
    if configs[0].adapter is not None:
        raise InputError("the runs of a sweep begin anew: leave --adapter out")
    if configs[0].optimizer == "adafactor" and len({config.rank for config in configs}) > 1:
        raise InputError(
            "--optimizer adafactor takes means over whole arrays, which a sweep pads to its highest rank: give one --rank, or "
            "another optimiser"
        )
    if configs[0].patience is not None:
        raise InputError("the runs of a sweep end together: leave --patience out; --keep best keeps the best of each")
    if len(configs) < 2:
        raise InputError("a sweep has two runs or more: give --rank, --alpha, --learning-rate or --seed several values")
    for i, config in enumerate(configs):
        if config in configs[:i]:
            raise InputError(f"the runs {configs.index(config) + 1} and {i + 1} of the sweep have the same options")
    return configs


def start(configs: Sequence[RunConfig], directory: pathlib.Path, console: rich.console.Console) -> None:
    """Train a run for each configuration, all in one program.

    Raises:
      InputError: bad input, found before any training.
      Interrupted: the sweep was stopped; each of its runs can be resumed.
      Diverged: none of the runs has a finite result.
    """
    files.check_empty(directory)
    tracking.check_installed(configs[0])
    session = prepare(configs[0])
    task = session.task
    configs = [dataclasses.replace(session.config, **{name: getattr(one, name) for name in GRID}) for one in configs]
    sets = [session.init(config) for config in configs]
    with contextlib.ExitStack() as logs:
        runs = [_make(config, directory / str(number), task, logs) for number, config in enumerate(configs, 1)]
        trainer = Trainer(
            task, runs, _Program(task, runs, sets), save_every=session.config.save_every or session.config.test_steps
        )
        described = [*task.description, f"{len(runs)} runs as one program: {directory}"]
        console.out("\n".join([*described, "below: the mean loss and the best score of all runs"]), highlight=False)
        with Signals() as signals:
            trainer.train(console, signals)
            signals.check()  # one that came after the last step
        for run in runs:
            run.trackers.end(trainer.summary(run) if run.fault is None else None)
    trainer.draw()
    _report(trainer, directory, console)
    _write_pages(task, runs, sets, console)
    faults = {run.directory.name: run.fault for run in runs if run.fault is not None}
    if len(faults) == len(runs):
        raise Diverged(f"all runs of {directory} diverged: start again with a lower --learning-rate, or look at base and data")
    for number, fault in faults.items():
        console.out(f"run {number} diverged: {fault}", highlight=False)


def _write_pages(task: Task, runs: Sequence[Run], sets: Sequence[dict[str, Adapter]], console: rich.console.Console) -> None:
    """The report of each run, by programs that they share."""
    steps: dict[Any, Any] = {}
    for run, before in zip(runs, sets):
        # A new head is of the run's own seed.
        heads = {path: adapter for path, adapter in before.items() if isinstance(adapter, Full)}
        own = dataclasses.replace(task, variables=merging.merge(task.variables, heads))
        if page.attempt(run, own, before, steps):
            console.out(f"report: {run.directory / page.FILE}", highlight=False)


def _make(config: RunConfig, directory: pathlib.Path, task: Task, logs: contextlib.ExitStack) -> Run:
    """A new run, whose log and trackers are open until `logs` ends."""
    create(directory, config)
    log = logs.enter_context(metrics.Log(directory, 0, task.metric))
    trackers = tracking.begin(config, directory, log, f"start again, once {directory.parent} is removed")
    return Run(config, directory, log, logs.enter_context(trackers))


class _Program:
    """All runs of a sweep, their states stacked."""

    def __init__(self, task: Task, runs: Sequence[Run], sets: Sequence[dict[str, Adapter]]):
        self._task, self._runs, seeds = task, runs, [run.config.seed for run in runs]
        self._first_states = [
            jax.eval_shape(functools.partial(_first_state, run.config, adapters)) for run, adapters in zip(runs, sets)
        ]
        self._batches = {seed: task.train_batches(seed) for seed in seeds}
        tx = functools.partial(optimizer, runs[0].config)
        rates = {"learning_rate": np.array([run.config.learning_rate for run in runs], np.float32)}
        keys = jnp.stack([jax.random.key(seed) for seed in seeds])
        self._states = many.init_states(sets, tx, rates, keys=keys)
        axis = None if len(self._batches) == 1 else 0
        how: Any = {"accumulate": runs[0].config.accumulate, "max_grad_norm": runs[0].config.max_grad_norm or None}
        self._train_step = many.make_train_step(task.loss, tx, rates, batch_axis=axis, **how)
        self._measure = many.make_eval_step(task.measure)
        self._flops = StepFlops(self._train_step)
        self.devices = jax.tree.leaves(self._states.adapters)[0].sharding.device_set

    def advance(self) -> Mapping[str, np.ndarray]:
        """One step of all runs; the loss of each and more, and how many steps it has skipped so far."""
        by_seed = {seed: next(stream) for seed, stream in self._batches.items()}
        batches = [by_seed[run.config.seed] for run in self._runs]
        together = lambda: {name: _together([one[name] for one in batches]) for name in batches[0]}
        batch = batches[0] if len(by_seed) == 1 else together()
        self._flops.taken(batch)
        self._states, found = self._train_step(self._states, self._task.variables, batch)
        return {name: np.asarray(value) for name, value in reported(found).items()}

    def measure(self, batch: Any) -> np.ndarray:
        """What the task measures on a held-out batch, for each run."""
        return np.asarray(self._measure(self._states.adapters, self._task.variables, batch))

    def flops(self) -> int | None:
        """Of the products of the last step of all runs."""
        return self._flops.last(self._states, self._task.variables)

    def snapshot(self, step: int, last: Sequence[Mapping[str, float | None]]) -> Sequence[Callable[[], None]]:
        """A copy of the state of each run; called, it is written as that of a run of its own would be."""
        states = jax.block_until_ready(many.unstack(self._states, like=self._first_states))
        positions = [self._batches[run.config.seed].get_state() for run in self._runs]
        datas = [{"position": position, "loss": None, **one} for position, one in zip(positions, last)]
        return [functools.partial(_save, run, step, state, data) for run, state, data in zip(self._runs, states, datas)]

    def keep(self, step: int, better: Sequence[bool]) -> None:
        """Keep the adapters of these runs as their best; their checkpoints are written by now."""
        states = many.unstack(self._states, like=self._first_states)
        for run, state in (pair for pair, is_better in zip(zip(self._runs, states), better) if is_better):
            with checkpoint.Manager(run.directory / "best", keep=1) as manager:
                manager.save(state.adapters, config=run.config.lora, step=step)


def _save(run: Run, step: int, state: train.TrainState, data: Any) -> None:
    """Write a checkpoint of a run."""
    with checkpoint.Manager(run.directory / "adapters", keep=2) as manager:
        manager.save(state.adapters, config=run.config.lora, step=step, state=state, data=data)


def _first_state(config: RunConfig, adapters: dict[str, Adapter]) -> train.TrainState:
    """The state of a run before its first step."""
    return train.init_state(adapters, optimizer(config), key=jax.random.key(config.seed))


def _together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array under a leading axis; the smaller are filled up with zeros, as a task pads its rows."""
    shape = np.max([array.shape for array in arrays], axis=0)
    return np.stack([np.pad(array, [(0, size - own) for own, size in zip(array.shape, shape)]) for array in arrays])


# --- results ----------------------------------------------------------------------------------------------------------


def _results(trainer: Trainer) -> list[dict[str, Any]]:
    """The options, the last loss and the score of each run, the best first and those that are not finite last."""
    metric, recent = trainer.task.metric, max(1, trainer.steps // 10)
    results = []
    for run in trainer.runs:
        grid = {name: getattr(run.config, name) for name in GRID}
        loss = mean([line["loss"] for line in run.log.lines[-recent:]])
        results.append({"run": run.directory.name, **grid, "loss": loss, metric.field: run.result})
    known = [result for result in results if result[metric.field] is not None]
    known.sort(key=lambda result: result[metric.field], reverse=metric.best is max)
    return known + [result for result in results if result[metric.field] is None]


def _report(trainer: Trainer, directory: pathlib.Path, console: rich.console.Console) -> None:
    """The results as a table, a file and a picture."""
    task, results = trainer.task, _results(trainer)
    content = {"metric": task.metric.field, "held_out": task.held_out, "runs": results}
    files.write(directory / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    differing = [name for name in GRID if len({result[name] for result in results}) > 1]
    lines = {run.directory.name: run.log.lines for run in trainer.runs}
    shown = {_label(result, differing): (lines[result["run"]], result[task.metric.field]) for result in results}
    files.write(directory / "sweep.png", plots.compare(shown, task.title, task.metric))
    console.out(_table(results, differing, task.metric), highlight=False)
    console.out(f"best run: {directory / results[0]['run']}", highlight=False)
    console.out(f"table and picture: {directory / 'results.json'}, {directory / 'sweep.png'}", highlight=False)


def _label(result: Mapping[str, Any], differing: Sequence[str]) -> str:
    return f"{result['run']}: " + ", ".join(f"{name.replace('_', ' ')} {result[name]:g}" for name in differing)


def _table(results: Sequence[Mapping[str, Any]], differing: Sequence[str], metric: metrics.Metric) -> str:
    forms = {"run": "", **dict.fromkeys(differing, "g"), "loss": ".4f", metric.field: metric.form}
    titles = [name.replace("_", " ") for name in forms]
    cells = [[_cell(result[name], form) for name, form in forms.items()] for result in results]
    return text_table([titles, *cells], "r" * len(forms))


def _cell(value: Any, form: str) -> str:
    return "not finite" if value is None else format(value, form)

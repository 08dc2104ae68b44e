"""The `lora-jax` command."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lora_jax.run import RunConfig

_EXTRA = ("grain", "matplotlib", "rich", "tokenizers")
_OPTIONS: dict[str, tuple[type, str]] = {
    "model": (str, "a Hugging Face directory of a BERT (default: MiniLM, fetched once)"),
    "data": (str, "a .csv or .jsonl file of labelled texts (default: short movie reviews, fetched once)"),
    "text_field": (str, "the column of the texts"),
    "label_field": (str, "the column of the labels"),
    "rank": (int, "rank of every low-rank pair"),
    "alpha": (float, "the scale of every pair is alpha / rank"),
    "learning_rate": (float, "peak learning rate"),
    "batch_size": (int, "examples per step"),
    "steps": (int, "training steps"),
    "max_length": (int, "texts are cut to this many tokens"),
    "seed": (int, "seed of the adapters, a new head and the order of the batches"),
}


class _Refused(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="lora-jax", description="Fine-tune BERT classifiers with low-rank adapters.")
    commands = top.add_subparsers(required=True, metavar="command")
    tune = commands.add_parser("finetune", help="train adapters and a head on labelled texts")
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for name, (kind, text) in _OPTIONS.items():
        default = "" if defaults[name] is None else f" (default: {defaults[name]})"
        tune.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text + default)
    targets = "kernels to adapt: patterns, or one of the words all-linear (the default) and attention"
    tune.add_argument("--targets", nargs="+", metavar="PATTERN", help=targets)
    tune.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")
    tune.add_argument("--resume", type=pathlib.Path, metavar="RUN", help="go on with a run that was stopped")
    tune.set_defaults(command=_finetune)
    predict = commands.add_parser("predict", help="classify texts with a run")
    predict.add_argument("run", type=pathlib.Path)
    predict.add_argument("--text", action="append", required=True, help="a text; may be given more than once")
    predict.set_defaults(command=_predict)
    inspect = commands.add_parser("inspect", help="show what a run changed, per adapted parameter")
    inspect.add_argument("run", type=pathlib.Path)
    inspect.set_defaults(command=_inspect)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for bad input, 128 + n after signal n."""
    try:
        options = parser().parse_args(arguments)
        return options.command(options)
    except _Refused as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("lora-jax: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        return _refuse(f"the package {error.name} is missing: pip install 'lora-jax[finetune]'")


def _refuse(reason: Any) -> int:
    print(f"lora-jax: {reason}", file=sys.stderr)
    return 2


def _finetune(options: argparse.Namespace) -> int:
    import rich.console

    from lora_jax import finetune, run
    from lora_jax.session import UserError, user_errors

    given = {name: getattr(options, name) for name in (*_OPTIONS, "targets") if getattr(options, name) is not None}
    console = rich.console.Console()
    directory = options.resume
    try:
        if options.resume is not None:
            if given or options.out is not None:
                raise UserError("--resume goes on with the run's own options: leave all others out")
            finetune.resume(directory, console)
        else:
            for name in ("model", "data"):
                if name in given:
                    given[name] = str(pathlib.Path(given[name]).absolute())
            with user_errors():
                config = RunConfig(**given)
            directory = options.out or run.free_directory(pathlib.Path("runs"))
            finetune.start(config, directory, console)
    except UserError as error:
        return _refuse(error)
    except finetune.Interrupted as error:
        print(f"lora-jax: stopped by {error}; go on with: lora-jax finetune --resume {directory}", file=sys.stderr)
        return 128 + error.signum
    return 0


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _predict(options: argparse.Namespace) -> int:
    from lora_jax import inspection
    from lora_jax.session import UserError

    try:
        results = inspection.predict(options.run, options.text)
    except UserError as error:
        return _refuse(error)
    for text, result in zip(options.text, results):
        best = max(result, key=lambda label: result[label])
        print(f"{best}\t{result[best]:.3f}\t{text}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from lora_jax import inspection
    from lora_jax.session import UserError

    try:
        rows = inspection.inspect(options.run)
    except UserError as error:
        return _refuse(error)
    width = max(len(row.path) for row in rows)
    print(f"{'parameter':{width}}  {'shape':>14} {'rank':>6} {'scale':>7} {'|dW|/|W|':>9} {'effective rank':>15}")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        rank = "whole" if row.rank is None else row.rank
        print(
            f"{row.path:{width}}  {shape:>14} {rank:>6} {_show(row.scale, '.4g'):>7} {_show(row.change, '.4f'):>9} "
            f"{_show(row.effective_rank, '.2f'):>15}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

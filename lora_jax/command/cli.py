"""The `lora-jax` command line; what its commands do is in the modules that their names name."""

import argparse
import contextlib
import functools
import importlib
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from lora_jax import __version__
from lora_jax.command.option_names import meant_option
from lora_jax.core.errors import InputError

_EXTRAS = {"qwix": "quant", "huggingface_hub": "hub"}
_EXTRAS |= dict.fromkeys(("gguf", "grain", "jinja2", "matplotlib", "msgspec", "rich", "tokenizers", "yaml"), "finetune")
_EXTRAS |= {"PIL": "images", "pyarrow": "parquet", "tensorboardX": "tensorboard", "wandb": "wandb"}


_RESUME = (
    "go on with a run that was stopped; with --steps, train a finished one for so many steps more, in which the learning rate "
    "follows its schedule once more"
)


class _Refused(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; see `{self.prog} --help`")


class _Command(_Parser):
    """A command, whose options are added when it is called, since some of them are read off what JAX comes with."""

    def __init__(self, *, add: Callable[[argparse.ArgumentParser], None], **more: Any) -> None:
        super().__init__(allow_abbrev=False, **more)
        self._add = functools.cache(lambda: add(self))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._add()
        line, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = meant_option(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return line, unknown


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="lora-jax", description="Fine-tune classifiers and language models with low-rank adapters.")
    top.add_argument("--version", action="version", version=f"lora_jax {__version__}")
    commands = top.add_subparsers(required=True, metavar="command", parser_class=_Command)
    for name, (module, help, add) in _COMMANDS.items():
        made = commands.add_parser(name, help=help, add=add)
        made.set_defaults(module=module, function=f"{name}_command")
    return top


def _run_options(made: argparse.ArgumentParser, several: Sequence[str] = ()) -> None:
    from lora_jax.command import arguments, options

    arguments.add_options(made, options.RunConfig, several)
    listed = "options from a .toml, .yaml or .json file, such as the config.json of a run; those of the command line go first"
    made.add_argument("--config", type=pathlib.Path, metavar="FILE", help=listed)


def _finetune(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, hosts

    _run_options(made)
    made.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")
    made.add_argument("--resume", type=pathlib.Path, metavar="RUN", help=_RESUME)
    made.add_argument("--print-config", action="store_true", help="print all options as YAML, for --config, and end")
    made.add_argument("--plan", action="store_true", help="say what the run needs, by the compiler, and end")
    chips = "with --plan: the chips, as for `lora-jax plan` (default: the devices that the run would be on)"
    made.add_argument("--topology", metavar="NAME", help=chips)
    arguments.add_options(made, hosts.Hosts)


def _data(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, options

    made.add_argument("data", nargs="+", metavar="FILE", help="a file, or a folder of files, as for `lora-jax finetune --data`")
    arguments.add_options(made, options.RunConfig, only=("task", "model", "columns", *options.FIELDS, "max_length"))


def _sweep(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import options

    _run_options(made, several=tuple(options.GRID))
    listed = f"instead of a grid: a JSON list of objects with some of {', '.join(options.GRID)}, one for each run"
    made.add_argument("--configs", type=pathlib.Path, metavar="FILE", help=listed)
    made.add_argument("--out", type=pathlib.Path, help="the directory (default: the first free of sweeps/1, sweeps/2)")


def _predict(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, options

    made.add_argument("run", type=pathlib.Path)
    given = made.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", help="a text; may be given more than once")
    given.add_argument("--data", type=pathlib.Path, metavar="FILE", help="a file or folder of texts, as for `finetune`")
    image = "an image file, for a run of --task images; may be given more than once"
    given.add_argument("--image", action="append", type=pathlib.Path, metavar="FILE", help=image)
    arguments.add_options(made, options.RunConfig, only=("text_field",), of_run=True)


def _generate(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, options

    made.add_argument("runs", type=pathlib.Path, nargs="+", metavar="run", help="several, on one base: in one batch")
    prompt = "the text to go on from; several, for each run: in one batch"
    made.add_argument("--prompt", required=True, action="append", help=prompt)
    arguments.add_options(made, options.GenerateOptions)


def _inspect(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=pathlib.Path)


def _eval(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, options

    made.add_argument("run", type=pathlib.Path)
    data = "a file of a form that `finetune` takes, or for images a folder; all of it is measured on"
    made.add_argument("--data", dest="file", required=True, type=pathlib.Path, metavar="FILE", help=data)
    arguments.add_options(made, options.RunConfig, only=("columns", *options.FIELDS, "max_length"), of_run=True)
    made.add_argument("--base", action="store_true", help="measure the base without the run's adapters, too")
    exact = "write completions, too, the most likely token each time, and say how many are those of the file"
    made.add_argument("--exact-match", action="store_true", help=exact)
    made.add_argument("--json", action="store_true", help="print JSON")


def _merge(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, options

    made.add_argument("runs", type=pathlib.Path, nargs="+", metavar="run")
    arguments.add_options(made, options.MergeOptions)
    made.add_argument("--out", required=True, type=pathlib.Path, help="the directory of the new run")


def _rank(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=pathlib.Path)
    keep = "the share of a change's squared norm that a smaller rank is to keep (default: 0.99)"
    made.add_argument("--keep", type=float, default=0.99, metavar="SHARE", help=keep)
    made.add_argument("--truncate", action="store_true", help="make a run with the smallest ranks that keep so much")
    made.add_argument("--out", type=pathlib.Path, help="the directory of that run")


def _chat(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments, options

    made.add_argument("runs", type=pathlib.Path, nargs="+", metavar="run", help="runs on one base, to switch between")
    arguments.add_options(made, options.DrawOptions)


def _export(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=pathlib.Path)
    formats = (
        "peft: the adapters, for Hugging Face PEFT; gguf: the adapters of a language model, for llama.cpp; merged: the whole "
        "model, for transformers"
    )
    made.add_argument("--format", required=True, choices=("peft", "gguf", "merged"), help=formats)
    made.add_argument("--out", type=pathlib.Path, help="the directory (default: RUN/peft, RUN/gguf or RUN/merged)")
    named = "what the hub calls the base, for files to name it by, where the run has it from a directory or file"
    made.add_argument("--base-model", metavar="OWNER/NAME", help=named)
    push = "upload the directory to this repository of the Hugging Face hub, which is made if it is not there"
    made.add_argument("--push-to-hub", metavar="OWNER/NAME", help=push)
    made.add_argument("--private", action="store_true", help="make a new repository a private one")
    made.add_argument("--commit-message", metavar="TEXT", help="of the upload (default: Upload adapters, or Upload model)")


def _import(made: argparse.ArgumentParser) -> None:
    made.add_argument("directory", type=pathlib.Path, help="the PEFT directory")
    base = "the base: a Hugging Face directory, a model of the hub as owner/name or owner/name@revision, or a .gguf file"
    made.add_argument("--model", required=True, help=base)
    untie = "give a head that is the embedding (tied) a kernel of its own, as an adapter of one of the two needs"
    made.add_argument("--untie", action="store_true", help=untie)
    made.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")


def _plan(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import arguments
    from lora_jax.planning.plan import Request

    arguments.add_options(made, Request)
    searched = (
        "search for the fastest step that fits the topology, or without one for the smallest TPU that a step fits: over "
        "quantize, remat, attention-block, accumulate and mesh where they are not given, for a batch of 8 rows or more"
    )
    made.add_argument("--fit", action="store_true", help=searched)
    made.add_argument("--json", action="store_true", help="print JSON, with peak_bytes_per_chip")
    made.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="also: a picture of the memory")


# The commands: the module with `NAME_command`, which is imported with all that it needs when it is called; help; options.
_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "finetune": ("finetune", "train adapters on texts or images", _finetune),
    "data": ("data", "show what a run would learn from data, before training", _data),
    "sweep": ("sweep", "train adapters with several options at once, in one program", _sweep),
    "predict": ("predict", "classify texts or images with a run", _predict),
    "generate": ("generate", "go on from prompts with runs", _generate),
    "chat": ("chat", "talk with the models of runs", _chat),
    "eval": ("eval", "measure a run on a file", _eval),
    "inspect": ("inspect", "show what a run changed, per adapted parameter", _inspect),
    "rank": ("rank", "show how many ranks a run uses, and truncate it to them", _rank),
    "merge": ("merge", "make one run of several", _merge),
    "export": ("export", "write a run for other tools", _export),
    "import": ("export", "make a run of a PEFT directory", _import),
    "plan": ("plan", "say whether a train step fits on TPUs or GPUs, without any", _plan),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for bad input, 3 for a run that diverged, 128 + n after signal n."""
    try:
        line = parser().parse_args(arguments)
        with _interrupts_end() if arguments is None else contextlib.nullcontext():
            command = _imported(line)
        return command(line)
    except (_Refused, InputError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("lora-jax: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _refuse(f"the package {error.name} is missing: pip install 'lora-jax[{_EXTRAS[error.name]}]'")


def _imported(line: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """What does the command."""
    from lora_jax.planning import libtpu

    libtpu.quieten()
    return getattr(importlib.import_module(f"lora_jax.command.{line.module}"), line.function)


@contextlib.contextmanager
def _interrupts_end() -> Iterator[None]:
    """Ctrl-C ends the process at once: some modules that are imported swallow the exception that it is otherwise."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _refuse(reason: Any) -> int:
    print(f"lora-jax: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

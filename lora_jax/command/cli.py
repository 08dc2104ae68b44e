"""The `lora-jax` command line; what its commands do is in the modules that their names name."""

import argparse
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lora_jax.core.errors import InputError

_EXTRAS = {"qwix": "quant", "huggingface_hub": "hub"}
_EXTRAS |= dict.fromkeys(("gguf", "grain", "jinja2", "matplotlib", "msgspec", "rich", "tokenizers"), "finetune")
_EXTRAS |= {"PIL": "images"}


_RESUME = (
    "go on with a run that was stopped; with --steps, train a finished one for so many steps more, in which the learning rate "
    "rises and falls once more"
)


class _Refused(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; see `{self.prog} --help`")


class _Command(_Parser):
    """A command, whose options are added when it is called, since some of them are read off what JAX comes with."""

    def __init__(self, *, add: Callable[[argparse.ArgumentParser], None], **more: Any) -> None:
        super().__init__(**more)
        self._add = functools.cache(lambda: add(self))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._add()
        return super().parse_known_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="lora-jax", description="Fine-tune classifiers and language models with low-rank adapters.")
    commands = top.add_subparsers(required=True, metavar="command", parser_class=_Command)
    for name, (module, help, add) in _COMMANDS.items():
        made = commands.add_parser(name, help=help, add=add)
        made.set_defaults(module=module, function=f"{name}_command")
    return top


def _finetune(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import hosts, options

    options.add_options(made, options.RunConfig)
    made.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")
    made.add_argument("--resume", type=pathlib.Path, metavar="RUN", help=_RESUME)
    made.add_argument("--plan", action="store_true", help="say what the run needs, by the compiler, and end")
    chips = "with --plan: the chips, as for `lora-jax plan` (default: the devices that the run would be on)"
    made.add_argument("--topology", metavar="NAME", help=chips)
    options.add_options(made, hosts.Hosts)


def _sweep(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import options

    options.add_options(made, options.RunConfig, several=tuple(options.GRID))
    listed = f"instead of a grid: a JSON list of objects with some of {', '.join(options.GRID)}, one for each run"
    made.add_argument("--configs", type=pathlib.Path, metavar="FILE", help=listed)
    made.add_argument("--out", type=pathlib.Path, help="the directory (default: the first free of sweeps/1, sweeps/2)")


def _predict(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=pathlib.Path)
    given = made.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", help="a text; may be given more than once")
    image = "an image file, for a run of --task images; may be given more than once"
    given.add_argument("--image", action="append", type=pathlib.Path, metavar="FILE", help=image)


def _generate(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import options

    made.add_argument("run", type=pathlib.Path)
    made.add_argument("--prompt", required=True, help="the text to go on from")
    options.add_options(made, options.GenerateOptions)


def _inspect(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=pathlib.Path)


def _export(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=pathlib.Path)
    formats = "peft: the adapters, for Hugging Face PEFT; merged: the whole model, for transformers"
    made.add_argument("--format", required=True, choices=("peft", "merged"), help=formats)
    made.add_argument("--out", type=pathlib.Path, help="the directory (default: RUN/peft or RUN/merged)")


def _import(made: argparse.ArgumentParser) -> None:
    made.add_argument("directory", type=pathlib.Path, help="the PEFT directory")
    base = "the base: a Hugging Face directory, a model of the hub as owner/name or owner/name@revision, or a .gguf file"
    made.add_argument("--model", required=True, help=base)
    untie = "give a head that is the embedding (tied) a kernel of its own, as an adapter of one of the two needs"
    made.add_argument("--untie", action="store_true", help=untie)
    made.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")


def _plan(made: argparse.ArgumentParser) -> None:
    from lora_jax.command import options
    from lora_jax.planning.plan import Request

    options.add_options(made, Request)
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
    "sweep": ("sweep", "train adapters with several options at once, in one program", _sweep),
    "predict": ("predict", "classify texts or images with a run", _predict),
    "generate": ("generate", "go on from a prompt with a run", _generate),
    "inspect": ("inspect", "show what a run changed, per adapted parameter", _inspect),
    "export": ("export", "write a run for other tools", _export),
    "import": ("export", "make a run of a PEFT directory", _import),
    "plan": ("plan", "say whether a train step fits on TPUs or GPUs, without any", _plan),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for bad input, 3 for a run that diverged, 128 + n after signal n."""
    try:
        line = parser().parse_args(arguments)
        return _run(line)
    except (_Refused, InputError) as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("lora-jax: stopped", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _refuse(f"the package {error.name} is missing: pip install 'lora-jax[{_EXTRAS[error.name]}]'")


def _run(line: argparse.Namespace) -> int:
    from lora_jax.planning import libtpu

    libtpu.quieten()
    return getattr(importlib.import_module(f"lora_jax.command.{line.module}"), line.function)(line)


def _refuse(reason: Any) -> int:
    print(f"lora-jax: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

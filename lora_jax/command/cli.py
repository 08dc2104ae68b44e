"""The `lora-jax` command."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from lora_jax.adapters.quant import DTYPES
from lora_jax.command import run
from lora_jax.command.run import RunConfig
from lora_jax.core import files
from lora_jax.core.errors import InputError

_EXTRA = {"qwix": "quant", **dict.fromkeys(("gguf", "grain", "jinja2", "matplotlib", "rich", "tokenizers"), "finetune")}
_OPTIONS: dict[str, tuple[type, str]] = {
    "model": (str, "a Hugging Face directory, or for lm a .gguf file (default: MiniLM or SmolLM2, fetched once)"),
    "data": (str, "a .csv or .jsonl file, or for lm a .txt file (default: movie reviews, fetched once)"),
    "text_field": (str, "the column of the texts"),
    "label_field": (str, "the column of the labels"),
    "prompt_field": (str, "the column of the prompts, of which nothing is learnt"),
    "completion_field": (str, "the column of the completions"),
    "messages_field": (str, "the column of chats: lists of objects with a role and a content"),
    "held_out": (int, "tokens to measure the perplexity on, at most a tenth of all"),
    "dtype": (str, f"the base's dtype in memory: {', '.join(run.DTYPES)}"),
    "quantize": (str, f"quantise the kernels of the base's layers in memory: {', '.join(DTYPES)}"),
    "block": (int, "how many quantised values share a scale, 64 if left out"),
    "rank": (int, "rank of every low-rank pair"),
    "alpha": (float, "the scale of every pair is alpha / rank"),
    "method": (str, "lora, lora_fa (A stays as it is) or vera (shared random matrices; wants another rank and rate)"),
    "scaling": (str, "lora (alpha / rank) or rslora (alpha / sqrt rank)"),
    "init": (str, f"how pairs start: kaiming, gaussian, orthogonal, {', '.join(run.CHANGE_THE_BASE)}"),
    "learning_rate": (float, "peak learning rate"),
    "lora_plus": (float, "B's learning rate over A's (LoRA+)"),
    "batch_size": (int, "examples, or for lm packed rows, per step"),
    "steps": (int, "training steps"),
    "max_length": (int, "texts are cut to this many tokens; for lm, the tokens of a packed row"),
    "seed": (int, "seed of the adapters, a new head and the order of the batches"),
}


class _Refused(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Refused(f"{message}; see `{self.prog} --help`")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="lora-jax", description="Fine-tune classifiers and language models with low-rank adapters.")
    commands = top.add_subparsers(required=True, metavar="command")
    _add_finetune(commands.add_parser("finetune", help="train adapters on texts"))
    _add_sweep(commands.add_parser("sweep", help="train adapters with several options at once, in one program"))
    predict = _add_run(commands, "predict", "classify texts with a run", _predict)
    predict.add_argument("--text", action="append", required=True, help="a text; may be given more than once")
    generate = _add_run(commands, "generate", "go on from a prompt with a run", _generate)
    generate.add_argument("--prompt", required=True, help="the text to go on from")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="at most this many tokens (default: 64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (the default): the most likely token each time")
    generate.add_argument("--seed", type=int, default=0, help="seed of the draws at a temperature above 0 (default: 0)")
    generate.add_argument("--chat", action="store_true", help="write the prompt with the model's chat template")
    generate.add_argument("--base", action="store_true", help="leave the run's adapters out")
    _add_run(commands, "inspect", "show what a run changed, per adapted parameter", _inspect)
    export = _add_run(commands, "export", "write a run for other tools", _export)
    formats = "peft: the adapters, for Hugging Face PEFT; merged: the whole model, for transformers"
    export.add_argument("--format", required=True, choices=("peft", "merged"), help=formats)
    export.add_argument("--out", type=pathlib.Path, help="the directory (default: RUN/peft or RUN/merged)")
    import_ = commands.add_parser("import", help="make a run of a PEFT directory")
    import_.add_argument("directory", type=pathlib.Path, help="the PEFT directory")
    import_.add_argument("--model", type=pathlib.Path, required=True, help="the base: a Hugging Face directory or .gguf file")
    import_.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")
    import_.set_defaults(command=_import)
    _add_plan(commands.add_parser("plan", help="say whether a train step fits on TPUs or GPUs, without any"))
    return top


def _add_finetune(tune: argparse.ArgumentParser) -> None:
    _add_options(tune)
    tune.add_argument("--out", type=pathlib.Path, help="the run's directory (default: the first free of runs/1, runs/2)")
    tune.add_argument("--resume", type=pathlib.Path, metavar="RUN", help="go on with a run that was stopped")
    axes = "axes among data, fsdp and model, and their sizes, as data=2,model=4 (default: one device)"
    tune.add_argument("--mesh", metavar="AXES", help=f"train on all devices: {axes}; also with --resume, whatever it was")
    together = "with the next two, to train in several processes, each started by a command of its own"
    tune.add_argument("--coordinator", metavar="HOST:PORT", help=f"a free port of the first process's host; {together}")
    tune.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    tune.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0; the first writes and prints")
    tune.set_defaults(command=_finetune)


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    _add_options(sweep, several=tuple(run.GRID))
    listed = f"instead of a grid: a JSON list of objects with some of {', '.join(run.GRID)}, one for each run"
    sweep.add_argument("--configs", type=pathlib.Path, metavar="FILE", help=listed)
    sweep.add_argument("--out", type=pathlib.Path, help="the directory (default: the first free of sweeps/1, sweeps/2)")
    sweep.set_defaults(command=_sweep)


def _add_plan(plan: argparse.ArgumentParser) -> None:
    """The options of a plan; those that are left out are `plan.Request`'s."""
    plan.add_argument("model", help="llama-3-8b, llama-3-70b, qwen2.5-7b, mistral-7b, smollm2-135m, or a config.json")
    plan.add_argument("--rank", type=int, help="rank of every low-rank pair (default: 16)")
    plan.add_argument("--targets", nargs="+", metavar="PATTERN", help="kernels to adapt (default: the seven projections)")
    plan.add_argument("--batch", type=int, help="rows per step on all chips (default: one for each of data x fsdp)")
    plan.add_argument("--sequence", type=int, help="tokens per row (default: 2048)")
    plan.add_argument("--quantize", help="the layers' kernels: none (the default: bfloat16), nf4, int4, int8 or fp8")
    plan.add_argument("--block", type=int, help="how many quantised values share a scale (default: 64)")
    where = (
        "v4, v5e, v5p or v6e and a shape, such as v6e:4x4, or a GPU or cpu and how many, such as h100:8 (default: v5p:1x1x1)"
    )
    plan.add_argument("--topology", help=where)
    mesh = "how its chips are used: sizes of data, fsdp and model, such as fsdp=4,model=2 (default: all along fsdp)"
    plan.add_argument("--mesh", help=mesh)
    plan.add_argument("--compare", nargs="+", metavar="STEP", help="also: full (fine-tuning), naive (W + AB formed)")
    plan.add_argument("--json", action="store_true", help="print JSON, with peak_bytes_per_chip")
    plan.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="also: a picture of the memory")
    plan.set_defaults(command=_plan)


def _add_options(tune: argparse.ArgumentParser, several: Sequence[str] = ()) -> None:
    """The options of a run; `several`: those that take several values, of which every combination is a run."""
    tasks = "classify (the default): labels of texts, with a BERT; lm: next tokens, with a decoder of the Llama family"
    tune.add_argument("--task", choices=run.TASKS, help=tasks)
    for name, (kind, text) in _OPTIONS.items():
        count: Any = {"nargs": "+"} if name in several else {}
        more = "; several values: a run with each" if name in several else ""
        tune.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text + more + _default(name), **count)
    tune.add_argument("--dora", action="store_true", default=None, help="train a magnitude for each output, too (DoRA)")
    targets = "kernels to adapt: patterns, or one of the words all-linear (the default) and attention"
    tune.add_argument("--targets", nargs="+", metavar="PATTERN", help=targets)


def _default(name: str) -> str:
    """The default of an option, of each task where they differ."""
    usual = {field.name: field.default for field in dataclasses.fields(RunConfig)}[name]
    if usual is None:
        return ""
    own = run.DEFAULTS["lm"].get(name)
    only = next((f"; {task} only" for task in run.TASKS if name in run.OWN[task]), "")
    return f" (default: {usual}{'' if own is None else f', for lm {own}'}{only})"


def _add_run(commands: Any, name: str, text: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """A command whose first argument is a run."""
    made = commands.add_parser(name, help=text)
    made.add_argument("run", type=pathlib.Path)
    made.set_defaults(command=command)
    return made


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
        return _refuse(f"the package {error.name} is missing: pip install 'lora-jax[{_EXTRA[error.name]}]'")
    except InputError as error:
        return _refuse(error)


def _refuse(reason: Any) -> int:
    print(f"lora-jax: {reason}", file=sys.stderr)
    return 2


def _finetune(options: argparse.Namespace) -> int:
    from lora_jax.command import processes

    given = _given(options)
    if options.resume is not None and (given or options.out is not None):
        raise InputError("--resume goes on with the run's own options: leave all others out but those of the mesh")
    config = None if options.resume is not None else run.options(given.pop("task", "classify"), given)
    where = processes.Hosts(**{field.name: getattr(options, field.name) for field in dataclasses.fields(processes.Hosts)})
    with where.connected():
        return _train(config, options.resume or options.out, where)


def _train(config: RunConfig | None, directory: pathlib.Path | None, where: Any) -> int:
    """A new run, or without a configuration the one in the directory."""
    import rich.console

    from lora_jax.command import finetune, processes

    with processes.all_or_none():
        mesh = where.make_mesh()
    console = rich.console.Console(quiet=not processes.is_first())
    free = processes.from_first(str(run.free_directory(pathlib.Path("runs"))))
    directory = directory or pathlib.Path(free)
    try:
        if config is None:
            finetune.resume(directory, console, mesh)
        else:
            finetune.start(config, directory, console, mesh)
    except finetune.Interrupted as error:
        if processes.is_first():
            print(f"lora-jax: stopped by {error}; go on with: lora-jax finetune --resume {directory}", file=sys.stderr)
        return 128 + error.signum
    return 0


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run that are on the command line; files by their absolute paths."""
    names = ("task", *_OPTIONS, "dora", "targets")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    files = {name: str(pathlib.Path(given[name]).absolute()) for name in ("model", "data") if name in given}
    return given | files


def _sweep(options: argparse.Namespace) -> int:
    import rich.console

    from lora_jax.command import finetune, sweep

    given = _given(options)
    values = {name: given.pop(name) for name in run.GRID if name in given}
    if options.configs is not None and values:
        raise InputError("give the runs either as a grid or by --configs: leave one of the two out")
    members = sweep.grid(values) if options.configs is None else sweep.read(options.configs)
    configs = sweep.configurations(given.pop("task", "classify"), given, members)
    directory = options.out or run.free_directory(pathlib.Path("sweeps"))
    try:
        sweep.start(configs, directory, rich.console.Console())
    except finetune.Interrupted as error:
        each = f"lora-jax finetune --resume {directory}/N"
        print(f"lora-jax: stopped by {error}; go on with each of the {len(configs)} runs N by: {each}", file=sys.stderr)
        return 128 + error.signum
    return 0


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _predict(options: argparse.Namespace) -> int:
    from lora_jax.command import inspect

    results = inspect.predict(options.run, options.text)
    for text, result in zip(options.text, results):
        best = max(result, key=lambda label: result[label])
        print(f"{best}\t{result[best]:.3f}\t{text}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    from lora_jax.command import generate

    names = [field.name for field in dataclasses.fields(generate.Options)]
    chosen = generate.Options(**{name: getattr(options, name) for name in names})
    print(generate.generate(options.run, options.prompt, chosen))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from lora_jax.command import inspect

    rows = inspect.inspect(options.run)
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


def _export(options: argparse.Namespace) -> int:
    from lora_jax.command import export as transfer

    out = options.out or options.run / options.format
    notes = transfer.export(options.run, options.format, out)
    return _report(f"written: {out}", notes)


def _import(options: argparse.Namespace) -> int:
    from lora_jax.command import export as transfer

    out = options.out or run.free_directory(pathlib.Path("runs"))
    notes = transfer.import_(options.directory, options.model, out)
    return _report(f"run: {out}", notes)


def _plan(options: argparse.Namespace) -> int:
    import jax

    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")  # to plan takes no chip, not even where there is one
    from lora_jax.planning import plan, table
    from lora_jax.sharding import read_axes

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(plan.Request)}
    if options.mesh is not None:
        given["mesh"] = read_axes(options.mesh)
    request = plan.Request(**{name: value for name, value in given.items() if value is not None})
    if options.plot is not None:
        from lora_jax.planning import plot

        plot.check(options.plot)
    found = plan.make(request, lambda text: print(f"lora-jax: {text}", file=sys.stderr, flush=True))
    print(found.to_json() if options.json else table.table(found))
    if options.plot is not None:
        files.write(options.plot, plot.draw(found))
    return 0


def _report(done: str, notes: Sequence[str]) -> int:
    print(done)
    for note in notes:
        print(f"lora-jax: note: {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

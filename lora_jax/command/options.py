"""The options of a run and of its commands: one table each, from which command lines, checks and `config.json` are made."""

import argparse
import dataclasses
import datetime
import json
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lora_jax.adapters import words
from lora_jax.core import files
from lora_jax.core.errors import InputError
from lora_jax.core.fields import LARGEST, Option, check, option, table

if TYPE_CHECKING:
    from lora_jax.adapters.config import LoraConfig

FORMAT_VERSION = 7
CHANGE_THE_BASE = ("pissa", "olora", "milora")  # starts of `lora_jax.initializers`


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of a run, and what ties it to its data and base model.

    Beside help and bounds, a field says `tasks`: those that have it; `lm`: its default there; `sweep`: it may differ
    between the runs of a sweep; `since`: the first format of `config.json` with it; `before`: what it was until then, where
    that is not the default; `recorded`: it is found, not given.

    Raises:
      InputError: an option is out of range, or some do not go together.

    >>> RunConfig(rank=4, alpha=8).lora.scale(4, 8)
    2.0
    """

    task: Annotated[
        Literal["classify", "lm", "images"],
        option(
            "classify: labels of texts, with a BERT; lm: next tokens, with a decoder of the Llama family; images: labels of "
            "images, with a ViT or DINOv2",
            since=2,
        ),
    ] = "classify"
    model: Annotated[
        str | None,
        option(
            "a Hugging Face directory, a model of the hub (owner/name or owner/name@revision), or for lm a .gguf file "
            "(default: MiniLM or SmolLM2, fetched once; for images none)"
        ),
    ] = None
    data: Annotated[
        str | None,
        option(
            "a .csv or .jsonl file, or for lm a .txt file (default: movie reviews, fetched once); for images a folder with a "
            "folder for each label"
        ),
    ] = None
    text_field: Annotated[str, option("the column of the texts", tasks=("classify", "lm"))] = "text"
    label_field: Annotated[str, option("the column of the labels", tasks=("classify",))] = "label"
    prompt_field: Annotated[str, option("the column of the prompts, of which nothing is learnt", tasks=("lm",), since=2)] = (
        "prompt"
    )
    completion_field: Annotated[str, option("the column of the completions", tasks=("lm",), since=2)] = "completion"
    messages_field: Annotated[
        str, option("the column of chats: lists of objects with a role and a content", tasks=("lm",), since=2)
    ] = "messages"
    held_out: Annotated[
        int, option("tokens to measure the perplexity on, at most a tenth of all", ge=1, tasks=("lm",), since=2)
    ] = 4096
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],  # float16: runs of before, see `check_trainable`
        option("the base's dtype in memory: float32 or bfloat16; adapters are float32",
               must_be="one of float32, bfloat16", tasks=("lm", "images"), since=2),
    ] = "float32"  # fmt: skip
    untie: Annotated[
        bool,
        option(
            "give a head that is the embedding (tied) a kernel of its own, as adapters of one of the two need",
            tasks=("lm",),
            since=5,
        ),
    ] = False
    quantize: Annotated[
        str | None, option(f"quantise the kernels of the base's layers in memory: {', '.join(words.DTYPES)}", since=4)
    ] = None
    block: Annotated[int | None, option("how many quantised values share a scale, 64 if left out", since=4)] = None
    scan_layers: Annotated[
        bool,
        option("stack the layers and scan over them, which compiles once for all", both=True, tasks=("lm",), since=6),
    ] = False
    remat: Annotated[
        Literal["none", "products", "full"],
        option("what the backward pass computes again, to save memory: none, products (all but products with weights) or full",
               tasks=("lm",), since=6),
    ] = "none"  # fmt: skip
    attention_block: Annotated[
        int | None,
        option("compute the attention of at most so many queries at a time, to save memory", ge=1, must_be="at least 1",
               metavar="N", tasks=("lm",), since=6),
    ] = None  # fmt: skip
    accumulate: Annotated[
        int,
        option(
            "cut each batch into so many parts, one after the other, to save memory",
            ge=1,
            metavar="N",
            tasks=("lm", "images"),
            since=6,
        ),
    ] = 1
    rank: Annotated[int, option("rank of every low-rank pair", sweep=True)] = 8
    alpha: Annotated[float, option("the scale of every pair is alpha / rank", sweep=True)] = 16.0
    targets: Annotated[
        str | Sequence[str],
        option("kernels to adapt: patterns, or one of the words all-linear and attention", metavar="PATTERN"),
    ] = "all-linear"
    adapter: Annotated[
        str | None,
        option(
            "begin with the adapters of a PEFT directory or run, and new pairs where --targets has more",
            metavar="DIR",
            since=5,
        ),
    ] = None
    method: Annotated[
        str,
        option("lora, lora_fa (A stays as it is) or vera (shared random matrices; wants another rank and rate)", since=3),
    ] = "lora"
    scaling: Annotated[str, option("lora (alpha / rank) or rslora (alpha / sqrt rank)", since=3)] = "lora"
    dora: Annotated[bool, option("train a magnitude for each output, too (DoRA)", since=3)] = False
    init: Annotated[str, option(f"how pairs start: kaiming, gaussian, orthogonal, {', '.join(CHANGE_THE_BASE)}", since=3)] = (
        "kaiming"
    )
    learning_rate: Annotated[float, option("peak learning rate", gt=0, le=LARGEST, lm=1e-3, sweep=True)] = 2e-3
    lora_plus: Annotated[float | None, option("B's learning rate over A's (LoRA+)", gt=0, le=LARGEST, since=3)] = None
    batch_size: Annotated[int, option("examples, or for lm packed rows, per step", ge=1, lm=2)] = 32
    steps: Annotated[int, option("training steps", ge=1, lm=60)] = 180
    max_length: Annotated[
        int,
        option("texts are cut to this many tokens; for lm, the tokens of a packed row", ge=3, lm=256, tasks=("classify", "lm")),
    ] = 64
    crop: Annotated[
        float,
        option(
            "random crops keep at least this share of an image in training; 1: no crops", gt=0, le=1, tasks=("images",), since=7
        ),
    ] = 0.5
    flip: Annotated[
        bool, option("mirror images half of the time in training (the default)", both=True, tasks=("images",), since=7)
    ] = True
    seed: Annotated[int, option("seed of the adapters, a new head and the order of the batches", ge=0, sweep=True)] = 0
    labels: Annotated[Sequence[str], option("the classes, in the order of the logits", recorded=True)] = ()
    data_sha256: Annotated[str, option("the digest of all texts and labels", recorded=True)] = ""
    model_sha256: Annotated[str, option("the digest of the base's weights", recorded=True)] = ""
    model_commit: Annotated[str, option("the commit of a base from the hub", recorded=True, since=7)] = ""
    tokens_sha256: Annotated[
        str, option("the digest of the tokens of all texts, or of how images become pixels", recorded=True, since=5)
    ] = ""
    date: Annotated[
        str, option("the day that chat templates are told, on which the run began: ISO 8601", recorded=True, since=2)
    ] = ""
    finished: Annotated[
        Sequence[int], option("the steps at which the run was finished before it was trained further", recorded=True, since=5)
    ] = ()
    ends: Annotated[Sequence[int], option("the ids that end what was learnt", recorded=True, since=5)] = ()
    warmup_from: Annotated[
        int, option("of n steps of warm-up, step i has (i + this) / n of the rate", ge=0, recorded=True, since=5, before=0)
    ] = 1
    imported: Annotated[
        str | None,
        option("the PEFT directory of the adapters; no data, and no meaning in options of training", recorded=True, since=2),
    ] = None

    def __post_init__(self):
        check(self)
        if self.batch_size % self.accumulate:
            raise InputError(
                f"accumulate={self.accumulate} does not divide batch_size={self.batch_size} into equal parts: take a divisor"
            )
        if self.lora_plus is not None and self.method != "lora":
            raise InputError(f"lora_plus is for method='lora', which trains A and B, not for {self.method!r}")
        if self.adapter is not None and self.init in CHANGE_THE_BASE:
            raise InputError(f"init={self.init!r} changes the base, to which the pairs of --adapter belong: leave one out")
        words.check_base(self.quantize, self.block)
        if self.quantize is not None and self.init in CHANGE_THE_BASE:
            raise InputError(
                f"init={self.init!r} takes a part off the base's kernels, which quantize={self.quantize!r} has rounded: leave "
                "one of the two out"
            )
        object.__setattr__(self, "targets", words.targets(self.targets))

    @property
    def lora(self) -> "LoraConfig":
        """What is adapted: the targets and, in a classifier, the head, which is trained whole.

        Raises:
          InputError: an option is out of range.
        """
        from lora_jax.adapters.config import LoraConfig  # which needs JAX

        train = [] if self.task == "lm" else ["re:.*/classifier/.*"]
        method: Any = {"method": self.method, "scaling": self.scaling, "dora": self.dora}
        method["init"] = "kaiming" if self.init in CHANGE_THE_BASE else self.init
        if self.init in CHANGE_THE_BASE and (self.dora or self.method != "lora"):
            raise InputError(f"init={self.init!r} is for plain pairs: leave dora and method out")
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets, train=train, **method)

    @property
    def day(self) -> datetime.date:
        """The day that chat templates are told.

        Raises:
          InputError: it is no day.
        """
        try:
            return datetime.date.fromisoformat(self.date)
        except ValueError:
            raise InputError(f"date must be a day, as 2025-01-31, not {self.date!r}") from None

    @property
    def phases(self) -> list[int]:
        """The steps of each time that the run was trained: each has a learning rate that rises and falls.

        >>> RunConfig(steps=100, finished=[60]).phases
        [60, 40]
        """
        ends = (*self.finished, self.steps)
        return [end - begin for begin, end in zip((0, *self.finished), ends)]

    @property
    def test_every(self) -> int:
        """Steps between two tests."""
        return max(1, -(-self.steps // 3))

    @property
    def save_every(self) -> int:
        """Steps between two checkpoints."""
        return max(1, min(20, self.steps // 10))

    def to_json(self) -> str:
        """The configuration as JSON text with a format version."""
        return json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: object) -> "RunConfig":
        """Read what `to_json` wrote; `source` is named in the errors.

        Raises:
          InputError: the text is not JSON, of another format version, or has unknown, missing or invalid fields.
        """
        fields = files.parse_json(text, source)
        version = fields.pop("format_version", None) if isinstance(fields, dict) else None
        if version not in range(1, FORMAT_VERSION + 1):
            raise InputError(
                f"{source} has the format version {version!r}, but this lora_jax reads 1 to {FORMAT_VERSION}: "
                "use the lora_jax that wrote the run, or train again"
            )
        rows = table(cls)
        new = {name: row for name, row in rows.items() if row.more.get("since", 1) > version}
        fields = {name: row.more.get("before", row.default) for name, row in new.items()} | fields
        if odd := set(rows) ^ set(fields):
            raise InputError(f"{source} has missing or unknown fields: {', '.join(sorted(odd))}")
        try:
            return cls(**fields)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


GRID = {name: row for name, row in table(RunConfig).items() if row.more.get("sweep")}


def new_run(task: str, given: Mapping[str, Any]) -> RunConfig:
    """The configuration of a new run: the options given, and the task's defaults.

    Raises:
      InputError: an option is out of range, or belongs to another task.

    >>> new_run("lm", {"rank": 4}).steps, new_run("classify", {}).steps
    (60, 180)
    """
    rows = table(RunConfig)
    defaults = {name: row.more[task] for name, row in rows.items() if task in row.more}
    if "adapter" in given:
        defaults["targets"] = ()  # those of the adapters
    config = RunConfig(**{"task": task, **defaults, **given})
    for name in given:
        tasks = rows[name].more.get("tasks", (task,))
        if task not in tasks:
            raise InputError(f"{flag(name)} is an option of --task {' and '.join(tasks)}; leave it out of --task {task}")
    if config.targets:
        _ = config.lora  # which checks what it is made of
    check_trainable(config)
    return config


def more_steps(value: Any) -> int:
    """How many steps a finished run is trained further.

    Raises:
      InputError: it is no number of steps.
    """
    return table(RunConfig)["steps"].convert(value, flag("steps"))


def check_trainable(config: RunConfig) -> None:
    """Raise an InputError for a dtype that is not trained in; runs of before have it, and can still be used."""
    if config.dtype == "float16":
        raise InputError(
            "dtype float16 is not for training: without a loss scale, gradients below 6e-8 become 0 and sums above 65,504 "
            "infinite, and JAX has not all of its products on CPUs. Take bfloat16, of the same size and float32's range"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to go on from a prompt.

    Raises:
      InputError: an option is out of range.
    """

    max_new_tokens: Annotated[int, option("at most this many tokens", ge=1, must_be="at least 1")] = 64
    temperature: Annotated[
        float,
        option("0: the most likely token each time; above, tokens are drawn from softmax(logits / temperature)",
               ge=0, le=LARGEST, must_be="at least 0 and finite"),
    ] = 0.0  # fmt: skip
    seed: Annotated[int, option("seed of the draws at a temperature above 0", ge=0, must_be="at least 0")] = 0
    chat: Annotated[bool, option("write the prompt, which is what a user says, with the model's chat template")] = False
    base: Annotated[bool, option("leave the run's adapters out")] = False

    def __post_init__(self):
        check(self, flag)


# --- command lines ----------------------------------------------------------------------------------------------------


def flag(name: str) -> str:
    """What a command line calls a field.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def add_options(parser: argparse.ArgumentParser, cls: type, several: Sequence[str] = ()) -> None:
    """The fields of a table as options of a command; those without a default are its arguments.

    Args:
      parser: of the command.
      cls: the table.
      several: fields that take several values, of which every combination is a run.
    """
    for name, row in table(cls).items():
        if row.more.get("recorded"):
            continue
        more = "; several values: a run with each" if name in several else ""
        called = name if row.default is dataclasses.MISSING else flag(name)
        text = row.help + more + _default(row)
        parser.add_argument(called, help=text, default=argparse.SUPPRESS, **_form(row, name in several))


def _form(row: Option, several: bool) -> dict[str, Any]:
    """How a command line reads an option."""
    if row.kind is bool:
        return {"action": argparse.BooleanOptionalAction if row.more.get("both") else "store_true"}
    form: dict[str, Any] = {"type": row.kind if row.kind in (int, float) else str, "metavar": row.more.get("metavar")}
    if several or Sequence in map(typing.get_origin, (row.kind, *typing.get_args(row.kind))):
        form["nargs"] = "+"
    if row.name == "task":  # on which it depends what else there is
        form["choices"] = typing.get_args(row.kind)
    return form


def _default(row: Option) -> str:
    """The default of an option, of each task where they differ."""
    if row.default in (None, (), dataclasses.MISSING) or isinstance(row.default, bool):
        return ""
    usual = row.default if not isinstance(row.default, tuple) else " ".join(row.default)
    of_lm = f", for lm {row.more['lm']}" if "lm" in row.more else ""
    only = f"; {' and '.join(row.more['tasks'])} only" if "tasks" in row.more else ""
    return f" (default: {usual}{of_lm}{only})"


def given(line: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a table that are on the command line."""
    return {name: getattr(line, name) for name in table(cls) if hasattr(line, name)}


def given_run(line: argparse.Namespace) -> dict[str, Any]:
    """The options of a run that are on the command line; files by their absolute paths."""
    found = given(line, RunConfig)
    files = {name: str(pathlib.Path(found[name]).absolute()) for name in ("data", "adapter") if name in found}
    return found | files | ({"model": model_source(found["model"])} if "model" in found else {})


def model_source(text: str) -> str:
    """A base model's absolute path, or if it is not there its name on the hub."""
    from lora_jax.huggingface import hub  # which needs JAX

    path = pathlib.Path(text)
    return text if not path.exists() and hub.parse(text) else str(path.absolute())

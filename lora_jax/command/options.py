"""The options of a run and of its commands: one table each, from which command lines, checks and `config.json` are made."""

import dataclasses
import datetime
import json
import pathlib
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lora_jax.adapters import words
from lora_jax.core import files
from lora_jax.core.errors import InputError, meant, within
from lora_jax.core.fields import LARGEST, check, option, table
from lora_jax.data.layouts import Columns

if TYPE_CHECKING:
    from lora_jax.adapters.config import LoraConfig
    from lora_jax.training.schedules import Schedule

FORMAT_VERSION = 8
TASKS = ("classify", "lm", "dpo", "images")
DECODERS = ("lm", "dpo")  # those with a decoder
FIELDS = ("text_field", "label_field", "prompt_field", "completion_field", "messages_field", "chosen_field", "rejected_field")
DECIDED = ("dtype", "scan_layers", "remat", "attention_block")  # by the device, of a decoder, where they are left open
TRACKERS = ("tensorboard", "wandb")
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
        Literal["classify", "lm", "dpo", "images"],
        option(
            "classify: labels of texts, with an encoder; lm: next tokens, with a decoder; dpo: preferred answers, with one; "
            "images: labels of images, with a ViT or DINOv2",
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
        str | Sequence[str] | None,
        option(
            "files (.csv, .jsonl, .json, .parquet, .arrow, for lm .txt) or folders of them (default: movie reviews, fetched "
            "once); for images a folder with a folder for each label",
            metavar="FILE",
        ),
    ] = None
    weights: Annotated[
        Sequence[float],
        option("how often an epoch draws the examples of each --data, in their order (default: once)", metavar="WEIGHT",
               tasks=("classify", *DECODERS), since=8, must_be="positive numbers", parse=words.decimals),
    ] = ()  # fmt: skip
    columns: Annotated[
        Columns,
        option(
            "which columns to take where there are those of several kinds of data: text, pairs, messages (own: one of these), "
            "sharegpt, alpaca, question or instruction",
            tasks=("lm",),
            since=8,
            before="own",
        ),
    ] = "any"
    text_field: Annotated[str, option("the column of the texts", tasks=("classify", "lm"))] = "text"
    label_field: Annotated[str, option("the column of the labels", tasks=("classify",))] = "label"
    prompt_field: Annotated[str, option("the column of the prompts, of which nothing is learnt", tasks=DECODERS, since=2)] = (
        "prompt"
    )
    completion_field: Annotated[str, option("the column of the completions", tasks=("lm",), since=2)] = "completion"
    messages_field: Annotated[
        str, option("the column of chats: lists of objects with a role and a content", tasks=("lm",), since=2)
    ] = "messages"
    chosen_field: Annotated[str, option("the column of the chosen answers", tasks=("dpo",), since=8)] = "chosen"
    rejected_field: Annotated[str, option("the column of the rejected answers", tasks=("dpo",), since=8)] = "rejected"
    eval_data: Annotated[
        str | None, option("held-out data, of the same form as --data; without it, a part of that is held out", since=8)
    ] = None
    held_out: Annotated[
        int, option("tokens to measure the perplexity on, at most a tenth of all", ge=1, tasks=("lm",), since=2)
    ] = 4096
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],  # float16: runs of before, see `check_trainable`
        option("the base's dtype in memory: float32 or bfloat16; adapters are float32",
               must_be="one of float32, bfloat16", tasks=(*DECODERS, "images"), since=2),
    ] = "float32"  # fmt: skip
    untie: Annotated[
        bool,
        option(
            "give a head that is the embedding (tied) a kernel of its own, as adapters of one of the two need",
            tasks=DECODERS,
            since=5,
        ),
    ] = False
    quantize: Annotated[
        str | None, option(f"quantise the kernels of the base's layers in memory: {', '.join(words.DTYPES)}", since=4)
    ] = None
    block: Annotated[int | None, option("how many quantised values share a scale, 64 if left out", since=4)] = None
    scan_layers: Annotated[
        bool,
        option("stack the layers and scan over them, which compiles once for all", both=True, since=6),
    ] = False
    remat: Annotated[
        Literal["none", "products", "full"],
        option("what the backward pass computes again, to save memory: none, products (all but products with weights) or full",
               since=6),
    ] = "none"  # fmt: skip
    attention_block: Annotated[
        int | None,
        option("compute the attention of at most so many queries at a time, to save memory", ge=1, must_be="at least 1",
               metavar="N", tasks=DECODERS, since=6),
    ] = None  # fmt: skip
    accumulate: Annotated[
        int,
        option(
            "cut each batch into so many parts, one after the other, to save memory",
            ge=1,
            metavar="N",
            since=6,
        ),
    ] = 1
    balance_loss: Annotated[
        float,
        option("add so many times the balance loss to the loss of a mixture of experts, so that all its experts stay in use",
               ge=0, le=LARGEST, metavar="COEF", tasks=("lm",), since=8),
    ] = 0.0  # fmt: skip
    rank: Annotated[int, option("rank of every low-rank pair", sweep=True)] = 8
    alpha: Annotated[float, option("the scale of every pair is alpha / rank", sweep=True)] = 16.0
    targets: Annotated[
        str | Sequence[str],
        option("kernels to adapt: patterns, or one of the words all-linear and attention", metavar="PATTERN"),
    ] = "all-linear"
    exclude: Annotated[
        Sequence[str], option("kernels that get no pair, whatever --targets says", metavar="PATTERN", since=8)
    ] = ()
    layers: Annotated[
        Sequence[int] | None,
        option("the layers to adapt: numbers from 0 on, and ranges such as 8-15", metavar="LAYER", since=8,
               must_be="whole numbers of at least 0, each once", parse=words.numbers),
    ] = None  # fmt: skip
    rank_pattern: Annotated[
        Mapping[str, int],
        option("other ranks for some kernels; the first match wins", metavar="PATTERN=RANK", since=8,
               must_be="whole numbers by pattern", parse=words.by_pattern),
    ] = dataclasses.field(default_factory=dict)  # fmt: skip
    alpha_pattern: Annotated[
        Mapping[str, float],
        option("other alphas for some kernels; the first match wins", metavar="PATTERN=ALPHA", since=8,
               must_be="numbers by pattern", parse=words.by_pattern),
    ] = dataclasses.field(default_factory=dict)  # fmt: skip
    train: Annotated[
        Sequence[str],
        option("parameters to train whole, beside a classifier's head", metavar="PATTERN", since=8),
    ] = ()
    dropout: Annotated[float, option("the rate of dropout on the input of every pair", ge=0, since=8)] = 0.0
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
    loss: Annotated[
        Literal["sigmoid", "ipo", "hinge", "orpo"],
        option("the loss of preferences: DPO's (sigmoid), or another", tasks=("dpo",), since=8),
    ] = "sigmoid"
    beta: Annotated[
        float, option("how strongly preferences hold to the base; for orpo the weight of the odds", gt=0, le=LARGEST,
                      tasks=("dpo",), since=8)
    ] = 0.1  # fmt: skip
    label_smoothing: Annotated[
        float, option("how often a preference is wrong, below 0.5; for sigmoid", ge=0, le=0.49, tasks=("dpo",), since=8)
    ] = 0.0
    learning_rate: Annotated[float, option("peak learning rate", gt=0, le=LARGEST, lm=1e-3, dpo=5e-4, sweep=True)] = 2e-3
    schedule: Annotated[
        Literal["cosine", "linear", "constant", "wsd"],
        option("what the learning rate does after its warm-up; wsd: constant, and linear in the last fifth", since=8),
    ] = "cosine"
    warmup: Annotated[
        int | None,
        option("steps in which the learning rate rises, a sixteenth of all if left out", ge=0, metavar="STEPS", since=8),
    ] = None
    min_rate: Annotated[float, option("the learning rate at the end", ge=0, le=LARGEST, since=8)] = 0.0
    optimizer: Annotated[Literal["adamw", "adafactor", "lamb", "lion", "muon", "sgd"], option("the optimiser", since=8)] = (
        "adamw"
    )
    weight_decay: Annotated[
        float, option("times the learning rate; never of biases, norms and magnitudes", ge=0, le=LARGEST, since=8)
    ] = 1e-4
    max_grad_norm: Annotated[float, option("clip gradients to this norm; 0: do not", ge=0, le=LARGEST, since=8)] = 1.0
    lora_plus: Annotated[float | None, option("B's learning rate over A's (LoRA+)", gt=0, le=LARGEST, since=3)] = None
    batch_size: Annotated[int, option("examples, for lm packed rows, for dpo pairs, per step", ge=1, lm=2, dpo=4)] = 32
    steps: Annotated[int, option("training steps", ge=1, lm=60, dpo=40)] = 180
    epochs: Annotated[
        float | None, option("instead of --steps: how many times to go through the data", gt=0, le=LARGEST, since=8)
    ] = None
    eval_every: Annotated[
        int | None, option("steps between two tests, a third of all if left out", ge=1, metavar="STEPS", since=8)
    ] = None
    save_every: Annotated[
        int | None,
        option(
            "steps between two checkpoints; left out: a tenth of all, at most 20, and in a sweep a third",
            ge=1,
            metavar="STEPS",
            since=8,
        ),
    ] = None
    keep: Annotated[
        Literal["last", "best"], option("the adapters that a run ends with: the last, or the best of all tests", since=8)
    ] = "last"
    patience: Annotated[
        int | None,
        option("stop after so many tests in a row that were no better than the best, and keep that", ge=1, metavar="TESTS",
               since=8),
    ] = None  # fmt: skip
    track: Annotated[
        Sequence[str],
        option(
            "send the metrics to tensorboard (RUN/tensorboard) or wandb (RUN/wandb) or both, too", metavar="TRACKER", since=8
        ),
    ] = ()
    max_length: Annotated[
        int,
        option(
            "texts are cut to this many tokens; for lm, the tokens of a packed row",
            ge=3,
            lm=256,
            dpo=128,
            tasks=("classify", *DECODERS),
        ),
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
    made: Annotated[
        Mapping[str, Any],
        option("the command, runs and options that the adapters were made with; no data, and no meaning in options of training",
               recorded=True, since=8),
    ] = dataclasses.field(default_factory=dict)  # fmt: skip
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
        if self.label_smoothing and self.loss != "sigmoid":
            raise InputError(f"label_smoothing is for loss='sigmoid', not for {self.loss!r}: leave it out")
        if self.task == "dpo" and self.init in CHANGE_THE_BASE:
            raise InputError(f"init={self.init!r} changes the base, which is the reference of preferences: leave it out")
        if self.lora_plus is not None and self.method != "lora":
            raise InputError(f"lora_plus is for method='lora', which trains A and B, not for {self.method!r}")
        if self.adapter is not None and self.init in CHANGE_THE_BASE:
            raise InputError(f"init={self.init!r} changes the base, to which the pairs of --adapter belong: leave one out")
        words.check_base(self.quantize, self.block)
        _check_track(self.track)
        if len(set(self.sources)) < len(self.sources):
            raise InputError("data names a file twice: name it once, with a weight")
        if self.weights and (len(self.weights) != len(self.sources) or not all(0 < x <= LARGEST for x in self.weights)):
            raise InputError(
                f"weights must be positive numbers, one for each of the {len(self.sources)} data, not {list(self.weights)}"
            )
        if self.min_rate > self.learning_rate:
            raise InputError(f"min_rate={self.min_rate:g} is above learning_rate={self.learning_rate:g}, from which it falls")
        if self.quantize is not None and self.init in CHANGE_THE_BASE:
            raise InputError(
                f"init={self.init!r} takes a part off the base's kernels, which quantize={self.quantize!r} has rounded: leave "
                "one of the two out"
            )
        object.__setattr__(self, "targets", words.targets(self.targets))

    @property
    def sources(self) -> tuple[str, ...]:
        """The files and folders of the data; none where it is the task's own."""
        return () if self.data is None else (self.data,) if isinstance(self.data, str) else tuple(self.data)

    @property
    def data_name(self) -> str:
        """The data in words."""
        names = [pathlib.Path(source).name for source in self.sources] or ["movie reviews"]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

    @property
    def lora(self) -> "LoraConfig":
        """What is adapted: the targets and, in a classifier, the head, which is trained whole.

        Raises:
          InputError: an option is out of range.
        """
        from lora_jax.adapters.config import LoraConfig  # which needs JAX

        head = [] if self.task in DECODERS else ["re:.*/classifier/.*"]
        method: Any = {"method": self.method, "scaling": self.scaling, "dora": self.dora}
        where: Any = {name: getattr(self, name) for name in ("exclude", "layers", "rank_pattern", "alpha_pattern", "dropout")}
        method["init"] = "kaiming" if self.init in CHANGE_THE_BASE else self.init
        if self.init in CHANGE_THE_BASE and (self.dora or self.method != "lora"):
            raise InputError(f"init={self.init!r} is for plain pairs: leave dora and method out")
        train = [*head, *self.train]
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets, train=train, **where, **method)

    @property
    def rates(self) -> "Schedule":
        """How the learning rate goes.

        Raises:
          InputError: options of it do not go together.
        """
        from lora_jax.training.schedules import Schedule  # which needs JAX

        more: Any = {"min_rate": self.min_rate, "warmup_from": self.warmup_from}
        return Schedule(kind=self.schedule, warmup=self.warmup, **more)

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
        """The steps of each time that the run was trained: in each the learning rate follows its schedule.

        >>> RunConfig(steps=100, finished=[60]).phases
        [60, 40]
        """
        ends = (*self.finished, self.steps)
        return [end - begin for begin, end in zip((0, *self.finished), ends)]

    @property
    def test_steps(self) -> int:
        """Steps between two tests."""
        return self.eval_every or max(1, -(-self.steps // 3))

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints."""
        return self.save_every or max(1, min(20, self.steps // 10))

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the adapters of its best test."""
        return self.keep == "best" or self.patience is not None

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
        with within(source):
            return cls(**fields)


def _check_track(track: Sequence[str]) -> None:
    for name in track:
        if name not in TRACKERS:
            raise InputError(f"track must be one or several of {', '.join(TRACKERS)}, not {name!r}{meant(name, TRACKERS)}")
    if len(set(track)) < len(track):
        raise InputError(f"track names a tracker twice: {' '.join(track)}; name it once")


GRID = {name: row for name, row in table(RunConfig).items() if row.more.get("sweep")}


def defaults(task: str) -> dict[str, Any]:
    """What the options of a task are by default, where other tasks have another default."""
    return {name: row.more[task] for name, row in table(RunConfig).items() if task in row.more}


def new_run(task: str, given: Mapping[str, Any]) -> RunConfig:
    """The configuration of a new run: the options given, and the task's defaults.

    Raises:
      InputError: an option is out of range, or belongs to another task.

    >>> new_run("lm", {"rank": 4}).steps, new_run("classify", {}).steps
    (60, 180)
    """
    usual = defaults(task)
    if "epochs" in given and "steps" in given:
        raise InputError("--epochs says in another way what --steps does: leave one of the two out")
    if "eval_data" in given and "held_out" in given:
        raise InputError("--held-out is for data of which a part is held out, and --eval-data is all held out: leave one out")
    if "adapter" in given:
        usual["targets"] = ()  # those of the adapters
    config = RunConfig(**{"task": task, **usual, **given})
    check_task_has(task, given)
    _ = config.rates  # which checks what it is made of, as this does:
    if config.targets:
        _ = config.lora
    check_trainable(config)
    return config


def check_task_has(task: str, given: Iterable[str]) -> None:
    """Raise an InputError for options that belong to other tasks."""
    for name in given:
        tasks = table(RunConfig)[name].more.get("tasks", (task,))
        if task not in tasks:
            raise InputError(f"{flag(name)} is an option of --task {' and '.join(tasks)}; leave it out of --task {task}")


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
class DrawOptions:
    """How tokens are chosen.

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
    system: Annotated[str | None, option("what a chat begins with: the system's message", metavar="TEXT")] = None

    def __post_init__(self):
        check(self, flag)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions(DrawOptions):
    """How to go on from a prompt."""

    chat: Annotated[bool, option("write the prompt, which is what a user says, with the model's chat template")] = False
    base: Annotated[bool, option("leave the run's adapters out")] = False

    def __post_init__(self):
        super().__post_init__()
        if self.system is not None and not self.chat:
            raise InputError("--system is a message of a chat: give --chat, too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How the adapters of several runs become one; see `lora_jax.combine`.

    Raises:
      InputError: an option is out of range.
    """

    method: Annotated[words.Method, option(f"one of {', '.join(typing.get_args(words.Method))}")] = "svd"
    weights: Annotated[
        Sequence[float],
        option("one for each run, 1 / runs if left out", metavar="WEIGHT", must_be="numbers", parse=words.decimals),
    ] = ()
    rank: Annotated[
        int | None, option("of the result, for svd and the _svd methods: the highest of the runs if left out", ge=1)
    ] = None
    density: Annotated[float | None, option("the share of values to keep, for ties, dare and magnitude_prune")] = None
    majority: Annotated[
        words.Majority, option("what elects a sign, for ties: the total of the values, or the frequency of their signs")
    ] = "total"
    seed: Annotated[int, option("seed of what dare drops", ge=0)] = 0

    def __post_init__(self):
        check(self, flag)


def flag(name: str) -> str:
    """What a command line calls a field.

    >>> flag("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"

"""Run directories of `lora-jax finetune`.

    RUN/config.json     the options, and digests of the data and of the base model
    RUN/adapters/       checkpoints of the adapters and of the training state
    RUN/initial/        the adapters at step 0, where the base was changed to make up for them (PiSSA and the like)
    RUN/metrics.jsonl   a line per step: `step`, `loss` (null at step 0 and where it is not finite) and `test_accuracy`
                        or `perplexity` (null at steps without a test)
    RUN/curve.png       loss and test accuracy or perplexity by step

An imported run has no metrics and no picture.

A run is there once its `config.json` is. Each file is replaced in one go, and the metrics grow by whole lines.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.adapters import quant
from lora_jax.adapters.config import WORDS, LoraConfig
from lora_jax.core import files
from lora_jax.core.errors import InputError, MissingError, OccupiedError

FORMAT_VERSION = 4
TASKS = ("classify", "lm")
DTYPES = ("float32", "bfloat16", "float16")
CHANGE_THE_BASE = ("pissa", "olora", "milora")  # starts of `lora_jax.initializers`
# What differs from the defaults of `RunConfig`, which are those of `classify`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "classify": {},
    "lm": {"learning_rate": 1e-3, "batch_size": 2, "steps": 60, "max_length": 256},
}
# Options that only one task has.
OWN: dict[str, tuple[str, ...]] = {
    "classify": ("label_field",),
    "lm": ("prompt_field", "completion_field", "messages_field", "held_out", "dtype"),
}
# Options that may differ between the runs of a sweep.
GRID: dict[str, type] = {"rank": int, "alpha": float, "learning_rate": float, "seed": int}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of a run, and what ties it to its data and base model.

    Args:
      task: `"classify"` (labelled texts, a BERT) or `"lm"` (next tokens, a decoder of the Llama family).
      model: a Hugging Face directory (or, for `lm`, a `.gguf` file), or `None` for the pinned MiniLM or SmolLM2.
      data: a `.csv` or `.jsonl` file (or, for `lm`, a `.txt` file), or `None` for the pinned movie reviews.
      text_field: the column of the texts.
      label_field: the column of the labels (`classify`).
      prompt_field: the column of the prompts (`lm`).
      completion_field: the column of the completions (`lm`).
      messages_field: the column of the chats (`lm`).
      held_out: tokens that the perplexity is measured on, at most a tenth of all (`lm`).
      dtype: of the frozen base in memory (`lm`); the adapters are float32.
      quantize: the kernels of the base's layers are quantised in memory, of this kind, as in `lora_jax.quantize`.
      block: how many quantised values share a scale; `None`: 64. Only with `quantize`.
      rank: r of every low-rank pair.
      alpha: the scale of every pair is alpha / rank.
      targets: patterns of the adapted kernels, or one of LoraConfig's words.
      method: as in LoraConfig; `"lora_fa"` brings its own optimiser along.
      scaling: as in LoraConfig.
      dora: as in LoraConfig.
      init: as in LoraConfig, or `"pissa"`, `"olora"` or `"milora"` of `lora_jax.initializers`.
      learning_rate: the peak, after the warm-up.
      lora_plus: B's learning rate over A's (LoRA+); `None`: they have the same.
      batch_size: examples per step; for `lm`, packed rows.
      steps: training steps.
      max_length: texts are cut to this many tokens; for `lm`, the tokens of a packed row.
      seed: of the adapters, a new head and the order of the batches; the train/test split does not depend on it.
      labels: the classes, in the order of the logits.
      data_sha256: the digest of all texts and labels.
      model_sha256: the digest of the base's weights.
      date: the day that chat templates are told, as ISO 8601: the day on which the run began.
      imported: the PEFT directory that the adapters came from; such a run has no data, and options of training mean nothing.

    Raises:
      InputError: an option is out of range.
    """

    task: str = "classify"
    model: str | None = None
    data: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"
    held_out: int = 4096
    dtype: str = "float32"
    quantize: str | None = None
    block: int | None = None
    rank: int = 8
    alpha: float = 16.0
    targets: str | Sequence[str] = "all-linear"
    method: str = "lora"
    scaling: str = "lora"
    dora: bool = False
    init: str = "kaiming"
    learning_rate: float = 2e-3
    lora_plus: float | None = None
    batch_size: int = 32
    steps: int = 180
    max_length: int = 64
    seed: int = 0
    labels: Sequence[str] = ()
    data_sha256: str = ""
    model_sha256: str = ""
    date: str = ""
    imported: str | None = None

    def __post_init__(self):
        for name, choices in (("task", TASKS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name, least in (("batch_size", 1), ("steps", 1), ("max_length", 3), ("seed", 0), ("held_out", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be positive and finite, not {self.learning_rate!r}")
        if self.lora_plus is not None and not 0 < self.lora_plus < math.inf:
            raise InputError(f"lora_plus must be positive and finite, not {self.lora_plus!r}")
        if self.lora_plus is not None and self.method != "lora":
            raise InputError(f"lora_plus is for method='lora', which trains A and B, not for {self.method!r}")
        self._check_quantized()
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        if isinstance(targets, list) and len(targets) == 1 and targets[0] in WORDS:
            targets = targets[0]
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "labels", list(self.labels))

    def _check_quantized(self) -> None:
        if self.quantize is not None:
            quant.check("quantize", self.quantize, self.block)
        elif self.block is not None:
            raise InputError("block is for a quantised base: leave it out, or say how to quantise")
        if self.quantize is not None and self.init in CHANGE_THE_BASE:
            raise InputError(
                f"init={self.init!r} takes a part off the base's kernels, which quantize={self.quantize!r} has rounded: leave "
                "one of the two out"
            )

    @property
    def lora(self) -> LoraConfig:
        """What is adapted: the targets and, in a classifier, the head, which is trained whole.

        Raises:
          InputError: an option is out of range.
        """
        train = ["classifier"] if self.task == "classify" else []
        method: Any = {"method": self.method, "scaling": self.scaling, "dora": self.dora}
        method["init"] = "kaiming" if self.init in CHANGE_THE_BASE else self.init
        if self.init in CHANGE_THE_BASE and (self.dora or self.method != "lora"):
            raise InputError(f"init={self.init!r} is for plain pairs: leave dora and method out")
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets, train=train, **method)

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
    def from_json(cls, text: str, source: Any) -> "RunConfig":
        """Read what `to_json` wrote; `source` is named in the errors.

        Raises:
          InputError: the text is not JSON, of another format version, or has unknown, missing or invalid fields.
        """
        fields = files.parse_json(text, source)
        version = fields.pop("format_version", None) if isinstance(fields, dict) else None
        if version in _LATER:  # what came later has its default
            later: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls) if f.name in _LATER[version]}
            fields = later | fields
        elif version != FORMAT_VERSION:
            raise InputError(
                f"{source} has the format version {version!r}, but this lora_jax reads 1 to {FORMAT_VERSION}: "
                "use the lora_jax that wrote the run, or train again"
            )
        odd = {field.name for field in dataclasses.fields(cls)} ^ set(fields)
        if odd:
            raise InputError(f"{source} has missing or unknown fields: {', '.join(sorted(odd))}")
        return cls(**fields)


_SINCE_3 = ("method", "scaling", "dora", "init", "lora_plus")
_SINCE_4 = ("quantize", "block")
_LATER = {1: ("task", *OWN["lm"], "date", "imported", *_SINCE_3, *_SINCE_4), 2: (*_SINCE_3, *_SINCE_4), 3: _SINCE_4}


def options(task: str, given: Mapping[str, Any]) -> RunConfig:
    """The configuration of a new run: the options given, and the task's defaults.

    Raises:
      InputError: an option is out of range, or belongs to another task.
    """
    config = RunConfig(**{"task": task, **DEFAULTS.get(task, {}), **given})
    for other in TASKS:
        for name in OWN[other] if other != task else ():
            if name in given:
                raise InputError(f"--{name.replace('_', '-')} is an option of --task {other}; leave it out of --task {task}")
    _ = config.lora  # which checks what it is made of
    return config


def check_free(directory: pathlib.Path) -> None:
    """Raise an OccupiedError unless a new run can be made in this directory."""
    config = directory / "config.json"
    with files.writing(directory):
        holds_run = config.is_file() and "format_version" in config.read_text(encoding="utf-8", errors="replace")
        entries = list(directory.iterdir()) if directory.is_dir() else []
        # A crash before `config.json` was in place can leave its hidden forerunner.
        occupied = any(not entry.name.startswith(".") for entry in entries) or (directory.exists() and not directory.is_dir())
    if holds_run:
        raise OccupiedError(f"{directory} holds a run already: continue it with --resume, or choose another --out")
    if occupied:
        raise OccupiedError(f"{directory} is not an empty directory: choose another --out")


def free_directory(parent: pathlib.Path) -> pathlib.Path:
    """The first of `parent/1`, `parent/2`, ... that does not exist."""
    return next(parent / str(i) for i in itertools.count(1) if not (parent / str(i)).exists())


def create(directory: pathlib.Path, config: RunConfig) -> None:
    """Make a run directory.

    Raises:
      OccupiedError: it holds a run or other files already.
    """
    check_free(directory)
    with files.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    files.write(directory / "config.json", config.to_json().encode())


def read_config(directory: pathlib.Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      MissingError: there is no run.
      InputError: the run is of another format version, or its `config.json` is damaged.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise MissingError(f"there is no run in {directory}: it has no config.json")
    with files.reading(file):
        text = file.read_text(encoding="utf-8")
    return RunConfig.from_json(text, file)

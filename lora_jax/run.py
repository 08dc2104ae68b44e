"""Run directories of `lora-jax finetune`.

    RUN/config.json     the options, and digests of the data and of the base model
    RUN/adapters/       checkpoints of the adapters and of the training state
    RUN/metrics.jsonl   a line per step: `step`, `loss` (null at step 0 and where it is not finite) and `test_accuracy`
                        (null at steps without a test)
    RUN/curve.png       loss and test accuracy by step

A run is there once its `config.json` is. Each file is replaced in one go, and the metrics grow by whole lines.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.config import WORDS, LoraConfig

FORMAT_VERSION = 1
METRICS = ("step", "loss", "test_accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options of a run, and what ties it to its data and base model.

    Args:
      model: a Hugging Face directory, or `None` for the pinned MiniLM.
      data: a `.csv` or `.jsonl` file, or `None` for the pinned movie reviews.
      text_field: the column of the texts.
      label_field: the column of the labels.
      rank: r of every low-rank pair.
      alpha: the scale of every pair is alpha / rank.
      targets: patterns of the adapted kernels, or one of LoraConfig's words.
      learning_rate: the peak, after the warm-up.
      batch_size: examples per step.
      steps: training steps.
      max_length: texts are cut to this many tokens.
      seed: of the adapters, a new head and the order of the batches; the train/test split does not depend on it.
      labels: the classes, in the order of the logits.
      data_sha256: the digest of all texts and labels.
      model_sha256: the digest of the base's `model.safetensors`.

    Raises:
      ValueError: an option is out of range.
    """

    model: str | None = None
    data: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    rank: int = 8
    alpha: float = 16.0
    targets: str | Sequence[str] = "all-linear"
    learning_rate: float = 2e-3
    batch_size: int = 32
    steps: int = 180
    max_length: int = 64
    seed: int = 0
    labels: Sequence[str] = ()
    data_sha256: str = ""
    model_sha256: str = ""

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("steps", 1), ("max_length", 3), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, not {self.learning_rate!r}")
        targets = self.targets if isinstance(self.targets, str) else list(self.targets)
        if isinstance(targets, list) and len(targets) == 1 and targets[0] in WORDS:
            targets = targets[0]
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "labels", list(self.labels))

    @property
    def lora(self) -> LoraConfig:
        """What is adapted: the targets, and the head, which is trained whole.

        Raises:
          ValueError: an option is out of range.
        """
        return LoraConfig(rank=self.rank, alpha=self.alpha, targets=self.targets, train=["classifier"])

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
          ValueError: the text is not JSON, of another format version, or has unknown, missing or invalid fields.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source} is not JSON: {error}") from None
        version = fields.pop("format_version", None) if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has the format version {version!r}, but this lora_jax reads {FORMAT_VERSION}: "
                "use the lora_jax that wrote the run, or train again"
            )
        odd = {field.name for field in dataclasses.fields(cls)} ^ set(fields)
        if odd:
            raise ValueError(f"{source} has missing or unknown fields: {', '.join(sorted(odd))}")
        return cls(**fields)


def write(file: pathlib.Path, content: bytes) -> None:
    """Replace a file in one go, so that a crash leaves the old one or the new one."""
    temporary = file.with_name(f".{file.name}.new")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def check_free(directory: pathlib.Path) -> None:
    """Raise a FileExistsError unless a new run can be made in this directory."""
    config = directory / "config.json"
    if config.is_file() and "format_version" in config.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{directory} holds a run already: continue it with --resume, or choose another --out")
    if not directory.exists():
        return
    # A crash before `config.json` was in place can leave its hidden forerunner.
    if not directory.is_dir() or any(not entry.name.startswith(".") for entry in directory.iterdir()):
        raise FileExistsError(f"{directory} is not an empty directory: choose another --out")


def free_directory(parent: pathlib.Path) -> pathlib.Path:
    """The first of `parent/1`, `parent/2`, ... that does not exist."""
    return next(parent / str(i) for i in itertools.count(1) if not (parent / str(i)).exists())


def create(directory: pathlib.Path, config: RunConfig) -> None:
    """Make a run directory.

    Raises:
      FileExistsError: it holds a run or other files already.
    """
    check_free(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "config.json", config.to_json().encode())


def read_config(directory: pathlib.Path) -> RunConfig:
    """The configuration of a run.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: the run is of another format version, or its `config.json` is damaged.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no run in {directory}: it has no config.json")
    return RunConfig.from_json(file.read_text(encoding="utf-8"), file)


class Metrics:
    """The metrics of a run, on disk and in `lines`.

    Opening drops a line that a crash cut off, and all lines after the step at which the run goes on.

    Args:
      directory: the run.
      step: the step at which the run goes on.
    """

    def __init__(self, directory: pathlib.Path, step: int):
        file = directory / "metrics.jsonl"
        self.lines = [line for line in read_metrics(directory) if line["step"] <= step]
        write(file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._stream = file.open("a", encoding="utf-8")

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def append(self, step: int, loss: float | None, test_accuracy: float | None) -> None:
        """Write one line."""
        self.lines.append(dict(zip(METRICS, (step, loss, test_accuracy))))
        self._stream.write(json.dumps(self.lines[-1]) + "\n")
        self._stream.flush()

    def accuracy(self, step: int) -> str:
        """The test accuracy at a step as a percentage; `unknown` if the line is gone."""
        found = [line["test_accuracy"] for line in self.lines if line["step"] == step]
        return f"{found[0]:.1%}" if found else "unknown"


def read_metrics(directory: pathlib.Path) -> list[Mapping[str, Any]]:
    """The whole lines of a run's metrics, up to the first that is damaged."""
    file = directory / "metrics.jsonl"
    lines = []
    for text in file.read_bytes().splitlines(keepends=True) if file.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not text.endswith(b"\n") or not isinstance(line, dict) or tuple(line) != METRICS:
            break
        lines.append(line)
    return lines

"""The model card of exported adapters: `README.md`, with the front matter that the Hugging Face hub reads."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.command import config_files, metrics
from lora_jax.command.options import DECODERS, RunConfig
from lora_jax.core import files
from lora_jax.core.fields import table

FILE = "README.md"
_TEMPLATE = pathlib.Path(__file__).with_name("model_card.md.jinja")
_FILES = "path/to/these/files"
# What the hub calls the task, and transformers the class of its models.
_KINDS = {
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "lm": ("text-generation", "AutoModelForCausalLM"),
    "dpo": ("text-generation", "AutoModelForCausalLM"),
    "images": ("image-classification", "AutoModelForImageClassification"),
}
_ALWAYS = ("rank", "alpha", "targets", "learning_rate", "steps", "batch_size", "seed")
_APART = ("task", "model", "data")  # which the card tells in other places


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card tells of a run.

    Args:
      config: the run's.
      lines: its metrics; none where it was imported, or made of other runs.
      step: that of the adapters.
      notes: what else one should know.
      base: what the base is called.
      is_of_the_hub: whether the base is on the hub, by this name.
      name: what the run is called.
      repository: where on the hub the adapters will be, if they will.
    """

    config: RunConfig
    lines: Sequence[Mapping[str, Any]]
    step: int | None
    notes: Sequence[str]
    base: str
    is_of_the_hub: bool
    name: str
    repository: str | None

    def write(self, directory: pathlib.Path) -> None:
        """Write the card of a PEFT directory into it."""
        import jinja2  # which most of the commands do not need
        import yaml

        fields = files.read_json_object(directory / "adapter_config.json")
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
        )
        front = yaml.safe_dump(self._front(fields), sort_keys=True, allow_unicode=True)
        environment.filters["cell"] = _cell
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        text = template.render(front=front, **self._values(fields))
        files.write(directory / FILE, text.encode())

    def _front(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The front matter; the hub knows no bases but its own."""
        named = {"base_model": self.base} if self.is_of_the_hub else {}
        tags = {
            f"base_model:adapter:{self.base}": self.is_of_the_hub,
            fields["peft_type"].lower(): True,
            "dora": fields.get("use_dora"),
            "dpo": self.config.task == "dpo",
            "transformers": True,
            "lora_jax": True,
        }
        common = {"library_name": "peft", "pipeline_tag": _KINDS[self.config.task][0]}
        return {**named, **common, "tags": [tag for tag, has in tags.items() if has]}

    def _values(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        config = self.config
        trained = config.imported is None and not config.made
        return {
            "config": config,
            "made": _json({**config.made, "runs": [_name(one) for one in config.made.get("runs", ())]}),
            "trained": trained,
            "base": self.base,
            "load": self.base if self.is_of_the_hub else "path/to/the/base",
            "files": _FILES,
            "place": self.repository or _FILES,
            "title": _name(self.repository or self.name),
            "notes": self.notes,
            "model_class": _KINDS[config.task][1],
            "options": _options(config, fields) if trained else {},
            "results": self._results() if trained else None,
            "vllm_rank": max(8, 1 << (fields["r"] - 1).bit_length()) if config.task in DECODERS and _vllm(fields) else None,
        }

    def _results(self) -> tuple[str, str, str, str] | None:
        """What was measured: its name, before, after, and the steps of the adapters; `None` if it was not measured."""
        scored = [(line, metric) for line in self.lines for metric in metrics.METRICS if line.get(metric.field) is not None]
        if not scored:
            return None
        metric = scored[0][1]
        scores = {line["step"]: metric.text(line[metric.field]) for line, _ in scored}
        before, after = (scores.get(step, "not measured") for step in (0, self.step))
        steps = f"{self.step} steps" if self.step == self.config.steps else f"{self.step} of {self.config.steps} steps"
        return metric.held_out, before, after, steps


def _name(place: str) -> str:
    """The last part of a path: what is before it is of this machine."""
    return pathlib.PurePath(place).name


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """A text within a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _options(config: RunConfig, fields: Mapping[str, Any]) -> dict[str, str]:
    """The options that are not at their defaults, and the rank, the alpha, the rate and the steps.

    Where the run went on with other adapters, what these are made as is said by the fields of `adapter_config.json`.
    """
    told = {*_ALWAYS, *config_files.said(config)} - {*_APART}
    found = {name: getattr(config, name) for name in table(RunConfig) if name in told}
    found |= {name: _name(found[name]) for name in ("adapter", "eval_data") if name in found}
    if config.adapter is not None:
        modules = sorted({module.rpartition(".")[2] for module in fields["target_modules"]})
        found |= {"rank": fields["r"], "alpha": fields.get("lora_alpha"), "targets": modules}
    return {name: _json(value) for name, value in found.items() if value is not None}


def _vllm(fields: Mapping[str, Any]) -> bool:
    """Whether vLLM serves such adapters: plain pairs of one rank and scale."""
    more = ["use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters"]
    more += ["trainable_token_indices", "alora_invocation_tokens"]
    return fields["peft_type"] == "LORA" and fields.get("bias") == "none" and not any(fields.get(name) for name in more)

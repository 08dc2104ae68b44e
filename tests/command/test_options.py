"""The table of a run's options: every command line that is made of it, and `config.json` as it always was."""

import dataclasses
import json

import pytest

from lora_jax.command import arguments, cli, config_files, options
from lora_jax.command.options import RunConfig
from lora_jax.core.errors import InputError
from lora_jax.core.fields import table

CONFIG = """{
 "format_version": 8,
 "task": "lm",
 "model": null,
 "data": "/texts.txt",
 "weights": [],
 "columns": "any",
 "text_field": "text",
 "label_field": "label",
 "prompt_field": "prompt",
 "completion_field": "completion",
 "messages_field": "messages",
 "chosen_field": "chosen",
 "rejected_field": "rejected",
 "eval_data": null,
 "held_out": 4096,
 "dtype": "float32",
 "untie": false,
 "quantize": "nf4",
 "block": 32,
 "scan_layers": true,
 "remat": "products",
 "attention_block": 64,
 "accumulate": 2,
 "balance_loss": 0.0,
 "rank": 4,
 "alpha": 16.0,
 "targets": [
  "q_proj",
  "mlp/up_proj"
 ],
 "exclude": [],
 "layers": null,
 "rank_pattern": {},
 "alpha_pattern": {},
 "train": [],
 "dropout": 0.0,
 "adapter": null,
 "method": "lora",
 "scaling": "lora",
 "dora": true,
 "init": "kaiming",
 "loss": "sigmoid",
 "beta": 0.1,
 "label_smoothing": 0.0,
 "learning_rate": 0.001,
 "schedule": "cosine",
 "warmup": null,
 "min_rate": 0.0,
 "optimizer": "adamw",
 "weight_decay": 0.0001,
 "max_grad_norm": 1.0,
 "lora_plus": null,
 "batch_size": 2,
 "steps": 60,
 "epochs": null,
 "eval_every": null,
 "save_every": null,
 "keep": "last",
 "patience": null,
 "track": [],
 "max_length": 256,
 "crop": 0.5,
 "flip": true,
 "seed": 0,
 "labels": [],
 "data_sha256": "",
 "model_sha256": "",
 "model_commit": "",
 "tokens_sha256": "",
 "date": "",
 "finished": [],
 "ends": [],
 "warmup_from": 1,
 "made": {},
 "imported": null
}
"""
LINE = ["--task", "lm", "--data", "/texts.txt", "--quantize", "nf4", "--block", "32", "--rank", "4", "--dora"]
LINE += [
    "--targets",
    "q_proj",
    "mlp/up_proj",
    "--scan-layers",
    "--remat",
    "products",
    "--attention-block",
    "64",
    "--accumulate",
    "2",
]


def test_a_command_line_as_json():
    given = config_files.given_run(cli.parser().parse_args(["finetune", *LINE]))
    config = options.new_run(given.pop("task"), given)
    assert config.to_json() == CONFIG and RunConfig.from_json(CONFIG, "config.json") == config


@pytest.mark.parametrize("name", [name for name, row in table(RunConfig).items() if "recorded" not in row.more])
def test_every_option_is_on_both_command_lines(name):
    row = table(RunConfig)[name]
    value = [] if row.kind is bool else [{"task": "lm", "rank_pattern": "a=1", "alpha_pattern": "a=1"}.get(name, "1")]
    for command in ("finetune", "sweep"):
        given = arguments.given(cli.parser().parse_args([command, options.flag(name), *value]), RunConfig)
        assert list(given) == [name] and row.help


def test_help_says_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    printed = capsys.readouterr().out
    assert "rank of every low-rank pair; several values: a run with each (default: 8)" in printed
    assert "training steps (default: 180, for lm 60, for dpo 40)" in printed
    assert "(default: 4096; lm only)" in printed and "sha256" not in printed


def test_recorded_fields_are_read_strictly():
    fields = json.loads(CONFIG)
    for name, value in {"labels": "bad", "date": 3, "imported": False}.items():
        with pytest.raises(InputError, match=rf"config\.json: {name} must be a"):
            RunConfig.from_json(json.dumps(fields | {name: value}), "config.json")
    with pytest.raises(InputError, match="date must be a day, as 2025-01-31, not 'today'"):
        _ = dataclasses.replace(RunConfig(), date="today").day

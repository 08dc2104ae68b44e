"""The table of a run's options: every command line that is made of it, and `config.json` as it always was."""

import dataclasses
import json

import pytest

from lora_jax.command import cli, options
from lora_jax.command.options import RunConfig
from lora_jax.core.errors import InputError
from lora_jax.core.fields import table

CONFIG = """{
 "format_version": 7,
 "task": "lm",
 "model": null,
 "data": "/texts.txt",
 "text_field": "text",
 "label_field": "label",
 "prompt_field": "prompt",
 "completion_field": "completion",
 "messages_field": "messages",
 "held_out": 4096,
 "dtype": "float32",
 "untie": false,
 "quantize": "nf4",
 "block": 32,
 "scan_layers": true,
 "remat": "products",
 "attention_block": 64,
 "accumulate": 2,
 "rank": 4,
 "alpha": 16.0,
 "targets": [
  "q_proj",
  "mlp/up_proj"
 ],
 "adapter": null,
 "method": "lora",
 "scaling": "lora",
 "dora": true,
 "init": "kaiming",
 "learning_rate": 0.001,
 "lora_plus": null,
 "batch_size": 2,
 "steps": 60,
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
    given = options.given_run(cli.parser().parse_args(["finetune", *LINE]))
    config = options.new_run(given.pop("task"), given)
    assert config.to_json() == CONFIG and RunConfig.from_json(CONFIG, "config.json") == config


@pytest.mark.parametrize("name", [name for name, row in table(RunConfig).items() if "recorded" not in row.more])
def test_every_option_is_on_both_command_lines(name):
    row = table(RunConfig)[name]
    value = [] if row.kind is bool else ["lm" if name == "task" else "1"]
    for command in ("finetune", "sweep"):
        given = options.given(cli.parser().parse_args([command, options.flag(name), *value]), RunConfig)
        assert list(given) == [name] and row.help


def test_help_says_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    printed = capsys.readouterr().out
    assert "rank of every low-rank pair; several values: a run with each (default: 8)" in printed
    assert "training steps (default: 180, for lm 60)" in printed
    assert "(default: 4096; lm only)" in printed and "sha256" not in printed


def test_recorded_fields_are_read_strictly():
    fields = json.loads(CONFIG)
    for name, value in {"labels": "bad", "date": 3, "imported": False}.items():
        with pytest.raises(InputError, match=rf"config\.json: {name} must be a"):
            RunConfig.from_json(json.dumps(fields | {name: value}), "config.json")
    with pytest.raises(InputError, match="date must be a day, as 2025-01-31, not 'today'"):
        _ = dataclasses.replace(RunConfig(), date="today").day

"""The option that a mistyped one means, or one that other trainers have."""

from collections.abc import Iterable

from lora_jax.core.errors import meant

# What other trainers call an option of ours.
_ELSEWHERE = {
    "adapter_path": "out",
    "base_model": "model",
    "dataset": "data",
    "dataset_name": "data",
    "eval_steps": "eval_every",
    "evaluation_steps": "eval_every",
    "gradient_accumulation_steps": "accumulate",
    "gradient_checkpointing": "remat",
    "grad_checkpoint": "remat",
    "iters": "steps",
    "load_in_4bit": "quantize",
    "load_in_8bit": "quantize",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "max_steps": "steps",
    "micro_batch_size": "batch_size",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "batch_size",
    "r": "rank",
    "report_to": "track",
    "save_steps": "save_every",
    "steps_per_eval": "eval_every",
    "target_modules": "targets",
    "train_file": "data",
    "use_dora": "dora",
    "use_rslora": "scaling",
    "validation_file": "eval_data",
    "warmup_steps": "warmup",
}


def meant_option(name: str, known: Iterable[str]) -> str:
    """As `errors.meant`, of options: what other trainers call one counts as near, and `-` and `_` as the same.

    >>> meant_option("--lora-r", ["--rank", "--layers"]), meant_option("lr", ["learning_rate"])
    ('; do you mean --rank?', '; do you mean learning_rate?')
    """
    plain = {option.lstrip("-").replace("-", "_"): option for option in known}
    given = name.lstrip("-").replace("-", "_")
    return f"; do you mean {ours}?" if (ours := plain.get(_ELSEWHERE.get(given, ""))) else meant(name, plain.values())

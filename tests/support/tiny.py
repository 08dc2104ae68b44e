"""A tiny BERT with a tokenizer, and labelled texts it can learn within seconds, for tests of the command."""

import os
import pathlib
import random
import shutil
import subprocess
import sys

import tokenizers

ROOT = pathlib.Path(__file__).parents[2]
BASE = pathlib.Path(__file__).parents[1] / "data" / "bert" / "base"
GOOD, BAD = ["good", "great", "fine", "lovely", "superb"], ["bad", "awful", "dull", "poor", "weak"]
FILLING = ["the", "a", "film", "plot", "cast", "it", "was", "is", "very", "quite", "and", "but"]


def model(directory, base=BASE):
    """A Hugging Face directory: a model with a tokenizer."""
    shutil.copytree(base, directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLING]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def reviews(file, count=240):
    """A CSV file with the columns `review` and `verdict`; the first word tells the label."""
    draw = random.Random(0)
    lines = ["review,verdict"]
    for i in range(count):
        verdict, words = (("bad", BAD), ("good", GOOD))[i % 2]
        lines.append(f"{draw.choice(words)} {' '.join(draw.choices(FILLING, k=draw.randint(2, 12)))},{verdict}")
    file.write_text("\n".join(lines) + "\n")
    return file


def options(directory, out, steps=40):
    """The arguments of `lora-jax` for a run on the two."""
    given = {
        "--model": directory / "model",
        "--data": directory / "reviews.csv",
        "--text-field": "review",
        "--label-field": "verdict",
        "--rank": 4,
        "--learning-rate": 0.005,
        "--batch-size": 16,
        "--steps": steps,
        "--max-length": 16,
        "--out": out,
    }
    return ["finetune", *(str(x) for pair in given.items() for x in pair)]


def start(*arguments, quiet=False):
    """The command as a process of its own; its output goes to `stdout`, all in one, unless it is quiet."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    streams = {"stdout": subprocess.DEVNULL if quiet else subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "lora_jax.command.cli", *map(str, arguments)], env=environment, **streams
    )


def finish(*arguments):
    """Run the command to its end; returns the exit code and the output."""
    process = start(*arguments)
    output, _ = process.communicate()
    return process.returncode, output


def home(directory):
    """A directory with the model and the data, as `options` takes it."""
    model(directory / "model")
    reviews(directory / "reviews.csv")
    return directory

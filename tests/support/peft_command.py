"""What `lora-jax export` writes of a run, as PEFT and transformers read it: the cases of the command in `peft_interop.py`."""

import contextlib
import io

import jax
import numpy as np
import peft
import tiny
import tiny_lm
import torch
import transformers as t

import lora_jax as lj
from lora_jax.command.cli import main
from lora_jax.models import bert, llama


def run(directory, options):
    """Train for a few steps, and export both ways where that is possible."""
    for arguments in (
        options,
        *(["export", directory / "run", "--format", x, "--out", directory / x] for x in ("peft", "merged")),
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([str(argument) for argument in arguments]) == 0, arguments
    return lj.checkpoint.load(directory / "run" / "adapters")


def classifier(directory):
    """A BERT with a new head of two labels."""
    tiny.model(directory / "model")
    tiny.reviews(directory / "reviews.csv")
    adapters = run(directory, tiny.options(directory, directory / "run", steps=20))
    loaded = bert.load(directory / "model", num_labels=2)
    # The base has a head of three labels, whose place the adapter's own takes.
    options = {"num_labels": 2, "ignore_mismatched_sizes": True}
    return loaded, adapters, lambda place: t.AutoModelForSequenceClassification.from_pretrained(directory / place, **options)


def decoder(directory):
    """A Llama with a tied head."""
    tiny_lm.model(directory / "model")
    tiny_lm.texts(directory / "texts.jsonl")
    adapters = run(directory, tiny_lm.options(directory, directory / "run", steps=10))
    return llama.load(directory / "model"), adapters, lambda place: t.AutoModelForCausalLM.from_pretrained(directory / place)


def check(make_run, directory, ids):
    """Our logits, and those of PEFT on the base, of the merged model, and of the base alone."""
    loaded, adapters, make = make_run(directory)
    ours = jax.jit(lj.lora(loaded.apply))(lj.attach(loaded.variables, adapters), ids)
    models = peft.PeftModel.from_pretrained(make("model"), directory / "peft"), make("merged"), make("model")
    with torch.no_grad():
        theirs = [model.eval()(input_ids=torch.from_numpy(ids)).logits.numpy() for model in models]
    return np.asarray(ours), *theirs


CASES = {"command, classify": classifier, "command, lm": decoder}

"""Write the files beside this one, which tests/test_compatibility.py reads, with the library as it was before the wings.

    git worktree add OLD 6227cba
    PYTHONPATH=OLD python tests/data/before/make_before.py

They are: the public names with their signatures, the command's options with their defaults, base models and data, runs (one
stopped, its twin that was not, one of a decoder, one on a changed base, one on a quantised base, one imported), a checkpoint
with every kind of adapter, PEFT directories, and what the library made of them. Paths in the runs begin with `{home}`.
"""

import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import tempfile

os.environ["COLUMNS"] = "200"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from described import CONFIG, adapters, entries, leaves, model, variables  # the file beside this one

import lora_jax as lj
from lora_jax import cli, finetune
from lora_jax.models import bert, llama
from tests import tiny, tiny_lm

HERE = pathlib.Path(__file__).parent

# --- names ------------------------------------------------------------------------------------------------------------

NAMESPACES = (
    "", "algebra", "checkpoint", "initializers", "losses", "many", "models", "models.bert", "models.gguf_files", "models.llama",
    "nnx", "optim", "peft", "peft.rules", "quant", "sharding", "train",
)  # fmt: skip
# Without an underscore, but made for other modules of the library alone.
INTERNAL = {
    "LowRank.more",
    *(f"models.bert.{name}" for name in ("Attention", "Embeddings", "Encoder", "Layer", "MLP")),
    *(f"quant.{name}" for name in ("base", "frozen")),
}


def names():
    """What is defined or handed on (`import x as x`) in the namespaces, and the modules that are loaded when first used."""
    found = dict.fromkeys(lj._SUBMODULES, "module")
    for namespace in NAMESPACES:
        module = importlib.import_module(f"lora_jax.{namespace}".rstrip("."))
        text = pathlib.Path(module.__file__).read_text()
        for name, value in vars(module).items():
            defined = getattr(value, "__module__", None) == module.__name__
            constant = name.isupper() and re.search(rf"^{name}\b.* = ", text, re.M)
            handed_on = re.search(rf"^from lora_jax.* as {name}$", text, re.M)
            if not name.startswith("_") and (defined or constant or handed_on):
                found |= entries(f"{namespace}.{name}".lstrip("."), value)
    return {name: text for name, text in sorted(found.items()) if name not in INTERNAL}


# --- the command ------------------------------------------------------------------------------------------------------


def call(*arguments, code=0):
    """Run the command; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            assert cli.main([str(argument) for argument in arguments]) == code
        except SystemExit as stop:
            assert stop.code in (code, None)
    return printed.getvalue()


def options():
    """By command: each option, and what its help says of a default."""
    commands = re.findall(r"^    (\w+)  ", call("--help"), re.M)
    found = {}
    for command in commands:
        listed = re.split(r"^  (?=-)", call(command, "--help"), flags=re.M)[1:]
        said = {re.match(r"-h, --help|--[\w-]+", e)[0]: " ".join(e.split()) for e in listed}
        said.pop("-h, --help")
        found[command] = {name: (re.findall(r"\(default: ([^)]*)\)", text) or [""])[0] for name, text in said.items()}
    return found


# --- runs -------------------------------------------------------------------------------------------------------------

STEPS, STOP = 12, 6
BERT = (
    "--text-field",
    "review",
    "--label-field",
    "verdict",
    "--targets",
    "query",
    "value",
    "--rank",
    2,
    "--learning-rate",
    0.02,
)
BERT += ("--batch-size", 8, "--max-length", 16)
LLAMA = ("--task", "lm", "--rank", 2, "--learning-rate", 0.01, "--batch-size", 2, "--steps", 8, "--max-length", 48)
LLAMA += ("--targets", "q_proj", "v_proj")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXTS, PROMPT = ["superb cast and plot", "weak plot and the film"], "The cat"


def train(home, name, *arguments, code=0):
    base, data = ("llama", "texts.jsonl") if "lm" in arguments else ("bert", "reviews.csv")
    return call("finetune", "--model", home / base, "--data", home / data, *arguments, "--out", home / name, code=code)


def train_and_stop(home, name, *arguments):
    """A run that is told to stop in the middle."""
    step = finetune.Progress.step

    def stop(self, at, loss):
        step(self, at, loss)
        if at == STOP:
            os.kill(os.getpid(), signal.SIGTERM)

    finetune.Progress.step = stop
    train(home, name, *arguments, code=128 + signal.SIGTERM)
    finetune.Progress.step = step


def make_runs(home):
    """The runs, and what the command prints of them."""
    tiny.model(home / "bert")
    tiny.reviews(home / "reviews.csv", count=36)
    tiny_lm.model(home / "llama", **SIZES)
    tiny_lm.texts(home / "texts.jsonl", count=60)
    train(home, "finished", *BERT, "--steps", STEPS)
    train_and_stop(home, "stopped", *BERT, "--steps", STEPS)
    train(home, "pissa", *BERT, "--steps", 2, "--init", "pissa")
    train(home, "int8", *BERT, "--steps", 2, "--quantize", "int8", "--block", 16)
    train(home, "decoder", *LLAMA)
    said = [option for text in TEXTS for option in ("--text", text)]
    printed = {f"{name} predict": call("predict", home / name, *said) for name in ("finished", "stopped", "pissa", "int8")}
    printed |= {f"{name} inspect": call("inspect", home / name) for name in ("finished", "pissa", "int8", "decoder")}
    for name in ("finished", "pissa", "decoder"):
        call("export", home / name, "--format", "peft", "--out", home / "peft" / name)
    call("import", home / "peft" / "decoder", "--model", home / "llama", "--out", home / "imported")
    for name in ("decoder", "imported"):
        printed[f"{name} generate"] = call("generate", home / name, "--prompt", PROMPT, "--max-new-tokens", 12)
    return printed


def logits(home):
    """The logits of each run's model for a few tokens."""
    ids, found = jnp.array([[2, 4, 14, 3], [2, 12, 16, 3]]), {}
    classifier, decoder = bert.load(home / "bert", num_labels=2), llama.load(home / "llama")
    for name, loaded in {"finished": classifier, "stopped": classifier, "decoder": decoder, "imported": decoder}.items():
        trained = lj.checkpoint.load(home / name / "adapters", variables=loaded.variables)
        found[name] = np.asarray(lj.lora(loaded.apply)(lj.attach(loaded.variables, trained), ids)[..., :16])
    return found


# --- adapters ---------------------------------------------------------------------------------------------------------


def make_checkpoint(directory):
    """A checkpoint of every kind of adapter with the state of training."""
    tx = lj.optimizer(optax.adam(0.1))
    state = lj.train.init_state(adapters(), tx, key=jax.random.key(7))
    data = {"position": 3}
    lj.checkpoint.save(directory, state.adapters, config=lj.LoraConfig(**CONFIG), step=5, state=state, data=data)
    found = lj.checkpoint.restore(directory, tx=tx)
    return leaves((found.adapters, found.state))


def make_peft(home):
    """A PEFT directory of DoRA, trained rows and a whole parameter, of the decoder."""
    decoder = llama.load(home / "llama")
    config = lj.LoraConfig(
        rank=2, targets=["q_proj"], dora=True, train=["norm"], trainable_token_indices={"embed_tokens": [3, 8]}
    )
    made = lj.init(jax.random.key(3), config, decoder.apply, decoder.variables, jnp.ones((1, 4), jnp.int32))
    options = {"names": decoder.names, "config": config, "base_model": "a/base", "task_type": "CAUSAL_LM"}
    lj.peft.save(home / "peft" / "dora", made, variables=decoder.variables, **options)
    return flat(made)


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in lj.paths.flatten(tree)[0].items()}


def texts(home):
    """What is printed or written as text."""
    decoder = llama.load(home / "llama")
    trained = lj.checkpoint.load(home / "decoder" / "adapters", variables=decoder.variables)
    return {
        "config": lj.LoraConfig(**CONFIG).to_json(),
        "explain": str(lj.explain(model, variables(), jnp.array([1, 2]))),
        "summary": str(lj.summary(decoder.variables, trained)),
        "summary of each kind": str(lj.summary(variables(), adapters())),
    }


def write_json(name, value):
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def main():
    with tempfile.TemporaryDirectory() as place:
        home = pathlib.Path(place) / "home"
        home.mkdir()
        printed = make_runs(home)
        arrays = {f"logits/{name}": value for name, value in logits(home).items()}
        arrays |= {f"checkpoint/{name}": value for name, value in make_checkpoint(home / "checkpoint").items()}
        arrays |= {f"dora/{name}": value for name, value in make_peft(home).items()}
        for name in ("finished", "stopped", "pissa", "int8", "decoder", "imported"):
            arrays |= {f"{name}/{path}": value for path, value in flat(lj.checkpoint.load(home / name / "adapters")).items()}
        write_json("texts.json", printed | texts(home))
        (home / "bert" / "model.safetensors").unlink()  # tests/data/bert/base has it
        for file in home.rglob("*"):
            if file.suffix in (".json", ".txt"):
                file.write_text(file.read_text().replace(str(home), "{home}"))
            if file.name == "curve.png":
                file.unlink()
        for name in ("finished", "pissa", "int8", "decoder"):
            shutil.rmtree(min((home / name / "adapters").iterdir(), key=lambda step: int(step.name)))
        shutil.rmtree(HERE / "home", ignore_errors=True)
        shutil.copytree(home, HERE / "home")
    safetensors.numpy.save_file(arrays, HERE / "arrays.safetensors")
    write_json("names.json", names())
    write_json("options.json", options())


if __name__ == "__main__":
    main()

"""What worked before the library had wings works: the names, the command's options, and files written then.

`tests/data/before/make_before.py` wrote the tables and files, with the library of that time.
"""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax.command import cli
from lora_jax.command.options import RunConfig
from lora_jax.core.fields import table
from lora_jax.models import bert, llama
from tests.data.before import described

BEFORE = pathlib.Path(__file__).parent / "data" / "before"
BASE = BEFORE.parent / "bert" / "base"
NAMES, OPTIONS, TEXTS = (json.loads((BEFORE / f"{name}.json").read_text()) for name in ("names", "options", "texts"))
ARRAYS = safetensors.numpy.load_file(BEFORE / "arrays.safetensors")

pytestmark = pytest.mark.usefixtures("usual_promotion")

# --- names ------------------------------------------------------------------------------------------------------------


def found(name):
    value = lj
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("namespace", sorted({name.rpartition(".")[0] for name in NAMES}))
def test_names(namespace):
    for name, text in NAMES.items():
        if name.rpartition(".")[0] == namespace:
            now = described.entries(name, found(name))[name]
            added = now.removeprefix(text.removesuffix(")"))  # options with a default may have come since
            assert now == text or re.fullmatch(r"(, \w+=[^,]+)+\)", added), f"{name}{now}"


def test_errors_are_of_the_classes_that_they_were():
    assert issubclass(lj.NotLowRankError, ValueError) and issubclass(lj.InputError, ValueError)
    with pytest.raises(FileNotFoundError):
        lj.checkpoint.load("nothing here")


# --- the command ------------------------------------------------------------------------------------------------------

VALUES = {
    "--task": "lm", "--rank": 4, "--alpha": 1.5, "--held-out": 10, "--block": 32, "--learning-rate": 0.1, "--lora-plus": 4,
    "--batch-size": 2, "--steps": 3, "--max-length": 5, "--seed": 1, "--processes": 1, "--process-id": 0, "--format": "peft",
    "--max-new-tokens": 3, "--temperature": 0.5, "--batch": 2, "--sequence": 8, "--quantize": "nf4",
}  # fmt: skip
FLAGS = ("--dora", "--chat", "--base", "--json")
POSITIONAL = {"predict": 1, "generate": 1, "inspect": 1, "export": 1, "import": 1, "plan": 1}


def printed(capsys, *arguments, code=0):
    """What the command prints."""
    try:
        assert cli.main([str(argument) for argument in arguments]) == code
    except SystemExit as stop:
        assert stop.code in (code, None)
    output = capsys.readouterr()
    assert "Traceback" not in output.err
    return output.err if code else output.out


def helped(capsys, monkeypatch, *command):
    """A help as lines without frames."""
    monkeypatch.setenv("COLUMNS", "200")
    return [re.sub(r"[^\x00-\x7f]", " ", line).strip() for line in printed(capsys, *command, "--help").splitlines()]


def test_commands_are_listed(capsys, monkeypatch):
    text = "\n".join(helped(capsys, monkeypatch))
    assert [command for command in OPTIONS if not re.search(rf"^{command}\b", text, re.M)] == []


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_listed(capsys, monkeypatch, command):
    """Each option has its place in the help, and its default with it: the same value, or other words for what has none."""
    lines = helped(capsys, monkeypatch, command)
    entries = [" ".join(entry.split()) for entry in re.split(r"^(?=-)", "\n".join(lines), flags=re.M)]
    for option, default in OPTIONS[command].items():
        own = [entry for entry in entries if re.match(rf"{option}(?![\w-])", entry)]
        is_value = " " not in re.split("[,;]", default)[0]
        wanted = default.split(";")[0] if is_value else "default"  # other tasks may have come to it since
        assert any(wanted in entry for entry in own), (option, default, own)


@pytest.mark.parametrize("command", OPTIONS)
def test_options_are_taken(capsys, command):
    """All of them beside an unknown one, of which alone the error speaks."""
    arguments = ["somewhere"] * POSITIONAL.get(command, 0)
    for option in OPTIONS[command]:
        arguments += [option] if option in FLAGS else [option, VALUES.get(option, "something")]
    error = printed(capsys, command, *arguments, "--no-such-option", code=2)
    assert "--no-such-option" in error
    assert [option for option in OPTIONS[command] if re.search(rf"{option}(?![\w-])", error)] == []


# --- runs -------------------------------------------------------------------------------------------------------------

RUNS = ("finished", "stopped", "pissa", "int8", "decoder", "imported")
NUMBER = re.compile(r"\d+\.\d+")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The runs with their bases and data, at a place of this machine."""
    home = tmp_path_factory.mktemp("before") / "home"
    shutil.copytree(BEFORE / "home", home)
    shutil.copy(BASE / "model.safetensors", home / "bert")
    for file in (*home.glob("*/config.json"), *home.glob("peft/*/adapter_config.json")):
        file.write_text(file.read_text().replace("{home}", str(home)))
    return home


def arrays(prefix):
    """The recorded arrays below a name."""
    return {name.removeprefix(f"{prefix}/"): array for name, array in ARRAYS.items() if name.startswith(f"{prefix}/")}


def equal(ours, theirs):
    """Assert equality of each bit."""
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert np.asarray(ours[name]).tobytes() == array.tobytes(), name


def flat(adapters):
    return {path: np.asarray(leaf) for path, leaf in lj.paths.flatten(adapters)[0].items()}


def same_text(ours, theirs, tolerance):
    """Assert that two texts differ at most in the last digits of their numbers."""
    assert NUMBER.sub("#", ours).split() == NUMBER.sub("#", theirs).split()
    np.testing.assert_allclose(
        [float(x) for x in NUMBER.findall(ours)], [float(x) for x in NUMBER.findall(theirs)], atol=tolerance
    )


@pytest.mark.parametrize("name", RUNS)
def test_adapters_of_runs(home, name):
    equal(flat(lj.checkpoint.load(home / name / "adapters")), arrays(name))


def test_logits(home):
    ids = jnp.array([[2, 4, 14, 3], [2, 12, 16, 3]])
    classifier, decoder = bert.load(home / "bert", num_labels=2), llama.load(home / "llama")
    for name, wanted in arrays("logits").items():
        model = classifier if wanted.ndim == 2 else decoder
        adapters = lj.checkpoint.load(home / name / "adapters", variables=model.variables)
        logits = jax.jit(lj.lora(model.apply))(lj.attach(model.variables, adapters), ids)
        np.testing.assert_allclose(logits[..., :16], wanted, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["finished", "stopped", "pissa", "int8"])
def test_predict(home, capsys, name):
    wanted = TEXTS[f"{name} predict"]
    said = [option for line in wanted.splitlines() for option in ("--text", line.split("\t")[2])]
    same_text(printed(capsys, "predict", home / name, *said), wanted, 1.01e-3)


@pytest.mark.parametrize("name", ["finished", "pissa", "int8", "decoder"])
def test_inspect(home, capsys, name):
    same_text(printed(capsys, "inspect", home / name), TEXTS[f"{name} inspect"], 1.01e-2)


@pytest.mark.parametrize("name", ["decoder", "imported"])
def test_generate(home, capsys, name):
    options = ("--prompt", "The cat", "--max-new-tokens", 12)
    assert printed(capsys, "generate", home / name, *options) == TEXTS[f"{name} generate"]


def same_peft_config(ours, theirs):
    """The same fields, but for the version of PEFT whose layouts the tensors have, which is said now."""
    ours, theirs = (json.loads((place / "adapter_config.json").read_text()) for place in (ours, theirs))
    assert ours == theirs | {"peft_version": "0.21.2"}


@pytest.mark.parametrize("name", ["finished", "pissa", "decoder"])
def test_export_for_peft(home, tmp_path, name):
    assert cli.main(["export", str(home / name), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    ours, theirs = tmp_path / "peft", home / "peft" / name
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()} | {"README.md"}  # which is new
    same_peft_config(ours, theirs)
    ours, theirs = (safetensors.numpy.load_file(place / "adapter_model.safetensors") for place in (ours, theirs))
    assert set(ours) == set(theirs)
    for tensor, wanted in theirs.items():
        np.testing.assert_allclose(ours[tensor], wanted, rtol=0, atol=0 if name != "pissa" else 1e-6, err_msg=tensor)


def test_export_merged(home, tmp_path):
    assert cli.main(["export", str(home / "decoder"), "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    merged = llama.load(tmp_path / "merged")
    logits = merged.apply(merged.variables, jnp.array([[2, 4, 14, 3], [2, 12, 16, 3]]))
    np.testing.assert_allclose(logits[..., :16], ARRAYS["logits/decoder"], atol=1e-5)


def test_import(home, tmp_path):
    source = home / "peft" / "decoder"
    assert cli.main(["import", str(source), "--model", str(home / "llama"), "--out", str(tmp_path / "run")]) == 0
    equal(flat(lj.checkpoint.load(tmp_path / "run" / "adapters")), arrays("imported"))
    ours, theirs = (json.loads((run / "config.json").read_text()) for run in (tmp_path / "run", home / "imported"))
    new = {"untie": False, "ends": [], "warmup_from": 1, "adapter": None, "finished": [], "tokens_sha256": ""}
    new |= {"scan_layers": False, "remat": "none", "attention_block": None, "accumulate": 1, "model_commit": ""}
    new |= {"crop": 0.5, "flip": True}
    newest = {name: row.default for name, row in table(RunConfig).items() if row.more.get("since", 1) > 7}
    assert ours == theirs | {"format_version": 8} | new | json.loads(json.dumps(newest))


@pytest.mark.parametrize(("lost", "tolerance"), [((), 1e-6), (("adapters", "metrics.jsonl"), 5e-5)])
def test_resume(home, tmp_path, lost, tolerance):
    """A run that was stopped then ends as the one that was not, also from its first step, whose rate was 0 then."""
    shutil.copytree(home / "stopped", tmp_path / "run", ignore=lambda folder, names: set(lost) & set(names))
    assert cli.main(["finetune", "--resume", str(tmp_path / "run")]) == 0
    ended, wanted = flat(lj.checkpoint.load(tmp_path / "run" / "adapters")), arrays("finished")
    assert set(ended) == set(wanted)
    for path, array in wanted.items():
        np.testing.assert_allclose(ended[path], array, rtol=0, atol=tolerance, err_msg=path)
    ours, theirs = (read_lines(run / "metrics.jsonl") for run in (tmp_path / "run", home / "finished"))
    assert all(list(one)[:3] == list(other) for one, other in zip(ours, theirs, strict=True))
    assert [line["test_accuracy"] for line in ours] == [line["test_accuracy"] for line in theirs]
    np.testing.assert_allclose([line["loss"] for line in ours[1:]], [line["loss"] for line in theirs[1:]], atol=tolerance)
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


SINCE_8 = ("balance_loss",)
SINCE_7 = ("model_commit", *SINCE_8)
SINCE_6 = ("scan_layers", "remat", "attention_block", "accumulate", *SINCE_7)
SINCE_5 = ("untie", "adapter", "tokens_sha256", "finished", "ends", "warmup_from", *SINCE_6)
SINCE_4 = ("quantize", "block", *SINCE_5)
SINCE_3 = ("method", "scaling", "dora", "init", "lora_plus", *SINCE_4)
SINCE_2 = ("task", "prompt_field", "completion_field", "messages_field", "held_out", "dtype", "date", "imported", *SINCE_3)


@pytest.mark.parametrize(("version", "later"), [(1, SINCE_2), (2, SINCE_3), (3, SINCE_4)])
def test_runs_of_older_formats(home, tmp_path, capsys, version, later):
    shutil.copytree(home / "finished", tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    fields = json.loads(file.read_text()) | {"format_version": version}
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in later}))
    same_text(printed(capsys, "inspect", tmp_path / "run"), TEXTS["finished inspect"], 1.01e-2)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_checkpoint_of_every_kind_of_adapter(home):
    tx = lj.optimizer(optax.adam(0.1))
    read = lj.checkpoint.restore(home / "checkpoint", tx=tx, variables=described.variables())
    equal(described.leaves((read.adapters, read.state)), arrays("checkpoint"))
    assert (read.step, read.data, read.config) == (5, {"position": 3}, lj.LoraConfig(**described.CONFIG))
    for path, adapter in described.adapters().items():
        assert jax.tree.structure(adapter) == jax.tree.structure(read.adapters[path]), path


def test_peft_directory(home, tmp_path):
    decoder = llama.load(home / "llama")
    read = lj.peft.load(home / "peft" / "dora", decoder.variables, names=decoder.names)
    equal(flat(read), arrays("dora"))
    config = lj.LoraConfig(**described.PEFT_CONFIG)
    options = {"names": decoder.names, "config": config, "base_model": "a/base", "task_type": "CAUSAL_LM"}
    lj.peft.save(tmp_path / "again", read, variables=decoder.variables, **options)
    ours, theirs = tmp_path / "again", home / "peft" / "dora"
    same_peft_config(ours, theirs)
    tensors = "adapter_model.safetensors"
    assert (ours / tensors).read_bytes() == (theirs / tensors).read_bytes()


def test_texts(home):
    decoder = llama.load(home / "llama")
    trained = lj.checkpoint.load(home / "decoder" / "adapters", variables=decoder.variables)
    config = lj.LoraConfig(**described.CONFIG)
    assert config.to_json() == TEXTS["config"] and lj.LoraConfig.from_json(TEXTS["config"]) == config
    assert str(lj.explain(described.model, described.variables(), jnp.array([1, 2]))) == TEXTS["explain"]
    assert str(lj.summary(decoder.variables, trained)).startswith(TEXTS["summary"])  # what has no adapter is listed below
    assert str(lj.summary(described.variables(), described.adapters())).startswith(TEXTS["summary of each kind"])

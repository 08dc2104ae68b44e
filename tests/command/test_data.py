"""`lora-jax data`, and runs on several files."""

import collections
import json
import sys

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import run
from lora_jax.command.options import RunConfig, new_run
from lora_jax.command.tasks import registry
from lora_jax.core.fields import table
from tests.support import interrupting, tiny, tiny_lm
from tests.support.calling import call

pytestmark = pytest.mark.usefixtures("usual_promotion")

NEW = [name for name, row in table(RunConfig).items() if row.more.get("since", 1) == 8]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tiny_lm.home(tmp_path_factory.mktemp("home"))
    rows = [{"question": f"The cat {i}", "answer": " meows."} for i in range(40)]
    (home / "pairs.json").write_text(json.dumps([*rows, rows[0], {"question": "x" * 60, "answer": "y"}]))
    (home / "more.jsonl").write_text("".join(json.dumps({"text": f"Hoot {i}."}) + "\n" for i in range(30)))
    return home


def test_a_look_at_pairs(home, capsys):
    printed = call(["data", home / "pairs.json", "--task", "lm", "--model", home / "model", "--max-length", 20], capsys)
    tokens = sum(len(tiny_lm.tokenizer().encode(" meows.").ids) + 1 for _ in range(41))
    assert f"42 pairs of the columns question, answer\n{tokens} tokens are learnt\n" in printed
    assert "62 at most" in printed and "1 are there more than once" in printed
    assert "--max-length 20: 1 pairs were left out: nothing that is learnt begins within a row" in printed
    assert "32-63 tokens  1 " in printed
    assert "--- example 1 ---\nThe cat 0[[ meows.<|im_end|>]]\n" in printed and "--- example 3 ---" in printed


def test_a_look_at_preferences(home, tmp_path, capsys):
    rows = [{"prompt": f"The cat {i}", "chosen": " meows.", "rejected": " barks."} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = call(["data", tmp_path / "a.jsonl", "--task", "dpo", "--model", home / "model"], capsys)
    assert "chosen: The cat 0[[ meows.<|im_end|>]]\nrejected: The cat 0[[ barks.<|im_end|>]]" in printed
    assert "5 preferences\n30 tokens of answers are learnt\n" in printed and "nothing is cut or left out" in printed


def test_a_look_at_labels(tmp_path, capsys):
    tiny.home(tmp_path)
    (tmp_path / "odd.csv").write_text("review,verdict\ngood film,bad\ngood film,good\n")
    fields = ["--text-field", "review", "--label-field", "verdict", "--max-length", 8]
    files = [tmp_path / "reviews.csv", tmp_path / "odd.csv"]
    printed = call(["data", *files, "--model", tmp_path / "model", *fields], capsys)
    assert "242 labelled texts\nbad: 121\ngood: 121\n" in printed and "1 texts have more than one label" in printed
    assert "texts were longer than 8 tokens and were cut at their end" in printed and "good film -> [[good]]" in printed


def test_what_data_can_not_look_at(home, capsys):
    assert "`lora-jax data` is for texts" in call(["data", home, "--task", "images"], capsys, code=2)
    odd = call(["data", home / "pairs.json", "--task", "lm", "--model", home / "model", "--text-field", "body"], capsys, code=2)
    assert "one kind of data: 'body'; its columns are 'question', 'answer'" in odd


@pytest.fixture(scope="module")
def options(home):
    def made(out):
        line = tiny_lm.options(home, out, steps=8)
        place = line.index("--data") + 1
        return [*line[: place + 1], str(home / "more.jsonl"), *line[place + 1 :], "--weights", "1", "2.5"]

    return made


def test_two_files_with_weights(home):
    """The batches have rows of each file by its weight, and an epoch is as long as they say."""
    files = [str(home / name) for name in ("texts.jsonl", "more.jsonl")]
    given = {
        "model": str(home / "model"),
        "data": files,
        "weights": [1.0, 4.0],
        "max_length": 48,
        "batch_size": 1,
        "epochs": 2.0,
    }
    session = registry.prepare(new_run("lm", given))
    assert "the data are texts of the column text" in session.task.description
    assert "an epoch draws each example of texts.jsonl 1 times, of more.jsonl 4 times" in session.task.description
    batches = session.task.train_batches(0)
    rows = [tiny_lm.tokenizer().decode(next(batches)["input_ids"][0].tolist()) for _ in range(session.config.steps)]
    counts = collections.Counter(rows)
    assert all(count == (8 if row.startswith("Hoot") else 2) for row, count in counts.items()) and len(counts) > 30


@pytest.mark.slow
def test_a_stopped_run_on_two_files(home, options, tmp_path, capsys, monkeypatch):
    call(options(tmp_path / "whole"), capsys)
    config = run.read_config(tmp_path / "whole")
    assert config.data == [str(home / "texts.jsonl"), str(home / "more.jsonl")] and config.weights == [1.0, 2.5]
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 3)
        call(options(tmp_path / "stopped"), capsys, code=130)
    call(["finetune", "--resume", tmp_path / "stopped"], capsys)
    ours, theirs = (lj.checkpoint.load(tmp_path / name / "adapters") for name in ("whole", "stopped"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_weights_must_fit_the_data():
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights must be positive numbers, one for each of the 2 data"):
            new_run("lm", {"data": ["a.csv", "b.csv"], "weights": weights})
    with pytest.raises(ValueError, match="data names a file twice"):
        new_run("lm", {"data": ["a.csv", "a.csv"]})
    with pytest.raises(ValueError, match="--weights is an option of --task classify and lm and dpo"):
        new_run("images", {"data": "a", "weights": [1.0]})


def test_runs_of_before_have_one_file_and_their_own_columns():
    fields = json.loads(new_run("lm", {"data": "/a.csv"}).to_json()) | {"format_version": 7}
    old = {name: value for name, value in fields.items() if name not in NEW}
    config = RunConfig.from_json(json.dumps(old), "config.json")
    assert (config.sources, list(config.weights), config.columns) == (("/a.csv",), [], "own")


def test_without_pyarrow(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = ["data", tmp_path / "a.parquet", "--task", "lm"]
    assert "the package pyarrow is missing: pip install 'lora-jax[parquet]'" in call(line, capsys, code=2)

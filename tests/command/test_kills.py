"""`kill -9` of a run with early stopping, and of one of preferences: once they have gone on, they end as if nothing had been."""

import json
import time

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import metrics
from tests.support import tiny, tiny_lm
from tests.support.run_lines import lasting


def early_stopping(home, out):
    """A run that ends after 30 tests that are no better than the first."""
    idle = ["--eval-every", 1, "--save-every", 2, "--keep", "best", "--patience", 30]
    line = tiny.options(home, out, 200)
    line[line.index("--learning-rate") + 1] = 1e-9
    return [*line, *idle]


def preferences(home, out):
    line = ["finetune", "--task", "dpo", "--model", home / "lm", "--data", home / "pairs.jsonl", "--rank", 4, "--out", out]
    return [*line, "--batch-size", 4, "--steps", 100, "--save-every", 3, "--max-length", 24]


@pytest.fixture
def home(tmp_path):
    tiny.home(tmp_path)
    tiny_lm.model(tmp_path / "lm")
    rows = [{"prompt": f"The cat {i}", "chosen": " meows.", "rejected": " barks."} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("options", "last"), [(early_stopping, 30), (preferences, 100)])
def test_a_killed_run_ends_the_same(home, options, last):
    code, output = tiny.finish(*options(home, home / "whole"))
    assert code == 0, output
    killed = home / "killed"
    process = tiny.start(*options(home, killed), quiet=True)
    while process.poll() is None and len(metrics.read(killed)) < 6:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and metrics.read(killed)[-1]["step"] < last
    code, output = tiny.finish("finetune", "--resume", killed)
    assert code == 0, output
    assert lasting(killed) == lasting(home / "whole") and metrics.read(killed)[-1]["step"] == last
    for folder in ("adapters", "best") if (killed / "best").exists() else ("adapters",):
        ours, theirs = (lj.checkpoint.load(run / folder) for run in (killed, home / "whole"))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)

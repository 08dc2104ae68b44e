"""Runs whose base is a model of the hub: from a cache laid out by hand, offline."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard, constants

from lora_jax.command import cli
from lora_jax.command.run import read_config
from lora_jax.huggingface import hub
from tests.support import tiny, tiny_lm
from tests.support.hub import COMMIT, OTHER, cache
from tests.support.marks import every_other

pytestmark = pytest.mark.usefixtures("usual_promotion")
HOMES = {"lm": tiny_lm, "classify": tiny}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The directory of the hub's cache, which is all there is of it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(home, directory, *commit_and_ref):
    return cache(home, "some-owner/tiny", directory, [file.name for file in directory.iterdir()], *commit_and_ref)


def train(home, out, task, model):
    words = HOMES[task].options(home, out, steps=2)
    words[words.index("--model") + 1] = model
    return cli.main(words)


@pytest.mark.parametrize("task", every_other(HOMES))
def test_a_run_goes_on_with_the_commit_that_it_began_with(offline, capsys, task):
    home = offline / "home"
    home.mkdir()
    HOMES[task].home(home)
    kept = put(offline, home / "model")
    assert train(home, offline / "run", task, "some-owner/tiny") == 0
    config = read_config(offline / "run")
    assert (config.model, config.model_commit) == ("some-owner/tiny", COMMIT) and config.model_sha256
    changed = shutil.copytree(home / "model", offline / "changed")
    (changed / "config.json").write_text("{}")
    put(offline, changed, OTHER)  # what the main branch is now
    (offline / "some-owner" / "tiny").mkdir(parents=True)  # which would go first in a new run
    assert cli.main(["finetune", "--resume", str(offline / "run"), "--steps", "1"]) == 0
    assert cli.main(["inspect", str(offline / "run")]) == 0
    assert "nan" not in capsys.readouterr().out
    assert cli.main(["export", str(offline / "run"), "--format", "peft", "--out", str(offline / "peft")]) == 0
    assert f"the commit {COMMIT} of the base, which adapter_config.json can't say" in capsys.readouterr().err
    described = json.loads((offline / "peft" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == "some-owner/tiny"
    card = ModelCard.load(offline / "peft" / "README.md")
    assert card.data.base_model == "some-owner/tiny" and "base_model:adapter:some-owner/tiny" in card.data.tags
    assert f'from_pretrained("some-owner/tiny", revision="{COMMIT}"' in card.text
    other = ["--base-model", "some-owner/other", "--out", str(offline / "not")]
    assert cli.main(["export", str(offline / "run"), "--format", "peft", *other]) == 2
    assert "names some-owner/other, but the run's base is some-owner/tiny of the hub" in capsys.readouterr().err
    imported = ["import", str(offline / "peft"), "--out", str(offline / "imported"), "--model", f"some-owner/tiny@{COMMIT}"]
    assert cli.main(imported) == 0
    assert read_config(offline / "imported").model_commit == COMMIT
    shutil.rmtree(kept)
    capsys.readouterr()
    assert cli.main(["finetune", "--resume", str(offline / "run"), "--steps", "1"]) == 2
    assert f"some-owner/tiny@{COMMIT} is not in the cache, and the hub can't be reached" in capsys.readouterr().err


def test_a_revision(offline):
    home = offline / "home"
    home.mkdir()
    tiny_lm.home(home)
    put(offline, home / "model", OTHER, "v2")
    assert train(home, offline / "run", "lm", "some-owner/tiny@v2") == 0
    config = read_config(offline / "run")
    assert (config.model, config.model_commit) == ("some-owner/tiny@v2", OTHER)
    assert hub.cached(hub.HubName("some-owner/tiny")) is None


@pytest.mark.parametrize("task", HOMES)
def test_a_look_at_data_needs_no_weights(offline, capsys, task):
    home = offline / "home"
    home.mkdir()
    HOMES[task].home(home)
    (home / "model" / "model.safetensors").unlink()
    put(offline, home / "model")
    [data] = [file for file in home.iterdir() if file.name in ("texts.jsonl", "reviews.csv")]
    more = [] if task == "lm" else ["--text-field", "review", "--label-field", "verdict"]
    look = ["data", str(data), "--task", task, "--model", "some-owner/tiny", *more]
    assert cli.main(look) == 0, capsys.readouterr().err
    assert "--- example 1 ---" in capsys.readouterr().out


def test_a_directory_goes_first(offline):
    home = offline / "some-owner"
    home.mkdir()
    tiny_lm.home(home)
    (home / "model").rename(home / "tiny")
    assert train(home, offline / "run", "lm", "some-owner/tiny") == 0
    config = read_config(offline / "run")
    assert (config.model, config.model_commit) == (str(home / "tiny"), "")


@pytest.mark.parametrize(
    ("model", "says"), [("some-owner/none", "some-owner/none is not in the cache"), ("a/b/c", "no directory or file")]
)
def test_no_such_model(offline, capsys, model, says):
    tiny_lm.texts(offline / "texts.jsonl")
    assert train(offline, offline / "run", "lm", model) == 2
    assert says in capsys.readouterr().err
    assert not (offline / "run").exists()


def test_a_plan_needs_the_configuration_alone(offline, capsys):
    tiny_lm.model(offline / "model")
    cache(offline, "some-owner/tiny", offline / "model", ["config.json"])
    found = []
    for model in ("some-owner/tiny", str(offline / "model")):
        assert cli.main(["plan", model, "--rank", "2", "--sequence", "8", "--topology", "cpu", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["request"]["model"] == "some-owner/tiny"
    assert found[0]["parameters"] == found[1]["parameters"] > 0
    assert cli.main(["plan", "some-owner/other"]) == 2
    assert "some-owner/other is not in the cache, and the hub can't be reached" in capsys.readouterr().err

"""Models by their names on the hub: from caches laid out by hand, offline, and from a hub on this machine."""

import json
import pathlib
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.core.errors import MissingError
from lora_jax.huggingface import hub
from tests.support.hub import COMMIT, OTHER, cache, python, serving

BASE = pathlib.Path(__file__).parents[1] / "data" / "peft" / "llama" / "base"
FIND = "import sys; from lora_jax.huggingface import hub; print(hub.find(sys.argv[1]))"
LOAD = (
    "import sys, numpy as np, lora_jax as lj\n"
    "got, want = (lj.models.load(source) for source in sys.argv[1:])\n"
    "for a, b in zip(__import__('jax').tree.leaves(got.variables), __import__('jax').tree.leaves(want.variables), strict=True):\n"
    "    np.testing.assert_array_equal(a, b)\n"
    "print(got.config == want.config)"
)
NAME = "some-owner/tiny.1"
WEIGHTS = "model.safetensors"


@pytest.fixture
def repository(tmp_path):
    """A model as the hub has many: the same weights in several formats, in several files, with more beside."""
    directory = tmp_path / "repository"
    shutil.copytree(BASE, directory)
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, directory / file)
    placed = {name: file for file, own in parts.items() for name in own}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (directory / "original").mkdir()
    (directory / WEIGHTS).rename(directory / "original" / WEIGHTS)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.onnx", "model.gguf", "README.md", "tokenizer.json"):
        (directory / name).write_bytes(b"{}")
    return directory


WANTED = {
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "tokenizer.json",
}


def test_only_what_is_needed_is_fetched_and_once(tmp_path, repository):
    with serving() as server:
        server.add(NAME, repository)
        place = {"home": tmp_path / "home", "hub": server}
        assert python(LOAD, NAME, BASE, **place) == "True"
        assert set(server.fetched) == WANTED
        server.fetched.clear()
        found = pathlib.Path(python(FIND, NAME, **place))
        assert found.name == COMMIT and {str(file.relative_to(found)) for file in found.rglob("*.*")} == WANTED
        assert server.fetched == []
    assert python(FIND, NAME, home=tmp_path / "home") == str(found)  # offline
    assert python(FIND, f"{NAME}@{COMMIT}", home=tmp_path / "home") == str(found)


def test_the_configuration_alone(tmp_path, repository):
    code = FIND.replace("hub.find(sys.argv[1])", "hub.config_file(hub.parse(sys.argv[1]))")
    with serving() as server:
        server.add(NAME, repository)
        found = pathlib.Path(python(code, NAME, home=tmp_path / "home", hub=server))
        assert set(server.fetched) == {"config.json"}
    assert found.read_bytes() == (repository / "config.json").read_bytes()
    assert python(code, NAME, home=tmp_path / "home") == str(found)  # offline
    message = python(FIND, NAME, home=tmp_path / "home")
    assert f"MissingError: {NAME} (commit {COMMIT}) is not whole in the cache: it lacks {WEIGHTS}" in message


def test_a_revision(tmp_path, repository):
    with serving() as server:
        server.add(NAME, repository)
        server.add(NAME, BASE, OTHER, "v2")
        place = {"home": tmp_path / "home", "hub": server}
        assert pathlib.Path(python(FIND, f"{NAME}@v2", **place)).name == OTHER
        assert set(server.fetched) == {"config.json", "generation_config.json", WEIGHTS}
        message = python(FIND, f"{NAME}@v3", **place)
    assert "MissingError: some-owner/tiny.1 has no revision 'v3': give a branch, a tag or a commit" in message


def test_a_gated_model(tmp_path):
    with serving() as server:
        server.add(NAME, BASE)
        server.gated.add(NAME)
        place = {"home": tmp_path / "home", "hub": server}
        message = python(FIND, NAME, **place)
        assert f"InputError: {NAME} is gated: accept its licence at https://huggingface.co/{NAME}, and log in" in message
        assert pathlib.Path(python(FIND, NAME, token=server.token, **place)).name == COMMIT


def test_there_is_no_such_model(tmp_path):
    with serving() as server:
        message = python(FIND, NAME, home=tmp_path, hub=server)
    assert f"MissingError: {NAME} is neither a directory here nor a model of the Hugging Face hub that you may read" in message


@pytest.mark.parametrize("lacking", ["config.json", WEIGHTS])
def test_a_model_without_what_is_read(tmp_path, lacking):
    shutil.copytree(BASE, tmp_path / "repository")
    (tmp_path / "repository" / lacking).rename(tmp_path / "repository" / "model.gguf")
    with serving() as server:
        server.add(NAME, tmp_path / "repository")
        message = python(FIND, NAME, home=tmp_path / "home", hub=server)
    assert f"MissingError: {NAME} (commit {COMMIT}) has no {lacking}: only models with a config.json and safetensors" in message


def test_a_hub_that_can_not_be_reached(tmp_path):
    with serving() as server:
        pass
    message = python(FIND, NAME, home=tmp_path, hub=server)
    assert f"MissingError: {NAME} is not in the cache, and the hub can't be reached (" in message


def test_offline_from_a_cache_laid_out_by_hand(tmp_path):
    found = cache(tmp_path, NAME, BASE, ["config.json", WEIGHTS])
    cache(tmp_path, NAME, BASE, ["config.json"], OTHER, "v2")
    assert python(FIND, NAME, home=tmp_path) == str(found)
    message = python(FIND, f"{NAME}@v2", home=tmp_path)
    assert f"MissingError: {NAME}@v2 (commit {OTHER}) is not whole in the cache: it lacks {WEIGHTS}" in message
    for name in (f"{NAME}@v3", "some-owner/other"):
        message = python(FIND, name, home=tmp_path)
        assert f"MissingError: {name} is not in the cache, and the hub can't be reached" in message, message
        assert "unset HF_HUB_OFFLINE" in message


def test_a_directory_goes_first(tmp_path):
    (tmp_path / NAME).mkdir(parents=True)
    assert python(FIND, NAME, home=tmp_path / "home", cwd=tmp_path) == NAME


@pytest.mark.parametrize(
    "text", ["gpt2", "./a/b", "/a/b", "a/b/c", "../b", "a/b@", "a/b@../c", "a/b.gguf", "a b/c", "-a/b", "a/"]
)
def test_what_is_neither(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match=r"there is no directory or file .*no name of the Hugging Face hub .* owner/name or"):
        hub.find(text)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a/b", ("a/b", None)),
        ("Qwen/Qwen3-0.6B@main", ("Qwen/Qwen3-0.6B", "main")),
        ("o_w-n/x__1.2@refs/pr/3", ("o_w-n/x__1.2", "refs/pr/3")),
    ],
)
def test_names(text, want):
    name = hub.parse(text)
    assert (name.repository, name.revision) == want and str(name) == text


def test_without_the_package(tmp_path):
    code = f"import sys; sys.modules['huggingface_hub'] = None; {FIND}"
    message = python(code, NAME, home=tmp_path)
    assert "models of the hub need the package huggingface_hub: pip install 'lora-jax[hub]', or give a directory" in message

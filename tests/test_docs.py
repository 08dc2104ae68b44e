"""Every docstring example and every Python block of the README runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import shlex

import huggingface_hub
import pytest

import lora_jax
from lora_jax.command import cli
from tests.support import tiny_lm

ROOT = pathlib.Path(lora_jax.__file__).parent
README = (ROOT.parent / "README.md").read_text()
MODULES = [name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "lora_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, lenient):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_readme_blocks_run_in_order(lenient, capsys, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    base = str(tiny_lm.model(tmp_path / "model"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", {"HuggingFaceTB/SmolLM2-135M-Instruct": base}.__getitem__)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "trainable of" in capsys.readouterr().out
    llm, adapters = namespace["llm"], namespace["adapters"]
    first = namespace["loss_fn"](lora_jax.attach(llm.variables, adapters), namespace["ids"], None)
    assert namespace["metrics"]["loss"] < 0.9 * first
    assert (tmp_path / "runs" / "peft" / "adapter_config.json").exists()


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 150 and max(len(line) for line in lines if not line.startswith("|")) <= 128


@pytest.mark.parametrize("file", ["README.md", "notebooks/README.md", "tests/benchmarks/README.md"])
def test_links_lead_somewhere(file):
    page = ROOT.parent / file
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if not link.startswith("https://")]
    assert links and not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("line", [line for line in re.findall(r"^ *(lora-jax .*)$|`(lora-jax [^`]*)`", README, re.M)])
def test_readme_commands_are_known(line):
    words = shlex.split("".join(line))
    cli.parser().parse_args(words[1:])

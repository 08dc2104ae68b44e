"""Every docstring example and every Python block of the README runs."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import lora_jax

ROOT = pathlib.Path(lora_jax.__file__).parent
MODULES = [name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "lora_jax.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, lenient):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_readme_blocks_run_in_order(lenient, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT.parent / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "trainable of" in capsys.readouterr().out

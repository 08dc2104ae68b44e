"""`import lora_jax`: its names are there, for Python and for editors alike, and nothing is loaded before it is used."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lora_jax as lj


def test_editors_see_what_python_does():
    """The imports for type checkers are those that `lj.NAME` makes."""
    source = ast.parse(pathlib.Path(lj.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in source.body if isinstance(node, ast.If)]
    seen = {name.asname: (node.module, name.name) for node in block.body for name in node.names}
    assert seen.keys() == set(lj._PLACES)
    for name, (module, own) in seen.items():
        found = lj._PLACES[name]
        assert found in (f"{module}:{own}", f"{module}.{own}")


@pytest.mark.parametrize("name", sorted(lj._PLACES))
def test_it_is_there(name):
    assert getattr(lj, name) is not None and name in dir(lj)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'lroa'"):
        lj.lroa  # noqa: B018


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"], ["finetune", "--help"], ["generate", "--help"]])
def test_help_does_not_start_jax(words):
    """Which takes most of a second."""
    code = (
        "import sys\nfrom lora_jax.command import cli\n"
        f"try:\n    cli.main({words!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    made = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert made.returncode == 0 and "usage: lora-jax" in made.stdout, made.stderr

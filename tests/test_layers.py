"""Every file imports as the module of its own name, private JAX stays in one place, and `import lora_jax` stays light."""

import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import lora_jax

ROOT = pathlib.Path(lora_jax.__file__).parent
WINGS = {"adapters", "command", "core", "data", "huggingface", "models", "peft", "planning", "sharding", "training"}
MODULES = [name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "lora_jax.")]
THIRD_PARTY = {
    "matplotlib",
    "flax",
    "orbax",
    "grain",
    "tokenizers",
    "rich",
    "safetensors",
    "transformers",
    "jinja2",
    "gguf",
    "qwix",
    "msgspec",
}


def test_the_house_has_ten_wings():
    found = {path.name for path in ROOT.iterdir() if path.name != "__pycache__"}
    assert found == WINGS | {"__init__.py", "py.typed"}


@pytest.mark.parametrize("name", MODULES)
def test_no_function_hides_a_module(name):
    module = importlib.import_module(name)
    namespace = {}
    exec(f"import {name} as found", namespace)
    assert namespace["found"] is module


@pytest.mark.parametrize("name", MODULES)
def test_private_jax_stays_in_one_place(name):
    text = pathlib.Path(importlib.import_module(name).__file__).read_text()
    assert "jax._src" not in text
    assert name == "lora_jax.core.jax_compat" or "jax.extend" not in text


def test_the_top_level_is_small_and_light():
    assert len(lora_jax.__all__) <= 36
    code = f"import lora_jax, sys; sys.exit(', '.join(sorted({THIRD_PARTY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "", f"`import lora_jax` loads {done.stderr}"

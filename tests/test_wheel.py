"""The wheel, built and installed by itself."""

import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import lora_jax

ROOT = pathlib.Path(__file__).parents[1]


def run(*command, cwd):
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_works_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    [wheel] = tmp_path.glob("lora_jax-*.whl")
    assert wheel.name.startswith(f"lora_jax-{lora_jax.__version__}-")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("lora_jax/")}
    listed = run("git", "ls-files", "lora_jax", cwd=ROOT).split()
    assert packed == set(listed)

    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    programs = tmp_path / "empty" / "bin"
    run(programs / "pip", "install", "-q", wheel, cwd=tmp_path)
    assert run(programs / "lora-jax", "--version", cwd=tmp_path) == f"lora_jax {lora_jax.__version__}\n"
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert "trainable of" in run(programs / "python", "-W", "error", "-c", example[1], cwd=tmp_path)

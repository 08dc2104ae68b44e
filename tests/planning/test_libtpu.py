"""libtpu where there is no TPU: it keeps quiet, and hides nothing."""

import os
import subprocess
import sys

import jax
import pytest

from lora_jax.planning import libtpu


@pytest.fixture
def unset(monkeypatch):
    """An environment and a JAX that say nothing of platforms, on a machine without devices of a TPU."""
    for variable in libtpu._SETTINGS:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(libtpu, "_DEVICES", ())
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    yield monkeypatch
    jax.config.update("jax_platforms", before)
    for variable in libtpu._SETTINGS:
        os.environ.pop(variable, None)


def told():
    return {variable: os.environ[variable] for variable in libtpu._SETTINGS if variable in os.environ}


def test_where_there_is_no_tpu_it_is_told(unset):
    libtpu.quieten()
    assert told() == libtpu._SETTINGS
    assert jax.config.jax_platforms is None  # so that a GPU is found


def test_what_the_environment_says_stays(unset):
    unset.setenv("TPU_WORKER_HOSTNAMES", "somewhere")
    libtpu.quieten()
    assert told() == libtpu._SETTINGS | {"TPU_WORKER_HOSTNAMES": "somewhere"}


@pytest.mark.parametrize("platforms", ["tpu,cpu", "cpu"])
def test_where_jax_knows_its_platform_nothing_is_told(unset, platforms):
    jax.config.update("jax_platforms", platforms)
    libtpu.quieten()
    assert told() == {}


def test_where_there_may_be_a_tpu_nothing_is_told(unset, tmp_path):
    (tmp_path / "accel0").touch()
    unset.setattr(libtpu, "_DEVICES", (str(tmp_path / "accel*"),))
    libtpu.quieten()
    assert told() == {}


def test_devices_are_found_without_a_word():
    """With libtpu installed, too."""
    code = "from lora_jax.planning import libtpu; libtpu.quieten(); import jax; print(jax.devices()[0].platform)"
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", *libtpu._SETTINGS)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("cpu", "gpu", "tpu")
    assert "TPU" not in done.stderr

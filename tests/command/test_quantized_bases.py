"""Runs whose base is a quantised checkpoint of the hub."""

import json

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import cli, run
from lora_jax.models import llama
from tests.support import quantized_files, tiny_lm

pytestmark = pytest.mark.usefixtures("usual_promotion")


def test_trained_and_merged(tmp_path):
    """The merged export is the dequantised base with the adapters folded in, and dense."""
    home = tmp_path / "home"
    home.mkdir()
    tiny_lm.home(home)
    encode = lambda name, weight: quantized_files.four_bits(name, weight, 16)
    packed, _ = quantized_files.model(tmp_path, encode, {"quant_method": "bitsandbytes"}, base=home / "model")
    assert cli.main(tiny_lm.options(home, tmp_path / "run", model=packed, steps=3)) == 0
    assert cli.main(["export", str(tmp_path / "run"), "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    base, merged = llama.load(packed), llama.load(tmp_path / "merged")
    adapters = run.load_adapters(tmp_path / "run", base.variables)
    want = lj.merge(base.variables, adapters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged.variables, want)
    changes = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), want, base.variables)
    assert max(jax.tree.leaves(changes)) > 1e-4
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())

"""Runs of decoders of other families than Llama: trained, exported both ways, merged as transformers reads them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.command import cli, hf_export, run
from lora_jax.models import families, llama
from tests.support import tiny_lm
from tests.support.identity import distance
from tests.support.marks import slow_unless

pytestmark = pytest.mark.usefixtures("usual_promotion")
DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
CASES = slow_unless(lambda case: case in ("gemma3", "gpt_oss"), ["gemma3", "gpt2", "gpt_neox", "gpt_oss", "mixtral", "phi3"])


@pytest.fixture
def home(request, tmp_path):
    """A tiny model of a family, with the vocabulary of the tests' tokenizer, and data."""
    fields = json.loads((DATA / request.param / "base" / "config.json").read_text())
    config = families.read_config(fields | {"vocab_size": 300, "eos_token_id": 2})
    loaded = llama.init(config, jax.random.key(3))
    tiny_lm.model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    hf_export.write(tmp_path / "model", loaded.variables, {}, llama.file_names(loaded), families.hf_config(config), {})
    tiny_lm.texts(tmp_path / "texts.jsonl")
    return tmp_path


@pytest.mark.parametrize("home", CASES, indirect=True)
def test_a_run_of_a_family(home, capsys):
    assert cli.main(tiny_lm.options(home, home / "run", steps=3)) == 0
    for form in ("peft", "merged"):
        assert cli.main(["export", str(home / "run"), "--format", form, "--out", str(home / form)]) == 0
    base, merged = llama.load(home / "model"), llama.load(home / "merged")
    adapters = lj.peft.load(home / "peft", base.variables, names=base.names)
    assert distance(adapters, run.load_adapters(home / "run", base.variables)) < 1e-6
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    adapted = lj.lora(base.apply)(lj.attach(base.variables, adapters), ids)
    assert distance(merged.apply(merged.variables, ids), adapted) < 1e-4
    assert distance(adapted, base.apply(base.variables, ids)) > 1e-3
    capsys.readouterr()
    assert cli.main(["generate", str(home / "run"), "--prompt", "The cat", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out

"""`lj.models.load`: the family by `config.json`, and options by family."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.models import bert, llama
from tests.support.gguf_write import write

DATA = pathlib.Path(__file__).parents[1] / "data"
LLAMA, BERT = DATA / "peft" / "llama" / "base", DATA / "bert" / "base"


def same(got, want):
    assert type(got) is type(want) and got.config == want.config and got.names == want.names
    jax.tree.map(np.testing.assert_array_equal, got.variables, want.variables)


@pytest.mark.parametrize(
    "options", [{}, {"scan_layers": True, "dtype": "bfloat16", "tie": False}, {"quantize": "int8", "block": 8}]
)
def test_a_decoder(options):
    same(lj.models.load(str(LLAMA), **options), llama.load(LLAMA, **options))


@pytest.mark.parametrize("options", [{}, {"num_labels": 5, "seed": 3}, {"seed": 0, "quantize": "int8", "block": 8}])
def test_a_text_encoder(options):
    same(lj.models.load(BERT, **options), bert.load(BERT, **options))


def test_a_gguf_file(tmp_path):
    file = write(tmp_path / "tiny.gguf", "base")
    same(lj.models.load(file, scan_layers=True), llama.load(file, scan_layers=True))


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        (
            BERT,
            {"tie": False},
            "tie: a model of the type 'bert' has no such option; .* has scan_layers, remat, num_labels, seed",
        ),
        (BERT, {"attention_block": 4, "tie": True}, "attention_block, tie: a model of the type 'bert'"),
        (BERT, {"remat": "some"}, "remat must be None or one of 'full', 'products', not 'some'"),
        (
            LLAMA,
            {"num_labels": 0},
            "num_labels: a model of the type 'llama' .* has scan_layers, remat, attention_block, dense_experts, tie",
        ),
    ],
)
def test_an_option_of_another_family(source, options, says):
    with pytest.raises(lj.InputError, match=says):
        lj.models.load(source, **options)


@pytest.mark.parametrize("model_type", ["mamba", None, ["llama"]])
def test_an_unknown_family(tmp_path, model_type):
    shutil.copytree(LLAMA, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": model_type}))
    with pytest.raises(
        lj.InputError, match=r"config.json: the model_type is .*; these can be read: 'llama', .*'bert'"
    ) as found:
        lj.models.load(tmp_path / "model")
    assert repr(model_type) in str(found.value)


def test_a_source_that_is_neither(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory or file .*, and it is no name of the Hugging Face hub either"):
        lj.models.load(tmp_path / "missing")

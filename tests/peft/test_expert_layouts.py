"""Fused experts of PEFT before 0.19.1, which stored A and B the other way round, against the weights that it merged."""

import json
import shutil

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax import peft
from tests.support import peft_cases
from tests.support.peft_cases import CASES


def copied(case, version, tmp_path):
    """The case's directory with another `peft_version`, or with none."""
    shutil.copytree(peft_cases.directory(case), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"peft_version": version}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def change(case, directory, **options):
    """The change of each tensor, and PEFT's own."""
    variables, names, _ = peft_cases.model(CASES[case]["model"])
    merged = peft_cases.tensors(lj.merge(variables, peft.load(directory, variables, names=names, **options)), names)
    base, wanted = peft_cases.tensors(variables, names), peft_cases.expected(case)
    deltas = {name.removeprefix("delta:"): delta for name, delta in wanted.items() if name.startswith("delta:")}
    return {name: merged[name] - base[name] for name in deltas}, deltas


def assert_close(found, wanted):
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "experts"), [("mixtral-square-0180", "old"), ("mixtral-square-0212", "new")])
def test_where_neither_version_nor_shapes_tell_the_layout_must_be_given(case, experts, tmp_path):
    copied(case, None, tmp_path)
    wanted = r"adapter_model.safetensors: before 0.19.1 PEFT .* \(None\) nor .*: model-.*-gate_up_proj. Pass .*experts=\"old\""
    with pytest.raises(ValueError, match=wanted):
        change(case, tmp_path)
    assert_close(*change(case, tmp_path, experts=experts))


def test_a_version_between_releases_does_not_tell(tmp_path):
    copied("mixtral-square-0212", "0.19.1.dev0@0123abc", tmp_path)
    with pytest.raises(ValueError, match=r"neither peft_version \('0.19.1.dev0@0123abc'\) nor"):
        change("mixtral-square-0212", tmp_path)


@pytest.mark.parametrize(("case", "version"), [("mixtral-experts-0180", None), ("mixtral-experts-qv", None),
                                               ("gpt-oss-square-0180", None), ("mixtral-experts-0180", "0.21.2")])  # fmt: skip
def test_shapes_tell(case, version, tmp_path):
    """GPT-OSS's have one layout in all versions that do not write themselves into the file."""
    copied(case, version, tmp_path)
    assert_close(*change(case, tmp_path))


def test_a_layout_that_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"lora_A.weight has the shape \(16, 80\); .* need \(16, 32\)"):
        change("mixtral-gate-up", peft_cases.directory("mixtral-experts-0180"), experts="new")
    with pytest.raises(ValueError, match='experts must be "old" or "new", not \'odd\''):
        change("mixtral-gate-up", peft_cases.directory("mixtral-gate-up"), experts="odd")


def test_what_is_written_has_the_layout_of_the_version_it_names(tmp_path):
    variables, names, _ = peft_cases.model("mixtral-square")
    adapters = peft.load(peft_cases.directory("mixtral-square-0180"), variables, names=names)
    peft.save(tmp_path, adapters, names=names)
    again = peft.load(tmp_path, variables, names=names)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == "0.21.2"

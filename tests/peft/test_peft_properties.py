"""Random PEFT directories, written by the plainest code there is, against what `load` and `save` make of them."""

import json
import math
import re
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import peft
from tests.support.peft_cases import tensors

LAYERS = 3
SIZES = {"attn.q": (4, 6), "attn.k": (4, 3), "mlp.up": (4, 5), "mlp.down": (5, 4)}  # (in, out)
MODULES = {f"model.layers.{i}.{block}": size for i in range(LAYERS) for block, size in SIZES.items()} | {"head": (4, 7)}
NORMS = [f"model.layers.{i}.norm" for i in range(LAYERS)] + ["model.norm"]
BIASED = [module for module in MODULES if ".attn." in module]

names = st.sampled_from(["q", "k", "up", "down", "attn.q", "head", "model.layers.1.mlp.up", "layers.0.attn.k"])
patterns = st.sampled_from(["q", "attn.k", "^model.layers.1.mlp.up", "layers.0.attn.q", r".*\.2\..*", "up|down", "head"])


@st.composite
def configurations(draw):
    fields = {"peft_type": "LORA", "r": draw(st.integers(1, 3)), "lora_alpha": draw(st.sampled_from([1, 2, 7, 16, 0.3]))}
    fields["use_rslora"] = draw(st.booleans())
    fields["rank_pattern"] = draw(st.dictionaries(patterns, st.integers(1, 3), max_size=3))
    fields["alpha_pattern"] = draw(st.dictionaries(patterns, st.sampled_from([3, 5, 11]), max_size=3))
    regexes = st.sampled_from([r".*\.[02]\..*", r".*attn\.(q|k)", "head", r"model.*"])
    fields["target_modules"] = draw(st.one_of(st.lists(names, min_size=1, max_size=4, unique=True), regexes))
    if isinstance(fields["target_modules"], list):
        fields["layers_to_transform"] = draw(st.sampled_from([None, None, 0, [1, 2]]))
    fields["exclude_modules"] = draw(st.one_of(st.none(), st.lists(names, max_size=1)))
    fields["modules_to_save"] = draw(st.sampled_from([None, ["norm"], ["head"], ["model.norm", "head"]]))
    fields["bias"] = draw(st.sampled_from(["none", "all", "lora_only"]))
    fields["use_dora"] = draw(st.booleans())
    return fields


def is_target(fields, module):
    """The rule in plain words: not excluded, not saved, and named by its end (or matched); layers by the first number."""
    ends = lambda listed: any(module == name or module.endswith("." + name) for name in listed or [])
    if ends(fields["exclude_modules"]) or ends(fields["modules_to_save"]):
        return False
    targets = fields["target_modules"]
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    layers = fields.get("layers_to_transform")
    if module in targets or layers is None:
        return ends(targets)
    number = re.search(r"\d+", module)
    return ends(targets) and number is not None and int(number[0]) in np.ravel(layers)


def by_pattern(table, module, default):
    return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def base(rng):
    """The tensors of a small model, with Hugging Face names."""
    found = {f"{module}.weight": rng.normal(size=(out, in_)) for module, (in_, out) in MODULES.items()}
    found |= {f"{module}.bias": rng.normal(size=MODULES[module][1]) for module in BIASED}
    found |= {f"{module}.weight": rng.normal(size=4) for module in NORMS}
    return {name: array.astype(np.float32) for name, array in found.items()}


def stacked(found):
    """The same model with its layers stacked, as a scan has them."""
    rules = {
        r"layers/(\w+)/(\w+)/kernel": peft.HFName(r"model.layers.{l}.\1.\2.weight", "l i o -> o i"),
        r"layers/(\w+)/(\w+)/bias": peft.HFName(r"model.layers.{l}.\1.\2.bias", "l o -> o"),
        "layers/norm/scale": peft.HFName("model.layers.{l}.norm.weight", "l o -> o"),
        "norm/scale": "model.norm.weight",
        "head/kernel": peft.HFName("head.weight", "i o -> o i"),
    }
    layer = lambda name: jnp.stack([jnp.asarray(found[f"model.layers.{i}.{name}"].T) for i in range(LAYERS)])
    tree = {"layers": {"norm": {"scale": layer("norm.weight")}}, "norm": {"scale": jnp.asarray(found["model.norm.weight"])}}
    for block in SIZES:
        group, name = block.split(".")
        tree["layers"].setdefault(group, {})[name] = {"kernel": layer(f"{block}.weight")}
        if group == "attn":
            tree["layers"][group][name]["bias"] = layer(f"{block}.bias")
    tree["head"] = {"kernel": jnp.asarray(found["head.weight"].T)}
    return tree, peft.match(tree, rules)


def unrolled(found):
    """The same model with a kernel for each layer, in one flat dict."""
    tree, names = {}, {}
    for name, array in found.items():
        key = name.replace(".", "-")
        tree[key] = jnp.asarray(array.T)
        names[key] = peft.HFName(name, "i o -> o i" if array.ndim == 2 else "")
    return tree, names


def adapter(fields, found, rng):
    """The file's tensors, and the weights that they make of the base."""
    file, merged, normal = {}, dict(found), lambda *shape: rng.normal(size=shape).astype(np.float32)
    adapted = [module for module in MODULES if is_target(fields, module)]
    for module in adapted:
        (in_, out), rank = MODULES[module], by_pattern(fields["rank_pattern"], module, fields["r"])
        scale = by_pattern(fields["alpha_pattern"], module, fields["lora_alpha"])
        scale /= math.sqrt(rank) if fields["use_rslora"] else rank
        a, b = normal(rank, in_), normal(out, rank)
        weight = found[f"{module}.weight"].astype(np.float64) + scale * b.astype(np.float64) @ a
        file |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if fields["use_dora"]:
            magnitude = np.abs(normal(out)) + 0.5
            file[f"{module}.lora_magnitude_vector"] = magnitude
            weight = magnitude[:, None] * weight / np.linalg.norm(weight, axis=1, keepdims=True)
        merged[f"{module}.weight"] = weight
    trained = (
        [m for m in [*MODULES, *NORMS] if m.endswith(tuple(fields["modules_to_save"] or ()))]
        if fields["modules_to_save"]
        else []
    )
    for module in trained:
        merged[f"{module}.weight"] = file[f"{module}.weight"] = normal(*found[f"{module}.weight"].shape)
    biases = BIASED if fields["bias"] == "all" else [m for m in BIASED if m in adapted] if fields["bias"] == "lora_only" else []
    for module in biases:
        value = normal(*found[f"{module}.bias"].shape)
        merged[f"{module}.bias"] = value
        file[f"{module}.base_layer.bias" if module in adapted else f"{module}.bias"] = value
    return file, merged, bool(adapted)


@hypothesis.settings(max_examples=15)
@hypothesis.given(configurations(), st.integers(0, 2**32 - 1), st.booleans())
def test_some_random_adapters(fields, seed, scan):
    check_there_and_back(fields, seed, scan)


@pytest.mark.slow
@hypothesis.settings(max_examples=60)
@hypothesis.given(configurations(), st.integers(0, 2**32 - 1), st.booleans())
def test_random_adapters(fields, seed, scan):
    check_there_and_back(fields, seed, scan)


def check_there_and_back(fields, seed, scan):
    """An adapter file gives the weights that it says, and is written again byte for byte."""
    rng = np.random.default_rng(seed)
    found = base(rng)
    tree, names = stacked(found) if scan else unrolled(found)
    file, merged, any_adapted = adapter(fields, found, rng)
    hypothesis.assume(any_adapted)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        first.mkdir()
        save_file({f"base_model.model.{name}": array for name, array in file.items()}, first / "adapter_model.safetensors")
        (first / "adapter_config.json").write_text(json.dumps(fields))
        adapters = peft.load(first, tree, names=names)
        got = tensors(lj.merge(tree, adapters), names)
        for name, want in merged.items():
            np.testing.assert_allclose(got[name], want, rtol=2e-5, atol=2e-5, err_msg=name)
        config = lj.LoraConfig(
            rank=fields["r"], alpha=fields["lora_alpha"], scaling="rslora" if fields["use_rslora"] else "lora"
        )
        peft.save(second, adapters, names=names, config=config, variables=tree)
        again = load_file(second / "adapter_model.safetensors")
        assert all(again[f"base_model.model.{name}"].tobytes() == array.tobytes() for name, array in file.items())
        reloaded = peft.load(second, tree, names=names)
        back = tensors(lj.merge(tree, reloaded), names)
        assert all(back[name].tobytes() == got[name].tobytes() for name in got)

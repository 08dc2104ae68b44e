"""The reference cases that Hugging Face PEFT made (`tests/data/peft`), and the models that they belong to."""

import functools
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from lora_jax import peft
from lora_jax.core import paths
from lora_jax.models import bert, llama

DATA = pathlib.Path(__file__).parents[1] / "data" / "peft"
CASES = {file.parent.name: json.loads(file.read_text()) for file in sorted(DATA.glob("*/case.json"))}
KINDS = {
    "gpt2": {r".*\.w[tp]e\.weight": "embedding", r".*\.c_\w+\.weight": "conv1d"},
    "mixtral": {r".*\.experts\.\w+": "parameter", r".*embed_tokens\.weight": "embedding"},
    "mixtral-square": {r".*\.experts\.\w+": "parameter", r".*embed_tokens\.weight": "embedding"},
    "gpt-oss-square": {r".*\.experts\.\w+": "parameter_transposed", r".*embed_tokens\.weight": "embedding"},
    "vit": {r".*projection\.weight": "conv"},
    "plain": {"embed.weight": "embedding", r"(conv\d|grouped)\.weight": "conv"},
}
AXES = {
    ("linear", 2): "i o -> o i",
    ("conv", 3): "w i o -> o i w",
    ("conv", 4): "h w i o -> o i h w",
    ("parameter", 3): "e i o -> e o i",
}


def directory(case):
    return DATA / case


def settings(case):
    """What `load` needs beside the directory."""
    return {"adapter": CASES[case].get("adapter_name")}


def expected(case):
    return load_file(DATA / case / "expected.safetensors")


def inputs(case):
    found = load_file(DATA / CASES[case]["model"] / "inputs.safetensors")
    return {name: jnp.asarray(array) for name, array in found.items()}


@functools.cache
def model(name, flavour="unrolled"):
    """(variables, names, apply or None) of a base: through our own models where there is one."""
    base = DATA / name / "base"
    if name.startswith("llama"):
        loaded = llama.load(base, scan_layers=flavour == "scanned", tie=False if flavour == "untied" else None)
        return loaded.variables, loaded.names, loaded.apply
    if name == "bert":
        loaded = bert.load(base)
        return loaded.variables, loaded.names, loaded.apply
    return (*plain_tree(name, load_file(next(base.glob("*.safetensors")))), None)


def plain_tree(name, tensors):
    """A flat tree of kernels as JAX models have them, (in, out), from Hugging Face's tensors."""
    variables, names = {}, {}
    for tensor, array in tensors.items():
        key = tensor.replace(".", "-")
        kind = next((k for pattern, k in KINDS[name].items() if re.fullmatch(pattern, tensor)), "linear")
        axes = AXES.get((kind, array.ndim), "")
        order = int(tensor.endswith("down_proj"))  # registered after gate_up_proj
        names[key] = peft.HFName(tensor, axes, kind, order)
        variables[key] = jnp.asarray(names[key].restore(array, _shape(axes, array.shape)))
    return variables, names


def _shape(axes, shape):
    if not axes:
        return shape
    left, right = (side.split() for side in axes.split("->"))
    return tuple(shape[right.index(axis)] for axis in left)


def tensors(variables, names):
    """The parameters as Hugging Face's tensors."""
    leaves, _ = paths.flatten(variables)
    return {
        tensor: np.asarray(name.export(leaves[path], index))
        for path, name in names.items()
        for index, tensor in name.tensors(leaves[path].shape).items()
    }

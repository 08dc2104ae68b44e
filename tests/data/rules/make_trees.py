"""Check the ready rules on other libraries' models against transformers and PEFT, and write down their parameter trees.

The libraries don't fit into one environment, so there are three steps. WORK is a folder for what is in between:

    python make_trees.py torch WORK          # torch 2.13, transformers 5.24: tiny random models, their logits
    python make_trees.py jax WORK LIBRARY    # lora_jax and that library: a model filled by the rules, compared; an adapter saved
    python make_trees.py peft WORK LIBRARY   # torch, PEFT 0.21: what the adapter makes of transformers' model, compared

LIBRARY is one of the files `jax_*.py`, which name the versions. LIBRARY.json is then
{variant: {"model": the name in torch_models.py, "rules": the table, "tree": {path: shape}, "tensors": {Hugging Face's name: shape},
"error": largest difference of the logits, "adapted": the same with the adapter}}.
"""

import dataclasses
import importlib
import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
LENGTH = 9


def outputs(model, ids):
    """The logits; of a model without a head its vectors, and what is made of the first."""
    import torch

    first, *rest = model(ids).values()
    return first if "logits" in model(ids) else torch.cat([first, rest[0][:, None]], 1)


def make_torch(work):
    import safetensors.torch
    import torch
    import torch_models

    ids = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    for name, make in torch_models.MODELS.items():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(work / name)
        with torch.no_grad():
            tensors = {"input_ids": ids, "logits": outputs(model, ids)}
        safetensors.torch.save_file(tensors, work / name / "expected.safetensors")
        print(name, type(model).__name__)


def _known(names, path, shape, tensors):
    found = names[path].tensors(shape) if path in names else {}
    return {index: tensor for index, tensor in found.items() if tensor in tensors}


def table_of(word):
    """A table by its name, or by the call that makes it."""
    from lora_jax.peft import rules

    name, _, layers = word.rstrip(")").partition("(")
    return getattr(rules, name)(int(layers)) if layers else getattr(rules, name)


def fill(shapes, names, tensors, otherwise=None):
    """The parameter tree with a checkpoint's tensors; what isn't there (the pooler of a BERT that predicts words) is 0.

    otherwise: `(path, shape, tensors) -> array` for what has no name.
    """
    import jax

    from lora_jax.core import paths

    leaves, treedef = paths.flatten(shapes)
    for path, leaf in leaves.items():
        array = np.zeros(leaf.shape, np.float32)
        for index, tensor in _known(names, path, leaf.shape, tensors).items():
            picked = [slice(None)] * array.ndim
            for axis, i in zip(names[path].indexed, index):
                picked[axis] = i
            array[tuple(picked)] = names[path].restore(tensors[tensor], leaf.shape)
        leaves[path] = array if path in names else np.asarray(otherwise(path, leaf.shape, tensors), np.float32)
    return jax.tree_util.tree_unflatten(treedef, leaves.values())


def adapt(apply, params, names, tensors, ids, directory):
    """Random adapters on every kernel that is used, saved for PEFT; the adapted logits."""
    import jax

    import lora_jax as lj
    from lora_jax.core import paths

    leaves = paths.flatten(params)[0]
    kernel = lambda path: len(names[path].groups(leaves[path].ndim)) > 1 and "experts" not in names[path].name
    known = lambda path: _known(names, path, leaves[path].shape, tensors)
    targets = [path for path in names if kernel(path) and names[path].kind == "linear" and known(path)]
    config = lj.LoraConfig(rank=2, alpha=3, targets=targets)
    adapters = lj.init(jax.random.key(1), config, apply, params, ids)
    noise = lambda i, b: 0.3 * jax.random.normal(jax.random.key(i), b.shape)
    adapters = {path: dataclasses.replace(a, b=noise(i, a.b)) for i, (path, a) in enumerate(adapters.items())}
    lj.peft.save(directory, adapters, names=names, config=config, base_model=None)
    return np.asarray(lj.lora(apply)(lj.attach(params, adapters), ids), np.float32), len(adapters)


def make_jax(work, library):
    import safetensors.numpy

    from lora_jax.core import paths
    from lora_jax.peft import match

    found = {}
    for variant, (model, table, make) in importlib.import_module(f"jax_{library}").MODELS.items():
        tensors = safetensors.numpy.load_file(work / model / "model.safetensors")
        expected = safetensors.numpy.load_file(work / model / "expected.safetensors")
        apply, shapes, *otherwise = make()
        names = match(shapes, table_of(table))
        params = fill(shapes, names, tensors, *otherwise)
        logits = np.asarray(apply(params, expected["input_ids"]), np.float32)
        error = float(np.abs(logits - expected["logits"]).max())
        folder = work / "adapters" / library / variant
        adapted, count = adapt(apply, params, names, tensors, expected["input_ids"], folder)
        np.save(folder / "logits.npy", adapted)
        largest = np.abs(expected["logits"]).max()
        print(f"{variant}: logits of size {largest:.3g} differ by {error:.3g}; {count} adapters", flush=True)
        found[variant] = {
            "model": model,
            "rules": table,
            "tree": {path: leaf.shape for path, leaf in paths.flatten(shapes)[0].items()},
            "tensors": {tensor: value.shape for tensor, value in tensors.items()},
            "error": error,
        }
    (HERE / f"{library}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


def make_peft(work, library):
    import peft
    import torch
    import torch_models

    file = HERE / f"{library}.json"
    found = json.loads(file.read_text())
    for variant, recorded in found.items():
        base = work / recorded["model"]
        model = type(torch_models.MODELS[recorded["model"]]()).from_pretrained(base).eval()
        expected = np.load(work / "adapters" / library / variant / "logits.npy")
        ids = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            before = outputs(model, ids).numpy()
            model = peft.PeftModel.from_pretrained(model, work / "adapters" / library / variant)
            after = outputs(model, ids).numpy()
        recorded["adapted"] = float(np.abs(after - expected).max())
        moved = float(np.abs(after - before).max())
        print(f"{variant}: adapted logits differ by {recorded['adapted']:.3g}; the adapter moves them by {moved:.3g}")
    file.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    step, work, *library = sys.argv[1:]
    {"torch": make_torch, "jax": make_jax, "peft": make_peft}[step](pathlib.Path(work), *library)

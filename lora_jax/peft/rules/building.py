"""What the tables are made of."""

import dataclasses
import re
from collections.abc import Mapping

from lora_jax.huggingface.names import HFName, Kind

Rules = dict[str, HFName | None]
Entries = dict[str, HFName]  # "#", in a path and in its name, is the layer's number


def vector(path: str, name: str) -> Entries:
    return {path: HFName(name, "d -> d")}


def embedding(path: str, name: str, tied: str = "") -> Entries:
    return {path: HFName(name, "v d -> v d", "embedding", tied=tied)}


def dense(path: str, name: str = "", axes: str = "i o -> o i", kind: Kind = "linear") -> Entries:
    """A kernel, and the bias it may have. The name is as the path where it isn't given."""
    name = name or path.replace("/", ".")
    return {f"{path}/kernel": HFName(f"{name}.weight", axes, kind), **vector(f"{path}/bias", f"{name}.bias")}


def norm(path: str, name: str = "") -> Entries:
    name = name or path.replace("/", ".")
    return vector(f"{path}/scale", f"{name}.weight") | vector(f"{path}/bias", f"{name}.bias")


def nowhere(*paths: str) -> Rules:
    """Rules for parameters that have no name there."""
    return {f"(?:params/)?{path}": None for path in paths}


def table(*parts: Mapping[str, HFName], root: str = "", stack: int = 0) -> Rules:
    """Entries as rules, for each layer by its number and for all of them stacked.

    Args:
      root: the outermost module, here and there.
      stack: the axis of the layers where they are stacked.
    """
    rules: Rules = {}
    for path, entry in ((path, entry) for part in parts for path, entry in part.items()):
        name = f"{root}.{entry.name}" if root else entry.name
        path = f"(?:params/)?{root}/{path}" if root else f"(?:params/)?{path}"
        rules[path.replace("#", r"(\d+)")] = dataclasses.replace(entry, name=name.replace("#", r"\1"))
        if "#" in path:
            axes = entry.axes.split()
            axes.insert(stack, "l")
            rules[re.sub("[/_]#", "", path)] = dataclasses.replace(entry, name=name.replace("#", "{l}"), axes=" ".join(axes))
    return rules

"""What a compiler said of a program, kept for the next time that it is asked."""

import dataclasses
import hashlib
import importlib.metadata
import json
from typing import Any

from lora_jax.core import files
from lora_jax.data.fetch import cache_directory
from lora_jax.planning import collectives, topology

_FORMAT = 1  # another number where `topology.Compiled` means something else


def compile_for(target: topology.Topology, traced: Any) -> topology.Compiled:
    """`topology.compile_for`, or what it said of the same program before, by the same versions."""
    file = cache_directory() / "plans" / f"{_digest(target, traced)}.json"
    if file.is_file():
        return _read(json.loads(file.read_text(encoding="utf-8")))
    found = topology.compile_for(target, traced)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps(dataclasses.asdict(found)).encode())
    return found


def _digest(target: topology.Topology, traced: Any) -> str:
    """Of the program, the chips, and what compiles it."""
    digest = hashlib.sha256(traced.lower().as_text().encode())
    for name in ("lora-jax", "jax", "jaxlib", "libtpu"):
        digest.update(f"{name} {_version(name)} ".encode())
    digest.update(f"{target.name} {target.chip} {_FORMAT}".encode())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(fields: dict[str, Any]) -> topology.Compiled:
    traffic = fields["traffic"]
    if traffic is not None:
        kinds = {kind: collectives.Collective(**moved) for kind, moved in traffic["kinds"].items()}
        traffic = collectives.Traffic(kinds, traffic["unknown_loops"])
    return topology.Compiled(**{**fields, "traffic": traffic})

"""What the train steps of large models need and move on a pod, by the TPU compiler, on a machine without one.

    pip install libtpu
    python -m tests.benchmarks.pod [CASE ...]              # adds to tests/benchmarks/results/pod.json

`compute_seconds` are from the compiler's own estimate of each operation, in loops once for each iteration; what moves between chips
is not in them. `share_of_peak` is the FLOPs of all matrix products, those that are computed again included, over what the chips
could do in that time.
"""

import datetime
import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import jax

from lora_jax.planning import plan, topology

RESULTS = pathlib.Path(__file__).parent / "results" / "pod.json"

_8B = {"model": "llama-3-8b", "topology": "v5p:1x1x1"}
_8B_v5e = {"model": "llama-3-8b", "topology": "v5e:2x2", "mesh": {"fsdp": 4}, "batch": 4, "sequence": 512}
_70B = {"model": "llama-3-70b", "topology": "v5p:4x4x4", "mesh": {"fsdp": 16, "model": 4}}
CASES: dict[str, dict[str, Any]] = {
    "8b_v5p": _8B | {"compare": ["full"]},
    "8b_v5p_products": _8B | {"remat": "products"},
    "8b_v5p_none": _8B | {"remat": "none"},
    "8b_v5p_8": _8B | {"topology": "v5p:2x2x2", "mesh": {"fsdp": 8}},
    "8b_v5e_nf4": _8B | {"topology": "v5e:1x1", "quantize": "nf4"},
    "8b_v5e_4": _8B_v5e | {"compare": ["full"]},
    "8b_v5e_4_products": _8B_v5e | {"remat": "products"},
    "8b_v5e_4_nf4": _8B_v5e | {"quantize": "nf4"},
    "70b_v5p_64": _70B,
    "70b_v5p_64_nf4": _70B | {"quantize": "nf4"},
}


def figures(request: plan.Request, step: plan.StepPlan) -> dict[str, Any]:
    """Those of one step of a plan."""
    target = topology.read(request.topology)
    assert step.step_seconds is not None and target.speed is not None
    gib = lambda count: None if count is None else round(count / 2**30, 3)
    return {
        "model": request.model, "quantize": request.quantize, "remat": request.remat, "topology": request.topology,
        "mesh": request.axes(), "batch": request.rows(), "sequence": request.sequence,
        "argument_gib": gib(step.argument_bytes), "temporary_gib": gib(step.temporary_bytes),
        "peak_gib": gib(step.peak_bytes_per_chip), "fits": step.fits, "tflop": round(step.flops / 1e12, 2),
        "compute_seconds": round(step.step_seconds, 4),
        "share_of_peak": round(step.flops / target.count / step.step_seconds / target.speed.flops, 3),
        "moved_gib": {kind: gib(moved.bytes) for kind, moved in (step.collectives or {}).items()},
        "jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu"), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main(names: list[str]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or CASES:
        request = plan.Request(**CASES[name])
        for step in plan.make(request).steps:
            found[f"{name} {step.step}"] = figures(request, step)
            print(name, json.dumps(found[f"{name} {step.step}"]), flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

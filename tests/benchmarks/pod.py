"""What the train steps of large models need and move on a pod, by the TPU compiler, on a machine without one.

    pip install libtpu
    python -m tests.benchmarks.pod [CASE ...]              # adds to tests/benchmarks/results/pod.json

`cycles` are the compiler's own estimates of what each instruction computes, in loops once for each iteration; the collectives
between chips are not in them. `share_of_peak` is the FLOPs of all matrix products over what a chip could do in that time.
"""

import datetime
import json
import pathlib
import re
import sys
from typing import Any

import jax
import libtpu

from lora_jax.planning import collectives, plan, topology, train_steps
from lora_jax.planning.flops import dot_flops

RESULTS = pathlib.Path(__file__).parent / "results" / "pod.json"
PEAK = {"v5e": 197e12, "v5p": 459e12}  # bfloat16 FLOPs a second of a chip, by its data sheet
CLOCK = {"v5e": PEAK["v5e"] / 2**17, "v5p": PEAK["v5p"] / 2**18}  # Hz: a chip's 4 or 8 units of 128 x 128 multiply and add

_8B = {"model": "llama-3-8b", "topology": "v5e:2x2", "batch": 4, "sequence": 512}
_70B = {"model": "llama-3-70b", "topology": "v5p:4x4x4", "mesh": {"fsdp": 16, "model": 4}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b_v5e_2x2": ("lora", _8B),
    "8b_v5e_2x2_full": ("full", _8B),
    "8b_v5e_2x2_nf4": ("lora", _8B | {"quantize": "nf4"}),
    "70b_v5p_64": ("lora", _70B),
    "70b_v5p_64_nf4": ("lora", _70B | {"quantize": "nf4"}),
    "8b_v5p_1": ("lora", {"model": "llama-3-8b"}),
    "8b_v5p_8": ("lora", {"model": "llama-3-8b", "topology": "v5p:2x2x2"}),
    "8b_v5e_1_nf4": ("lora", {"model": "llama-3-8b", "topology": "v5e:1x1", "quantize": "nf4"}),
}


def cycles(hlo: str) -> int:
    """The cycles of a compiled program, as its compiler estimates them."""
    computations, entry = collectives._parse(hlo)

    def of(name: str) -> int:
        total = 0
        for line in computations[name].values():
            if line.opcode == "while":
                total += (collectives._trips(computations, computations[name], line) or 1) * of(
                    collectives._find(r"body=%?([\w.\-]+)", line)
                )
            elif found := re.search(r'"estimated_cycles":"(\d+)"', line.text):
                total += int(found[1])
        return total

    return of(entry)


def figures(name: str) -> dict[str, Any]:
    """Those of one case."""
    step_name, asked = CASES[name]
    request = plan.Request(**asked)
    target = topology.read(request.topology)
    setup = plan._setup(request, plan._config(request.model), topology.devices(target))
    step = train_steps.STEPS[step_name](setup)
    traced = step.jitted.trace(*step.args)
    compiled = traced.lower().compile()
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    kind = request.topology.partition(":")[0]
    seconds, flops = cycles(hlo) / CLOCK[kind], dot_flops(traced.jaxpr)
    return {
        "step": step_name, **asked, "batch": request.rows(), "sequence": request.sequence,
        "argument_gib": memory.argument_size_in_bytes / 2**30, "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "peak_gib": memory.peak_memory_in_bytes / 2**30, "tflop": flops / 1e12, "compute_seconds": seconds,
        "share_of_peak": flops / target.count / seconds / PEAK[kind],
        "moved_gib": {kind: moved.bytes / 2**30 for kind, moved in collectives.read(hlo).kinds.items()},
        "jax": jax.__version__, "libtpu": libtpu.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def main(names: list[str]) -> None:
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or CASES:
        found[name] = figures(name)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Host memory of loading a decoder and quantising it on the way, each time in a process of its own. Linux only.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.quantized_loading [MODEL]

MODEL is a Hugging Face directory or a .gguf file; without it, the pinned SmolLM2. The figures are resident memory in MiB.
`imports`: jax, flax, qwix, gguf and the loader are imported. `started`: and JAX has computed something once, for which XLA's
code comes into memory, as it does in any process that uses JAX. `peak`: the highest of the process until the model is there.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

MIB = 2**20
COLUMNS = (
    "kind",
    "dtype",
    "form",
    "imports",
    "started",
    "peak",
    "model",
    "kernel",
    "embedding",
    "over imports",
    "over started",
)


def resident(field: str) -> float:
    """MiB of this process: `VmRSS` now, or `VmHWM` at most."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def measure(source: str, kind: str, dtype: str, form: str) -> dict[str, object]:
    """The figures of one way to load; `kernel` and `embedding` are the largest dense arrays of their kind."""
    import gguf  # noqa: F401
    import jax
    import jax.numpy as jnp
    import qwix  # noqa: F401

    from lora_jax.adapters.summary import summary
    from lora_jax.core import paths
    from lora_jax.models import llama

    imports = resident("VmRSS")
    jax.block_until_ready(jnp.ones(3) + 1)
    started = resident("VmRSS")
    quantize = None if kind == "dense" else kind
    loaded = llama.load(source, dtype=jnp.dtype(dtype), scan_layers=form == "stacked", quantize=quantize)
    jax.block_until_ready(loaded.variables)
    peak, item = resident("VmHWM"), jnp.dtype(dtype).itemsize
    leaves, _ = paths.flatten(loaded.variables)
    largest = lambda name: max(
        leaf.size if hasattr(leaf, "size") else leaf.qvalue.size for path, leaf in leaves.items() if name in path
    )
    model = summary(loaded.variables, {}).parameter_bytes / MIB
    figures = (imports, started, peak, model, largest("/layer") * item / MIB, largest("embed_tokens") * item / MIB)
    return dict(zip(COLUMNS, (kind, dtype, form, *figures, (peak - imports) / model, (peak - started) / model)))


def rows(source: str) -> Iterator[dict[str, object]]:
    """The figures of each way, from processes that do nothing else."""
    for form in ("unrolled", "stacked"):
        for dtype in ("bfloat16", "float32"):
            for kind in ("dense", "nf4", "int8"):
                command = [sys.executable, "-m", "tests.benchmarks.quantized_loading", source, kind, dtype, form]
                yield json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        print(json.dumps(measure(*arguments)))
        return
    from lora_jax.command.options import RunConfig
    from lora_jax.command.tasks import lm

    source = arguments[0] if arguments else str(lm.base_directory(RunConfig(task="lm")))
    print("  ".join(f"{name:>12}" for name in COLUMNS))
    for row in rows(source):
        cells = (value if isinstance(value, str) else f"{value:.2f}" for value in row.values())
        print("  ".join(f"{cell:>12}" for cell in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Ahead-of-time compilation of the train step for TPUs and CUDA GPUs, on a machine that has neither.

    pip install libtpu
    python tests/benchmarks/tpu_compile.py                      # v5e:2x2 and v5p:1x1x1, all flavours

Exports the decoder's train step for `tpu` and `cuda` through `jax.export`, then compiles it with the TPU compiler, for one
chip and, with the batch split over the chips, for all of a topology. Prints bytes and FLOPs as the compiler counts them
(a scan's body once).
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

# The compiler needs no TPU, but asks where it is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # so that it runs as a script, too

from tests.benchmarks import decoder, variants


def shapes(tree: Any, sharding: Any = None) -> Any:
    """The shapes of a tree's arrays, laid out as the sharding says."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def export(variant: Any) -> str:
    """Lower for other platforms, serialise, and read it back."""
    exported = jax.export.export(variant.step, platforms=("tpu", "cuda"))(*shapes(variant.args))
    return f"exported for {' and '.join(exported.platforms)}: {len(exported.mlir_module_serialized) / 2**10:.0f} KiB"


def compile_for(topology: Any, variant: Any, devices: int) -> str:
    """Compile for the first chips of a topology, the batch (the last argument) split over them."""
    mesh = Mesh(topology.devices[:devices], ("data",))
    *state, batch = variant.args
    args = [shapes(tree, NamedSharding(mesh, PartitionSpec())) for tree in state]
    args.append(shapes(batch, NamedSharding(mesh, PartitionSpec("data"))))
    start = time.perf_counter()
    compiled = variant.step.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory, flops = compiled.memory_analysis(), compiled.cost_analysis()["flops"]
    return (
        f"{devices} x {topology.devices[0].device_kind}: arguments {memory.argument_size_in_bytes / 2**20:.1f} MiB, "
        f"aliased {memory.alias_size_in_bytes / 2**20:.1f} MiB, temporaries {memory.temp_size_in_bytes / 2**20:.1f} MiB, "
        f"{flops / 1e9:.2f} GFLOP, compiled in {seconds:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:1x1x1"])
    parser.add_argument("--flavours", nargs="+", default=["unrolled", "remat", "scan"])
    parser.add_argument("--only", default="ours", help="only the variants with this in their name")
    options = parser.parse_args(arguments)
    found = {name: topologies.get_topology_desc(platform="tpu", topology_name=name) for name in options.topologies}
    for flavour in options.flavours:
        for variant in variants.all_variants(decoder.Sizes(), flavour):
            if options.only in variant.name:
                print(f"{flavour}, {variant.name}: {export(variant)}", flush=True)
                for topology in found.values():
                    for devices in sorted({1, len(topology.devices)}):
                        print(f"  {compile_for(topology, variant, devices)}", flush=True)


if __name__ == "__main__":
    main()

"""Does it pay to multiply one input by the A's of several kernels at once? Measured on the layers that `lora` would group.

    pip install libtpu
    python tests/benchmarks/shared_inputs.py                    # a CPU's wall time, and the TPU compiler's figures

The query, key and value kernels of a layer multiply one x, and so do gate and up. Three forms of their low-rank terms:

    separate      (x A_q) B_q, (x A_k) B_k, (x A_v) B_v: what `lora` does
    shared in     u = x [A_q | A_k | A_v], then the part of u that is each kernel's times its own B
    shared both   the same u times a matrix with B_q, B_k and B_v along its diagonal, cut into parts
    none          no low-rank terms: what no form can go below

All with their base products, forward and backward, gradients of x, A and B.
"""

import argparse
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # so that it runs as a script, too

from lora_jax.planning import flops, topology
from tests.benchmarks import measure

FORMS = ("separate", "shared in", "shared both", "none")
# tokens, width, and the outputs of each group of kernels: the decoder of the other benchmarks, and a layer of Llama-3-8B.
SIZES = {
    "decoder": (1024, 512, ((512, 512, 512), (1536, 1536))),
    "llama-3-8b": (2048, 4096, ((4096, 1024, 1024), (14336, 14336))),
}


def terms(form: str, x: jax.Array, pairs: list[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """The low-rank terms of the kernels that multiply x."""
    if form == "none":
        return [jnp.zeros((), x.dtype) for _ in pairs]
    if form == "separate":
        return [(x @ a) @ b for a, b in pairs]
    ends = np.cumsum([a.shape[1] for a, _ in pairs])[:-1].tolist()
    u = x @ jnp.concatenate([a for a, _ in pairs], axis=1)
    if form == "shared in":
        return [part @ b for part, (_, b) in zip(jnp.split(u, ends, axis=1), pairs)]
    both = jax.scipy.linalg.block_diag(*(b for _, b in pairs))
    return jnp.split(u @ both, np.cumsum([b.shape[1] for _, b in pairs])[:-1].tolist(), axis=1)


def step(form: str, kernels: Any, pairs: Any, x: jax.Array) -> Any:
    """The value and the gradients of x and of the pairs."""

    def loss(pairs: Any, x: jax.Array) -> jax.Array:
        outputs = [
            x @ kernel + 2.0 * term for group, own in zip(kernels, pairs) for kernel, term in zip(group, terms(form, x, own))
        ]
        return sum(jnp.mean(jnp.square(y.astype(jnp.float32))) for y in outputs)

    return jax.value_and_grad(loss, argnums=(0, 1))(pairs, x)


def arguments(size: str, rank: int, dtype: Any) -> tuple[Any, ...]:
    """Kernels, pairs and x of a size."""
    tokens, width, groups = SIZES[size]
    keys = iter(jax.random.split(jax.random.key(0), 64))
    draw = lambda *shape: (jax.random.normal(next(keys), shape) / shape[0] ** 0.5).astype(dtype)
    kernels = [[draw(width, out) for out in group] for group in groups]
    pairs = [[(draw(width, rank), draw(rank, out)) for out in group] for group in groups]
    return kernels, pairs, draw(tokens, width)


def on_cpu(rank: int, rounds: int) -> None:
    """Wall times in turns, and how far the results are apart."""
    args = arguments("decoder", rank, jnp.float32)
    same = lambda args, results: args
    found = [measure.Variant(form, jax.jit(step, static_argnums=0).lower(form, *args).compile(), args, same) for form in FORMS]
    times = measure.wall_times(found, [variant.step for variant in found], rounds)
    first = jax.tree.leaves(found[0].step(*args))
    for variant, seconds in zip(found, times):
        apart = (
            0.0
            if variant.name == "none"
            else max(
                float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in zip(jax.tree.leaves(variant.step(*args)), first)
            )
        )
        ratio = measure.median_ratio(seconds, times[0])
        print(
            f"cpu, decoder, rank {rank}, {variant.name}: step / separate {ratio:.3f}, results apart by {apart:.1e}", flush=True
        )


def on_tpu(name: str, size: str, rank: int) -> None:
    """What the TPU compiler says of each form."""
    chip = topology.first_chip(name)
    shapes = jax.eval_shape(lambda: arguments(size, rank, jnp.bfloat16))
    for form in FORMS:
        traced = jax.jit(step, static_argnums=0).trace(form, *topology.place(chip, shapes))
        compiled = traced.lower().compile()
        cost = compiled.cost_analysis()
        seconds = cost["optimal_seconds"]
        print(
            f"{name}, {size}, rank {rank}, {form}: {f'{1e6 * seconds:.1f}' if seconds > 0 else '?'} us, "
            f"{cost['bytes accessed'] / 2**20:.1f} MiB accessed, {cost['flops'] / 1e9:.2f} GFLOP, "
            f"{flops.dot_flops(traced.jaxpr) / 1e9:.2f} GFLOP in the jaxpr, "
            f"temporaries {compiled.memory_analysis().temp_size_in_bytes / 2**20:.1f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--topologies", nargs="*", default=["v5e:2x2", "v5p:1x1x1"])
    options = parser.parse_args()
    for rank in options.ranks:
        on_cpu(rank, options.rounds)
        for name in options.topologies:
            on_tpu(name, "llama-3-8b", rank)


if __name__ == "__main__":
    main()

"""What float32 branches beside a bfloat16 base change: losses and seconds of SmolLM2, trained on movie reviews.

    JAX_PLATFORMS=cpu python -m tests.benchmarks.branch_dtype [STEPS] > tests/benchmarks/results/branch_dtype.json

The variants take the same batches, one step each in turn, every other time in the opposite order.
"""

import json
import platform
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lj
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import lm
from tests.benchmarks.measure import Variant, median_ratio, wall_times

BRANCHES = (None, "float32")
ROWS, LENGTH, HELD_OUT = 2, 64, 16


def token_ids(tokenizer: Any, texts: Sequence[str], count: int) -> np.ndarray:
    """`(count, LENGTH)` ids of texts, end to end."""
    ids = [i for encoding in tokenizer.encode_batch(list(texts)) for i in encoding.ids]
    return np.array(ids[: count * LENGTH], np.int32).reshape(count, LENGTH)


def main(steps: int) -> None:
    config = RunConfig(task="lm", dtype="bfloat16")
    base = lm.load_base(lm.base_directory(config), config)
    model, ids = base.model, token_ids(base.tokenizer.tokenizer, lm.load_corpora(config)[0].items, steps * ROWS + HELD_OUT)
    training, held_out = ids[HELD_OUT:].reshape(steps, ROWS, LENGTH), jnp.asarray(ids[:HELD_OUT])

    def loss_fn(params: Any, ids: Any, key: Any) -> Any:
        logits = lj.lora(model.apply)(params, ids)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    tx = optax.adamw(1e-3)
    evaluate = jax.jit(lambda adapters: loss_fn(lj.attach(model.variables, adapters), held_out, None))
    losses: dict[str, list[float]] = {str(branch): [] for branch in BRANCHES}
    variants = []
    for branch in BRANCHES:
        lora = lj.LoraConfig(rank=16, alpha=32, branch_dtype=branch)
        adapters = lj.init(jax.random.key(0), lora, model.apply, model.variables, held_out)
        state = lj.train.init_state(adapters, tx, key=jax.random.key(1))
        step = lj.train.make_train_step(loss_fn, tx)

        def advance(args: Any, result: Any, seen: list[float] = losses[str(branch)]) -> Any:
            seen.append(float(result[1]["loss"]))
            return result[0], args[1], training[len(seen) % steps]

        variants.append(Variant(str(branch), step, (state, model.variables, training[0]), advance))
    start = float(evaluate(variants[0].args[0].adapters))
    seconds = wall_times(variants, [variant.step for variant in variants], steps - 1)
    figures = {
        variant.name: {
            "loss_of_the_last_10_steps": statistics.mean(losses[variant.name][-10:]),
            "held_out_loss": float(evaluate(variant.args[0].adapters)),
            "seconds_per_step": statistics.median(times),
        }
        for variant, times in zip(variants, seconds)
    }
    report = {
        "model": "SmolLM2-135M-Instruct, bfloat16", "steps": steps, "batch": [ROWS, LENGTH], "rank": 16, "jax": jax.__version__,
        "platform": f"{jax.devices()[0].platform} ({platform.machine()})", "held_out_loss_before": start,
        "branch_dtype": figures, "time_of_float32_to_none": median_ratio(seconds[1], seconds[0]),
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)

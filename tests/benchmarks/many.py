"""Many adapter sets in one program, next to one set at a time: rows with a set each, and a sweep of 16 runs.

    python tests/benchmarks/many.py          # some ten minutes on 2 cores
    python tests/benchmarks/many.py --rows   # or --sweep: one of the two parts

Rows: a batch of 32 rows of 128 tokens over 16 sets of ranks 1 to 8 and different alphas, some rows without a set, through the
benchmarks' decoder; compared with the same batch with one set of rank 8.

Sweep: 16 runs (4 ranks, 2 learning rates, 2 seeds with data of their own) of 20 AdamW steps, as one program and one after the
other. Both begin with adapters and batches in memory and end with the last step done; tracing and compilation are included,
and each separate run traces and compiles its own step, as it does where it is a process of its own.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # so that it runs as a script, too

import lora_jax as lj
from tests.benchmarks import decoder, measure

RANKS, RATES, SEEDS, STEPS = (1, 2, 4, 8), (1e-4, 3e-4), (0, 1), 20
OPTIONS = [(rank, rate, seed) for rank in RANKS for rate in RATES for seed in SEEDS]
HIGHEST = max(RANKS)


def adapter_set(model: Any, variables: Any, rank: int, alpha: float, seed: int, change: float = 0.0) -> dict[str, lj.Adapter]:
    """The adapters that a run begins with; with a `change`, ones that were trained: B is random of this size."""
    config = lj.LoraConfig(rank=rank, alpha=alpha, targets=list(decoder.TARGETS))
    adapters: Any = lj.init(jax.random.key(seed), config, model.apply, variables, jnp.zeros((1, 4), jnp.int32))
    if not change:
        return adapters
    drawn = lambda path, b: change * jax.random.normal(jax.random.key(len(path) + seed), b.shape)
    return {path: dataclasses.replace(pair, b=drawn(path, pair.b)) for path, pair in adapters.items()}


def trained_sets(model: Any, variables: Any, count: int, first: int = 0) -> list[dict[str, lj.Adapter]]:
    """Sets of different ranks and alphas."""
    numbers = range(first, first + count)
    return [adapter_set(model, variables, RANKS[(i + first) % 4], 4.0 + i, i, change=0.02) for i in numbers]


def exchangeable(sets: list[dict[str, lj.Adapter]]) -> dict[str, lj.Adapter]:
    """The sets stacked so that any others of rank 8 or less can take their place in a compiled program."""
    return lj.many.stack([lj.algebra.pad_rank(lj.algebra.fold_scale(one), HIGHEST) for one in sets])


@dataclasses.dataclass
class Rows:
    """The figures of the batch of rows; ratios to the same batch with one set."""

    dot_flops: float
    xla_flops: float
    temporaries: float
    difference: float
    compiled_by_swaps: int
    seconds: float
    seconds_of_one: float


def compare_rows(sizes: decoder.Sizes, sets: int = 16, timed: int = 0) -> Rows:
    """A batch whose rows have one of several sets, or none."""
    model, tokens = decoder.plain(sizes), decoder.batch(sizes)[:, :-1]
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:1])
    given = trained_sets(model, variables, sets)
    index = jnp.array([(7 * i) % (sets + 1) - 1 for i in range(sizes.batch)])
    many, one = jax.jit(lj.many.lora(model.apply)), jax.jit(lj.lora(model.apply))
    args = variables, exchangeable(given), index, tokens
    single = lj.attach(variables, given[RANKS.index(HIGHEST)]), tokens
    traced, traced_one = many.trace(*args), one.trace(*single)
    compiled, compiled_one = traced.lower().compile(), traced_one.lower().compile()
    flops = lambda c: c.cost_analysis()["flops"]
    temporaries = lambda c: c.memory_analysis().temp_size_in_bytes
    result = many(*args)
    apply, differences = jax.jit(model.apply), []
    for row, number in enumerate(index.tolist()):
        alone = variables if number < 0 else lj.merge(variables, given[number])
        differences.append(jnp.abs(result[row] - apply(alone, tokens[row : row + 1])[0]).max())
    swapped = variables, exchangeable(trained_sets(model, variables, sets, first=1)), index[::-1], tokens
    swap = measure.Variant("swap", many, args, lambda args, _: swapped)
    return Rows(
        measure.dot_flops(traced.jaxpr) / measure.dot_flops(traced_one.jaxpr),
        flops(compiled) / flops(compiled_one),
        temporaries(compiled) / temporaries(compiled_one),
        float(jnp.stack(differences).max()),
        measure.traces_and_compiles(swap, steps=3)[1] - 1,
        _seconds(many, args, timed),
        _seconds(one, single, timed),
    )


def _seconds(fn: Any, args: Any, times: int) -> float:
    """The median of some calls, after one that is left out."""
    found = []
    for _ in range(times + 1 if times else 0):
        began = time.perf_counter()
        jax.block_until_ready(fn(*args))
        found.append(time.perf_counter() - began)
    return float(np.median(found[1:])) if found else float("nan")


@dataclasses.dataclass
class Sweep:
    """The figures of a sweep, next to its runs one after the other.

    `distance` is the largest ||ours - separate|| / ||separate|| of a set. `rounding` is what it is for the same set between its
    separate run and one whose batches have their rows in another order, which only rounds in another way: Adam divides each
    gradient by its own size, and so magnifies the rounding of those near zero.
    """

    distance: float
    rounding: float
    compilations: int
    seconds: float
    seconds_of_separate: float
    temporaries: float


def compare_sweep(sizes: decoder.Sizes, options: Sequence[tuple[int, float, int]] = OPTIONS, steps: int = STEPS) -> Sweep:
    """Runs that differ in rank, learning rate and seed."""
    model = decoder.plain(sizes)
    variables = jax.jit(model.init)(jax.random.key(0), decoder.batch(sizes)[:1, :-1])
    sets = [adapter_set(model, variables, rank, 2.0 * HIGHEST, seed) for rank, _, seed in options]
    shape = (steps, sizes.batch, sizes.length + 1)
    data = {seed: jax.random.randint(jax.random.key(seed), shape, 0, sizes.vocabulary) for *_, seed in options}
    batches = [jnp.stack([data[seed][step] for *_, seed in options]) for step in range(steps)]
    apply, keys = lj.lora(model.apply), jax.vmap(jax.random.key)(jnp.array([seed for *_, seed in options]))
    loss = lambda params, tokens, key: decoder.loss(apply, params, tokens)
    rates = {"learning_rate": jnp.array([rate for _, rate, _ in options])}
    jax.block_until_ready((variables, sets, batches))

    def together() -> Any:
        states = lj.many.init_states(sets, optax.adamw, rates, keys=keys)
        step = lj.many.make_train_step(loss, optax.adamw, rates, batch_axis=0)
        for batch in batches:
            states, _ = step(states, variables, batch)
        return jax.block_until_ready(states.adapters), step

    def alone(number: int, order: int = 1) -> Any:
        tx, seed = optax.adamw(options[number][1]), options[number][2]
        state = lj.train.init_state(sets[number], tx, key=keys[number])
        step = lj.train.make_train_step(loss, tx)
        for batch in data[seed][:, ::order]:
            state, _ = step(state, variables, batch)
        return jax.block_until_ready(state.adapters), step

    began = time.perf_counter()
    stacked, step = together()
    middle = time.perf_counter()
    separate = [alone(number) for number in range(len(sets))]
    ended = time.perf_counter()
    ours = lj.many.unstack(stacked, like=sets)
    relative = lambda x, y: float(optax.tree.norm(jax.tree.map(jnp.subtract, x, y)) / optax.tree.norm(y))
    distances = [relative(mine, other) for mine, (other, _) in zip(ours, separate)]
    worst = distances.index(max(distances))
    states = lj.many.init_states(sets, optax.adamw, rates, keys=keys)
    state = lj.train.init_state(sets[-1], optax.adamw(1e-3), key=keys[0])
    temporaries = [
        step.lower(*args).compile().memory_analysis().temp_size_in_bytes
        for step, *args in ((step, states, variables, batches[0]), (separate[-1][1], state, variables, batches[0][0]))
    ]
    return Sweep(
        distances[worst],
        relative(alone(worst, -1)[0], separate[worst][0]),
        step._cache_size(),
        middle - began,
        ended - middle,
        temporaries[0] / temporaries[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each run's batch of 2 in a step of the sweep")
    chosen = parser.parse_args()
    if chosen.rows or not chosen.sweep:
        print(compare_rows(decoder.Sizes(batch=32, length=128), timed=3))
    if chosen.sweep or not chosen.rows:
        found = compare_sweep(decoder.Sizes(batch=2, length=chosen.tokens))
        print(found, f"separate / together: {found.seconds_of_separate / found.seconds:.2f}")


if __name__ == "__main__":
    main()

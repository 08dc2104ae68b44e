"""A LoRA step of real models beside full fine-tuning of the same kernels and PyTorch with PEFT, in turns on one machine.

    python -m venv torch && torch/bin/pip install torch peft "transformers<5"
    python -m tests.benchmarks.peers --torch torch/bin/python     # writes tests/benchmarks/results/peers.json and .png

Each peer is a process of its own, with the same weights, adapters and batch, that takes a step when it is told to and sleeps
otherwise. A round is a step of each, every other time backwards. The losses of the first steps must agree before anything is timed.
Without `--torch`, that peer is left out.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import safetensors.numpy
from matplotlib.patches import Patch

import lora_jax as lj
from lora_jax.command import hf_export
from lora_jax.core import paths
from lora_jax.data import fetch
from lora_jax.models import bert, llama
from tests.benchmarks import variants

RESULTS = pathlib.Path(__file__).parent / "results"
OURS, FULL, TORCH = "lora_jax", "full fine-tuning, JAX", "PyTorch + PEFT"
QWIX, BY_HAND = "qwix", "written by hand, JAX"  # the decoder's
TX = variants.TX  # its settings are written out in peers_torch.py
CHECKED = 4  # steps whose losses must agree, to 1e-3 of them
Model = tuple[Any, dict[str, jax.Array], Callable[..., jax.Array], dict[str, Any], str]


def minilm() -> Model:
    """32 x 48 tokens; kernels of the encoder."""
    source = fetch.fetch(fetch.MINILM)
    model = bert.load(source, num_labels=2)
    ids = jax.random.randint(jax.random.key(1), (32, 48), 1000, 30000)
    batch = {"input_ids": ids, "labels": jnp.arange(32) % 2}

    def loss(apply: Any, params: Any, batch: Any) -> jax.Array:
        logits = apply(params, batch["input_ids"], jnp.ones_like(batch["input_ids"]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    return model, batch, loss, hf_export.bert_fields(source, model.labels), "re:.*/encoder/.*kernel"


def smollm2() -> Model:
    """4 x 256 tokens, float32; kernels of the layers."""
    model = llama.load(fetch.fetch(fetch.SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    batch = {"input_ids": jax.random.randint(jax.random.key(1), (4, 256), 0, model.config.vocab_size)}

    def loss(apply: Any, params: Any, batch: Any) -> jax.Array:
        ids = batch["input_ids"]
        logits = apply(params, ids)[:, :-1]  # transformers computes the last position's, too
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    return model, batch, loss, llama.hf_config(model.config), "all-linear"


MODELS: dict[str, Callable[[], Model]] = {"MiniLM": minilm, "SmolLM2-135M": smollm2}


# --- a peer -----------------------------------------------------------------------------------------------------------


def work(name: str, peer: str) -> None:
    """A process that takes a step for each line that it reads, and writes its loss and times."""
    model, batch, loss, _, targets = MODELS[name]()
    adapters = _adapters(model, batch, targets)
    if peer == OURS:
        state = lj.train.init_state(adapters, TX, key=jax.random.key(0))
        step: Any = lj.train.make_train_step(lambda params, batch, key: loss(lj.lora(model.apply), params, batch), TX)
        advance = lambda state: step(state, model.variables, batch)
    else:
        frozen, tree = paths.flatten(model.variables)
        kernels = {path: jnp.copy(frozen[path]) for path in adapters}
        whole = lambda kernels, frozen: jax.tree.unflatten(tree, [kernels.get(path, leaf) for path, leaf in frozen.items()])
        full = variants.adapter_step(lambda kernels, frozen, batch: loss(model.apply, whole(kernels, frozen), batch))
        state = kernels, TX.init(kernels)

        def advance(state: Any) -> Any:
            *state, value = full(*state, frozen, batch)
            return state, {"loss": value}

    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        state, found = jax.block_until_ready(advance(state))
        times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"loss": float(found["loss"]), **times}), flush=True)


def _adapters(model: Any, batch: Mapping[str, jax.Array], targets: str) -> dict[str, lj.Adapter]:
    config = lj.LoraConfig(rank=8, targets=targets if targets == "all-linear" else [targets])
    return lj.init(jax.random.key(0), config, model.apply, model.variables, batch["input_ids"])


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(name: str, torch: str | None, rounds: int) -> dict[str, Any]:
    """Median milliseconds of each peer's step, and how long ours takes as a share of theirs."""
    own = [sys.executable, "-m", "tests.benchmarks.peers", "--worker", name]
    commands = {peer: [*own, peer] for peer in (OURS, FULL)}
    with tempfile.TemporaryDirectory() as directory:
        if torch is not None:
            _write(name, pathlib.Path(directory))
            script = str(pathlib.Path(__file__).with_name("peers_torch.py"))
            commands[TORCH] = [torch, script, directory]
        running = {peer: _start(command) for peer, command in commands.items()}
        first = {peer: [_step(process)["loss"] for _ in range(CHECKED)] for peer, process in running.items()}
        _check(first)
        times: dict[str, list[dict[str, float]]] = {peer: [] for peer in running}
        for number in range(rounds):
            for peer in list(running)[:: 1 if number % 2 else -1]:
                times[peer].append(_step(running[peer]))
        for process in running.values():
            process.communicate()
    median = lambda peer, clock: round(1000 * statistics.median(one[clock] for one in times[peer]))
    ratio = lambda peer, clock: statistics.median(a[clock] / b[clock] for a, b in zip(times[OURS], times[peer]))
    return {
        "losses": first,
        "milliseconds": {peer: median(peer, "wall") for peer in times},
        "processor_milliseconds": {peer: median(peer, "cpu") for peer in times},
        "ours_over": {peer: round(ratio(peer, "wall"), 3) for peer in times if peer != OURS},
        "ours_over_by_processor_time": {peer: round(ratio(peer, "cpu"), 3) for peer in times if peer != OURS},
    }


def _write(name: str, directory: pathlib.Path) -> None:
    """The model, the adapters that training begins with and the batch, for PyTorch."""
    model, batch, _, fields, targets = MODELS[name]()
    hf_export.write(directory, model.variables, {}, model.names, fields, {})
    lj.peft.save(directory / "adapters", _adapters(model, batch, targets), names=model.names)
    safetensors.numpy.save_file({key: np.asarray(value) for key, value in batch.items()}, directory / "batch.safetensors")


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _step(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdin is not None and process.stdout is not None
    time.sleep(0.03)  # OpenMP's threads spin for some milliseconds after the last peer's step
    process.stdin.write("step\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise SystemExit(f"a peer ended with the code {process.wait()}; what it wrote is above: {process.args}")
    return json.loads(answer)


def _check(losses: Mapping[str, Sequence[float]]) -> None:
    """Raise unless adapters are trained alike everywhere, and all begin from one model."""
    for peer, found in losses.items():
        if peer != FULL:
            np.testing.assert_allclose(found, losses[OURS], rtol=1e-3, err_msg=f"{peer} computes something else")
        np.testing.assert_allclose(found[0], losses[OURS][0], rtol=1e-4, err_msg=f"{peer} begins with something else")


def draw(found: Mapping[str, Any], file: pathlib.Path) -> None:
    """A bar for the step of each peer, in units of full fine-tuning's; the decoder is the one of `train_step.py`."""
    steps = {name: found[name]["milliseconds"] for name in MODELS if name in found} | {"decoder, 6 layers": _decoder()}
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.9 * len(steps)), layout="constrained")
    colours = {OURS: "#2563eb", TORCH: "#f59e0b", QWIX: "#db2777", BY_HAND: "#059669", FULL: "#9ca3af"}
    for row, times in enumerate(steps.values()):
        shown = [peer for peer in colours if peer in times]
        for place, peer in enumerate(shown):
            value, at = times[peer] / times[FULL], row + 0.2 * (place - (len(shown) - 1) / 2)
            axes.barh(at, value, height=0.18, color=colours[peer])
            axes.text(value + 0.01, at, f"{times[peer]:,} ms", va="center", fontsize=8)
    axes.set(
        yticks=range(len(steps)), yticklabels=list(steps), xlabel="time of a train step / full fine-tuning of the same kernels"
    )
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    met = [peer for peer in colours if any(peer in times for times in steps.values())]
    figure.legend(
        handles=[Patch(color=colours[peer], label=peer) for peer in met],
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    figure.savefig(file, dpi=110)


def _decoder() -> dict[str, int]:
    """The milliseconds that `train_step.py` measured: on the machine and the day that its own file names."""
    variants = json.loads((RESULTS / "train_step.json").read_text())["unrolled"]["variants"]
    names = {"ours, train step": OURS, "qwix": QWIX, "by hand": BY_HAND, "full fine-tuning": FULL}
    return {names[one["name"]]: round(one["step_ms"]) for one in variants if one["name"] in names}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", metavar="PYTHON", help="a Python with torch, transformers and peft")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(*options.worker)
        return
    if options.torch is None:
        print(f"{TORCH}: left out, since there is no --torch")
    elif jax.default_backend() != "cpu":
        parser.error(f"{TORCH} runs on the CPU: set JAX_PLATFORMS=cpu, or leave --torch out")
    found: dict[str, Any] = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores", "python": platform.python_version(),
        "date": datetime.date.today().isoformat(), "versions": _versions(options.torch),
    }  # fmt: skip
    for name in options.models:
        found[name] = compare(name, options.torch, options.rounds)
        print(name, json.dumps(found[name], indent=1), flush=True)
    (RESULTS / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, RESULTS / "peers.png")


def _versions(torch: str | None) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("jax", "optax")}
    if torch is not None:
        code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('torch', 'peft', 'transformers')}))"
        found |= json.loads(subprocess.run([torch, "-c", code], check=True, capture_output=True, text=True).stdout)
    return found


if __name__ == "__main__":
    main()

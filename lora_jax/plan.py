"""`lora-jax plan`: will a train step fit on a chip, said by its compiler before anyone rents it."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lora_jax import steps, topology
from lora_jax.config import LoraConfig
from lora_jax.flops import dot_flops
from lora_jax.losses import LOGITS_AT_ONCE
from lora_jax.models import shapes
from lora_jax.models.llama_config import LlamaConfig, read_config
from lora_jax.quant import DTYPES
from lora_jax.task import user_errors
from lora_jax.topology import Compiled

QUANTISATIONS = ("none", *DTYPES)
COMPARISONS = tuple(name for name in steps.STEPS if name != "lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan.

    Args:
      model: a name of `lora_jax.models.shapes.NAMES`, a `config.json` or the directory of one.
      rank: of every pair.
      targets: patterns, as in `LoraConfig`.
      batch: rows in a step.
      sequence: tokens in a row.
      quantize: of what kind the layers' kernels are, or `"none"`: bfloat16, as the embedding and the head are always.
      block: how many quantised values share a scale; `None`: 64. Only with `quantize`.
      topology: a TPU and its shape, of which one chip is planned for, or `cpu`.
      compare: other steps, of `COMPARISONS`.

    Raises:
      ValueError: an option is out of range.
    """

    model: str
    rank: int = 16
    targets: Sequence[str] = steps.PROJECTIONS
    batch: int = 1
    sequence: int = 2048
    quantize: str = "none"
    block: int | None = None
    topology: str = "v5p:1x1x1"
    compare: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("batch", "sequence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.quantize not in QUANTISATIONS:
            raise ValueError(f"quantize must be one of {', '.join(QUANTISATIONS)}, not {self.quantize!r}")
        if self.quantize == "none" and self.block is not None:
            raise ValueError("block is for a quantised base only: leave it out, or say how to quantise")
        unknown = [name for name in self.compare if name not in COMPARISONS]
        if unknown:
            raise ValueError(f"compare takes {', '.join(COMPARISONS)}, not {', '.join(map(repr, unknown))}")
        topology.check_name(self.topology)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one train step needs on one chip.

    Args:
      step: `"lora"`, or one of `COMPARISONS`.
      source: `"compiler"`, or `"analytic estimate"`.
      trainable: numbers that are trained.
      optimizer_bytes: Adam's moments.
      flops: of all matrix products, over all layers, from the jaxpr.
      argument_bytes: parameters, adapters, moments and the batch.
      temporary_bytes: all else; see `Compiled`.
      peak_bytes_per_chip: the most that is held at once; of a program that does not fit what its compiler says it needs.
      fits: whether that is no more than the chip has; `None` where it is not known what it has.
      compiler_flops: the compiler's own count, the body of a scan once.
      compiler_seconds: the compiler's own estimate of the time, the body of a scan once.
      error: what the compiler says where the step does not fit.
    """

    step: str
    source: str
    trainable: int
    optimizer_bytes: int
    flops: int
    argument_bytes: int
    temporary_bytes: int | None
    peak_bytes_per_chip: int | None
    fits: bool | None
    compiler_flops: float | None = None
    compiler_seconds: float | None = None
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer, for one chip.

    Args:
      request: what was asked.
      parameters: numbers in the base.
      chip: what JAX calls it.
      hbm_bytes_per_chip: what a program can use of its memory, as its compiler says; `None` for a CPU.
      steps: the step that trains the adapters, and those it is compared with.
      note: what to know about the figures.
    """

    request: Request
    parameters: int
    chip: str
    hbm_bytes_per_chip: int | None
    steps: tuple[StepPlan, ...]
    note: str

    def to_json(self) -> str:
        """As JSON text; `peak_bytes_per_chip` is that of the step that trains the adapters."""
        peak = self.steps[0].peak_bytes_per_chip
        return json.dumps({**dataclasses.asdict(self), "peak_bytes_per_chip": peak}, indent=1)

    def __str__(self) -> str:
        return _table(self)


def make(request: Request, progress: Callable[[str], None] = lambda text: None) -> Plan:
    """Compile the steps for one chip of the topology; without the TPU compiler, estimate them.

    Args:
      request: what to plan.
      progress: called with what is being done.

    Raises:
      UserError: the model can't be read, a target is not there, or the TPU compiler does not know the topology.
    """
    with user_errors():
        config = _config(request.model)
        quantize = None if request.quantize == "none" else request.quantize
        adapters = LoraConfig(rank=request.rank, targets=request.targets)
        setup = steps.prepare(config, adapters, request.batch, request.sequence, quantize, request.block or 64)
        compiles = request.topology == "cpu" or topology.has_libtpu()
        chip = topology.first_chip(request.topology) if compiles else None
    kind = topology.chip_kind(request.topology)
    hbm = topology.HBM_BYTES.get(kind)
    plans = []
    for name in ("lora", *request.compare):
        progress(f"{'compiling' if compiles else 'estimating'} the step {name} for {kind}")
        plans.append(_step_plan(name, setup, config, request, chip, hbm))
    return Plan(request, setup.summary.parameters, kind, None if hbm is None else int(hbm), tuple(plans), _note(compiles))


def _note(compiles: bool) -> str:
    if compiles:
        return (
            "Bytes are those of the compiler; a TPU's counts what replaces arguments (adapters, moments) among temporaries, "
            "not in the peak. FLOPs are those of all matrix products over all layers; the compiler's own FLOPs and seconds "
            "count the layers, which are a scan, once."
        )
    return (
        "ANALYTIC ESTIMATE: libtpu is not installed, so nothing was compiled (pip install 'lora-jax[plan]'). The bytes of the "
        "arguments and the FLOPs are exact; the temporaries are estimated."
    )


def _config(model: str) -> LlamaConfig:
    if model in shapes.NAMES:
        return shapes.named(model)
    path = pathlib.Path(model)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"model: {model} is neither a config.json nor one of {', '.join(shapes.NAMES)}")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model: {file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"model: {file} must hold a JSON object, not {type(fields).__name__}")
    try:
        return read_config(fields)
    except ValueError as error:
        raise ValueError(f"model: {file}: {error}") from None


def _step_plan(name: str, setup: steps.Setup, config: LlamaConfig, request: Request, chip: Any, hbm: float | None) -> StepPlan:
    step = steps.STEPS[name](setup)
    argument_bytes = steps.tree_bytes(step.args)
    traced = step.jitted.trace(*(step.args if chip is None else topology.place(chip, step.args)))
    flops = dot_flops(traced.jaxpr)
    if chip is None:
        temporary = _temporaries(name, setup, config, request)
        found = Compiled(argument_bytes, temporary, argument_bytes + temporary)
    else:
        found = topology.compile_for(chip, traced)
    peak = found.peak_bytes
    return StepPlan(
        step=name,
        source="analytic estimate" if chip is None else "compiler",
        trainable=step.trainable,
        optimizer_bytes=step.optimizer_bytes,
        flops=flops,
        argument_bytes=argument_bytes if found.argument_bytes is None else found.argument_bytes,
        temporary_bytes=found.temporary_bytes,
        peak_bytes_per_chip=peak,
        fits=False if found.error else None if hbm is None or peak is None else peak <= hbm,
        compiler_flops=found.compiler_flops,
        compiler_seconds=found.compiler_seconds,
        error=found.error,
    )


def _temporaries(name: str, setup: steps.Setup, config: LlamaConfig, request: Request) -> int:
    """About the bytes beside the arguments: layer inputs, gradients, and what the dearest place of the backward pass holds.

    Layers are kept as their inputs in bfloat16. Beside that, a layer's backward pass holds some five arrays of the size of the
    MLP's, some four blocks of attention scores in float32, and a quantised layer's dense kernels; the loss holds some three
    chunks of logits in float32.
    """
    tokens, width = request.batch * request.sequence, config.hidden_size
    inputs = 2 * config.num_hidden_layers * tokens * width
    kernels = sum(row.parameters for row in setup.summary.rows)
    scores = request.batch * config.num_attention_heads * min(steps.ATTENTION_BLOCK, request.sequence) * request.sequence
    layer = 2 * tokens * (5 * config.intermediate_size + 4 * width) + 4 * 2 * scores
    if request.quantize != "none" and name != "full":
        layer += 2 * kernels // config.num_hidden_layers
    logits = 3 * 4 * min(LOGITS_AT_ONCE, tokens * config.vocab_size)
    trained = {"lora": setup.summary.adapter_bytes, "full": 2 * setup.summary.parameters}
    # The naive step's gradients of whole kernels, beside the kernels themselves.
    gradients = trained.get(name, setup.summary.adapter_bytes + 2 * 2 * kernels)
    return inputs + gradients + max(layer, logits)


def _table(plan: Plan) -> str:
    request = plan.request
    base = "bfloat16" if request.quantize == "none" else f"{request.quantize} (embedding and head bfloat16)"
    hbm = "" if plan.hbm_bytes_per_chip is None else f" with {_gib(plan.hbm_bytes_per_chip)}"
    lines = [
        f"{request.model}: {plan.parameters:,} parameters, {base}",
        f"rank {request.rank} on {', '.join(request.targets)}; {request.batch} x {request.sequence} tokens",
        f"one chip of {request.topology}: {plan.chip}{hbm}",
        "",
    ]
    cells = [("", *(step.step for step in plan.steps))]
    for title, show in _ROWS.items():
        cells.append((title, *(show(step) for step in plan.steps)))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    align = [str.ljust, *[str.rjust] * len(plan.steps)]
    lines += ["  ".join(pad(cell, width) for pad, cell, width in zip(align, row, widths)) for row in cells]
    lines += [f"{step.step}: {step.error}" for step in plan.steps if step.error]
    return "\n".join([*lines, "", plan.note])


def _gib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**30:.2f} GiB"


def _tera(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e12:.2f} TFLOP"


_ROWS: dict[str, Callable[[StepPlan], str]] = {
    "figures": lambda step: step.source,
    "trainable": lambda step: f"{step.trainable:,}",
    "optimiser": lambda step: _gib(step.optimizer_bytes),
    "arguments": lambda step: _gib(step.argument_bytes),
    "temporaries": lambda step: _gib(step.temporary_bytes),
    "peak": lambda step: _gib(step.peak_bytes_per_chip),
    "fits": lambda step: "-" if step.fits is None else "yes" if step.fits else "NO",
    "FLOPs, all layers": lambda step: _tera(step.flops),
    "compiler's FLOPs, layers once": lambda step: _tera(step.compiler_flops),
    "compiler's seconds, layers once": lambda step: "-" if step.compiler_seconds is None else f"{step.compiler_seconds:.4f}",
}

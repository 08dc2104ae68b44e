"""A plan as text."""

from collections.abc import Callable

from lora_jax.core.text_table import text_table
from lora_jax.models import presets
from lora_jax.planning.fit import Candidate, Fit, command
from lora_jax.planning.plan import Plan, Request, StepPlan, axes_text


def table(plan: Plan) -> str:
    """A plan as text, with a column for each step."""
    request = plan.request
    base = request.dtype
    if request.quantization is not None:
        base = f"{request.quantize} (embedding and head {base})"
    targets = request.targets if isinstance(request.targets, str) else ", ".join(request.targets)
    hbm = "" if plan.hbm_bytes_per_chip is None else f" with {_gib(plan.hbm_bytes_per_chip)} each"
    mesh = ", ".join(f"{name}={size}" for name, size in plan.mesh.items())
    lines = [
        f"{request.model}: {plan.parameters:,} parameters, {base}",
        f"rank {request.rank} on {targets}; {plan.batch} x {request.sequence} tokens",
        _computed(request),
        f"{request.topology}: {plan.chips} x {plan.chip}{hbm}" + (f"; mesh {mesh}" if plan.chips > 1 else ""),
        "",
    ]
    rows = {**_ROWS, **{kind: _moved(kind) for step in plan.steps for kind in step.collectives or ()}}
    cells = [("on each chip" if plan.chips > 1 else "", *(step.step for step in plan.steps))]
    cells += [(title, *map(show, plan.steps)) for title, show in rows.items()]
    lines.append(text_table(cells, "l" + "r" * len(plan.steps)))
    lines += [f"{step.step}: {step.error}" for step in plan.steps if step.error]
    lines += [f"{step.step}: {_unknown(step.unknown_loops)}" for step in plan.steps if step.unknown_loops]
    return "\n".join([*lines, "", plan.note])


def fit_table(fit: Fit) -> str:
    """What a search chose from, the best marked, and the command line of its run."""
    target, speed = fit.target, fit.target.speed
    assert speed is not None
    head = ("", "quantise", "remat", "attention", "microbatches", "mesh", "peak", "seconds", "fits", "figures")
    rows = [_fit_row(one, one is fit.best, one.seconds(speed)) for one in fit.tried]
    lines = [f"{target.name}: {target.count} x {target.chip} with {_gib(target.hbm_bytes)} each; {fit.count:,} steps", ""]
    lines += [text_table([head, *rows], "lllrrlrrll")] if rows else []
    lines += ["", _FIT_NOTE, ""]
    if fit.best is None:
        return "\n".join([*lines, f"None fits {target.name}."])
    known = fit.best.request.model in presets.NAMES
    return "\n".join([*lines, command(fit.best.request), *(["(--model: the directory of its checkpoint)"] if known else [])])


_FIT_NOTE = (
    "Seconds are those of the compiler's cycles over all layers and, after them, what a chip gets from others at its network's "
    "full speed; where figures are estimated, products at half of the peak."
)


def _fit_row(one: Candidate, best: bool, seconds: float) -> tuple[str, ...]:
    request = one.request
    mesh = "-" if request.mesh is None else axes_text(request.mesh)
    source = "estimate" if one.step is None else one.step.source
    chosen = (request.quantize, request.remat, str(request.queries), str(request.accumulate), mesh)
    return ("*" if best else "", *chosen, _gib(one.bytes), _seconds(seconds), "yes" if one.fits else "NO", source)


def _computed(request: Request) -> str:
    """How the step is computed, in words."""
    layers = "layers scanned" if request.scan_layers else "layers one by one"
    parts = [
        layers,
        f"remat {request.remat}",
        f"attention of {request.queries} queries at a time",
    ]
    if request.accumulate > 1:
        parts.append(f"{request.accumulate} microbatches")
    return ", ".join(parts)


def _gib(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.2f} MiB"


def _tera(count: float | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e12:.2f} TFLOP" if count >= 1e10 else f"{count / 1e9:.3f} GFLOP"


def _seconds(count: float | None) -> str:
    return "-" if count is None else f"{count:.4f}"


def _moved(kind: str) -> Callable[[StepPlan], str]:
    def show(step: StepPlan) -> str:
        moved = None if step.collectives is None else step.collectives.get(kind)
        return "-" if moved is None else f"{moved.count:,} x, {_gib(moved.bytes)}"

    return show


def _unknown(loops: int) -> str:
    return f"how often {loops} of its loops run is not known: what they move is counted once"


_ROWS: dict[str, Callable[[StepPlan], str]] = {
    "figures": lambda step: step.source,
    "trainable, all chips": lambda step: f"{step.trainable:,}",
    "optimiser": lambda step: _gib(step.optimizer_bytes),
    "arguments": lambda step: _gib(step.argument_bytes),
    "temporaries": lambda step: _gib(step.temporary_bytes),
    "peak": lambda step: _gib(step.peak_bytes_per_chip),
    "fits": lambda step: "-" if step.fits is None else "yes" if step.fits else "NO",
    "FLOPs, all layers and chips": lambda step: _tera(step.flops),
    "compiler's FLOPs, layers once": lambda step: _tera(step.compiler_flops),
    "compiler's seconds, layers once": lambda step: _seconds(step.compiler_seconds),
    "the same, all layers": lambda step: _seconds(step.step_seconds),
}

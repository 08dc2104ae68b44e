"""`lora-jax plan --fit`: the fastest step that fits some chips, or the fewest chips that a step fits."""

import dataclasses
import itertools
import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.planning import compile_cache, plan, prior, topology, train_steps
from lora_jax.planning.plan import Request, StepPlan

MOST = 8  # programs that are compiled
_SMALLEST = (
    "v5e:1x1",
    "v6e:1x1",
    "v5e:2x2",
    "v5p:1x1x1",
    "v6e:2x2",
    "v5e:2x4",
    "v6e:2x4",
    "v5e:4x4",
    "v5p:2x2x1",
    "v6e:4x4",
    "v5e:4x8",
    "v5p:2x2x2",
    "v5e:8x8",
    "v5p:2x2x4",
    "v6e:8x8",
    "v5e:16x16",
    "v5p:4x4x4",
    "v6e:16x16",
    "v5p:4x4x8",
)  # fmt: skip  by the memory of all chips
_HOPE, _SURE = 1.2, 0.9  # of the memory: above by the estimate it is not compiled; below it fits where nothing is
_ENOUGH = 3  # that fit
_NEAR = 1.25  # times the estimated seconds of what fits: what is slower is not compiled
_SEARCHED = ("quantize", "remat", "attention_block", "accumulate", "mesh")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A step that may fit.

    Args:
      request: what it is.
      guess: about what it takes.
      step: what the compiler says; `None` where it was not asked.
      fits: whether it fits; `None` where that is not known.
    """

    request: Request
    guess: prior.Guess
    step: StepPlan | None = None
    fits: bool | None = None

    def seconds(self, speed: topology.Speed) -> float:
        """The compiler's time for a chip and what it gets from others, one after the other; without them, the estimate's."""
        if self.step is None or self.step.step_seconds is None:
            return self.guess.seconds
        moved = sum(one.bytes for one in (self.step.collectives or {}).values())
        return self.step.step_seconds + moved / speed.network

    @property
    def bytes(self) -> int:
        """Of a chip's memory, by the compiler where it was asked."""
        known = None if self.step is None else self.step.peak_bytes_per_chip
        return self.guess.bytes if known is None else known


@dataclasses.dataclass(frozen=True)
class Fit:
    """What was found.

    Args:
      target: the chips.
      best: the fastest that fits; `None` if none does.
      tried: what was compiled, or where there is no compiler the fastest by the estimate, in the order of the search.
      count: how many candidates there were.
      compiled: how many programs were compiled.
    """

    target: topology.Topology
    best: Candidate | None
    tried: tuple[Candidate, ...]
    count: int
    compiled: int


def search(
    request: Request, given: Collection[str], progress: Callable[[str], None] = lambda text: None, most: int = MOST
) -> Fit:
    """The fastest step that fits, by the compiler's figures for those that an estimate puts first.

    Args:
      request: the model, its adapters, the batch, and what is not searched.
      given: the fields that are asked for as they are; without `topology` the smallest TPU is searched, too.
      progress: called with what is being done.
      most: how many programs may be compiled.

    Raises:
      InputError: the chips' memory is not known, or none of them is enough by the estimate.
    """
    config, compiled = plan.read_sizes(request.model), 0
    request = request.for_model(config)
    names = [request.topology] if "topology" in given else _SMALLEST
    found: Fit | None = None
    for name in names:
        target = _known(topology.read(name))
        candidates = _candidates(dataclasses.replace(request, topology=name, mesh=None, batch=None), request, given, config)
        hbm = target.hbm_bytes or 0
        if len(names) > 1 and min((c.guess.bytes for c in candidates), default=hbm + 1) > hbm:
            continue
        found = _fastest(target, config, candidates, progress, most - compiled)
        compiled += found.compiled
        found = dataclasses.replace(found, compiled=compiled)
        if found.best is not None or compiled >= most:
            return found
    if found is None:
        raise InputError(f"no step of {request.model} fits {names[-1]}, by the estimate: say --topology for what to try")
    return found


def _known(target: topology.Topology) -> topology.Topology:
    if target.hbm_bytes is None or target.speed is None:
        raise InputError(f"topology: the memory or speed of {target.name} is not known: --fit is for TPUs and GPUs")
    return target


# --- candidates -------------------------------------------------------------------------------------------------------


def _candidates(bare: Request, request: Request, given: Collection[str], config: DecoderConfig) -> list[Candidate]:
    """All steps of these chips that can be cut as they say, the fastest first by the estimate."""
    target = topology.read(bare.topology)
    assert target.speed is not None
    rows = request.batch if request.batch is not None else max(8, target.count)
    options = {name: (getattr(request, name),) if name in given else values for name, values in _choices(bare).items()}
    meshes = [request.mesh] if "mesh" in given else list(_meshes(target.count))
    first, models, found = None, {}, []
    for mesh, *values in itertools.product(meshes, *options.values()):
        try:
            own = dataclasses.replace(bare, mesh=mesh, batch=rows, **dict(zip(options, values)))
            step = own.step(own.make_mesh(None))
            key = own.quantize, str(mesh)
            if key not in models:
                models[key] = step.model.shapes(config, step.mesh)
        except InputError:  # it can't be cut so
            continue
        if first is None:
            first = train_steps.prepare(dataclasses.replace(step, mesh=None), config)
        setup = dataclasses.replace(first, step=step, model=models[key])
        found.append(Candidate(own, prior.guess(setup, target.speed)))
    if not found:
        raise InputError(
            f"batch: {rows} rows can't be cut for {target.name} as asked: give another --batch, or leave --mesh out"
        )
    return sorted(found, key=lambda candidate: (candidate.guess.seconds, candidate.guess.bytes))


def _choices(request: Request) -> dict[str, Sequence[Any]]:
    """The values of each option that are searched."""
    blocks = [size for size in (512, 256) if size < request.sequence]
    return {
        "quantize": ("none", "int8", "nf4"),
        "remat": ("none", "products", "full"),
        "attention_block": (request.sequence, *blocks),
        "accumulate": (1, 2, 4, 8, 16),
    }


def _meshes(count: int) -> Iterator[Mapping[str, int] | None]:
    """How so many chips may be used: none for one chip."""
    if count == 1:
        yield None
        return
    yield {"data": count}
    yield {"fsdp": count}
    for model in (2, 4, 8):
        if count % model == 0:
            yield {"model": model} if model == count else {"fsdp": count // model, "model": model}


# --- the search -------------------------------------------------------------------------------------------------------


def _fastest(
    target: topology.Topology,
    config: DecoderConfig,
    candidates: Sequence[Candidate],
    progress: Callable[[str], None],
    most: int,
) -> Fit:
    """Ask the compiler in the order of the estimate, until what is left is slower by far than what fits."""
    assert target.hbm_bytes is not None and target.speed is not None
    [(source, devices), *_] = plan.sources(target)
    if source == plan.ESTIMATE:
        tried = [dataclasses.replace(one, fits=one.guess.bytes <= _SURE * target.hbm_bytes) for one in candidates]
        best = next((one for one in tried if one.fits), None)
        shown = tried[:MOST] if best is None or best in tried[:MOST] else [*tried[: MOST - 1], best]
        return Fit(target, best, tuple(shown), len(candidates), 0)
    tried: list[Candidate] = []
    for one in candidates:
        if len(tried) == most or sum(bool(other.fits) for other in tried) == _ENOUGH:
            break
        if one.guess.bytes > _HOPE * target.hbm_bytes or any(_is_hopeless(one, other) for other in tried):
            continue
        progress(f"compiling step {len(tried) + 1} of at most {most} for {target.name}: {describe(one.request)}")
        tried.append(_compiled(one, target, config, source, devices))
    speed = target.speed
    best = min((one for one in tried if one.fits), key=lambda one: one.seconds(speed), default=None)
    return Fit(target, best, tuple(tried), len(candidates), len(tried))


def _is_hopeless(one: Candidate, other: Candidate) -> bool:
    """Whether what was compiled says that another candidate is not worth it: much slower than what fits, or larger than what
    does not."""
    if other.fits:
        return one.guess.seconds > _NEAR * other.guess.seconds
    alike = all(getattr(one.request, name) == getattr(other.request, name) for name in ("quantize", "mesh"))
    return alike and one.guess.bytes >= other.guess.bytes


def _compiled(one: Candidate, target: topology.Topology, config: DecoderConfig, source: str, devices: Any) -> Candidate:
    setup = plan.prepare(one.request.step, one.request, config, devices)
    step = plan.step_plan("lora", setup, source, target, compile_cache.compile_for)
    return dataclasses.replace(one, step=step, fits=step.fits)


# --- in words ---------------------------------------------------------------------------------------------------------


def describe(request: Request) -> str:
    """What was chosen, in words."""
    mesh = "" if request.mesh is None else f", {plan.axes_text(request.mesh)}"
    return f"{request.quantize}, remat {request.remat}, attention of {request.queries}, {request.accumulate} microbatches{mesh}"


def command(request: Request) -> str:
    """The command line of a run with this step; a model that is known by its name alone stands for its directory."""
    targets = [request.targets] if isinstance(request.targets, str) else request.targets
    words = ["lora-jax", "finetune", "--task", "lm", "--model", request.model, "--dtype", request.dtype]
    words += ["--scan-layers" if request.scan_layers else "--no-scan-layers", "--remat", request.remat]
    words += ["--attention-block", str(request.attention_block), "--accumulate", str(request.accumulate)]
    if request.quantization is not None:
        words += ["--quantize", request.quantization, "--block", str(request.block or 64)]
    words += ["--rank", str(request.rank), "--targets", *targets]
    words += ["--batch-size", str(request.rows()), "--max-length", str(request.sequence)]
    if request.mesh is not None and math.prod(request.mesh.values()) > 1:
        words += ["--mesh", plan.axes_text(request.mesh)]
    return shlex.join(words)

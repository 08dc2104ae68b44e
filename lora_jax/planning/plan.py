"""`lora-jax plan`: will a train step fit on the chips, said by their compiler before anyone rents them."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import optax
from jax.sharding import AbstractMesh, AxisType

from lora_jax.adapters import words
from lora_jax.adapters.config import LoraConfig
from lora_jax.core.errors import InputError, MissingError, within
from lora_jax.core.fields import check, option
from lora_jax.core.files import read_json_object
from lora_jax.huggingface import hub
from lora_jax.models import llama, presets
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families import read_config
from lora_jax.planning import memory_estimate, topology, train_steps
from lora_jax.planning.collectives import Collective
from lora_jax.planning.decoder_step import DecoderStep, ModelOptions, Remat, projections
from lora_jax.planning.flops import dot_flops
from lora_jax.sharding import AXES, make_mesh

COMPARISONS = tuple(name for name in train_steps.STEPS if name != "lora")
ESTIMATE, COMPILER, CPU_COMPILER = "analytic estimate", "compiler", "compiler, for CPUs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to plan.

    Raises:
      InputError: an option is out of range, or they do not go together.
    """

    model: Annotated[
        str, option(f"{', '.join(presets.NAMES)}, a config.json or its directory, a .gguf file, or owner/name of the hub")
    ]
    rank: Annotated[int, option("rank of every low-rank pair")] = 16
    targets: Annotated[
        str | Sequence[str],
        option(
            "kernels to adapt: patterns, or one of the words all-linear and attention (default: all projections of the layers)",
            metavar="PATTERN",
        ),
    ] = ()
    batch: Annotated[
        int | None, option("rows per step on all chips (default: one for each of data x fsdp)", ge=1, must_be="at least 1")
    ] = None
    sequence: Annotated[int, option("tokens per row", ge=1, must_be="at least 1")] = 2048
    quantize: Annotated[
        Literal["none", "nf4", "int4", "int8", "fp8"],
        option("the layers' kernels: none (as the embedding and the head always), nf4, int4, int8 or fp8"),
    ] = "none"
    block: Annotated[int | None, option("how many quantised values share a scale, 64 if left out")] = None
    dtype: Annotated[Literal["bfloat16", "float32"], option("the base's dtype: bfloat16 or float32")] = "bfloat16"
    scan_layers: Annotated[bool, option("stack the layers' parameters and scan over them", both=True)] = True
    remat: Annotated[
        Remat, option("what the backward pass computes again: none, products (all but products with weights) or full")
    ] = "full"
    attention_block: Annotated[
        int, option("compute the attention of at most so many queries at a time", ge=1, must_be="at least 1")
    ] = 256
    accumulate: Annotated[int, option("cut the batch into so many parts, one after the other", ge=1, must_be="at least 1")] = 1
    topology: Annotated[
        str, option("v4, v5e, v5p or v6e and a shape, such as v6e:4x4, or a GPU or cpu and how many, such as h100:8")
    ] = "v5p:1x1x1"
    mesh: Annotated[
        Mapping[str, int] | None,
        option("how its chips are used: sizes of data, fsdp and model, the slowest first, such as fsdp=4,model=2 "
               "(default: all along fsdp)"),
    ] = None  # fmt: skip
    compare: Annotated[Sequence[str], option("also: full (fine-tuning), naive (W + AB formed)", metavar="STEP")] = ()

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "targets", words.targets(self.targets))
        words.check_base(self.quantization, self.block)
        unknown = [name for name in self.compare if name not in COMPARISONS]
        if unknown:
            raise InputError(f"compare takes {', '.join(COMPARISONS)}, not {', '.join(map(repr, unknown))}")
        chips, axes = topology.read(self.topology).count, self.axes()
        if math.prod(axes.values()) != chips:
            raise InputError(
                f"mesh: {axes_text(axes)} has {math.prod(axes.values())} places, but {self.topology} has {chips} chips, and "
                "all are used"
            )
        if self.rows() % self._parts():
            raise InputError(
                f"batch: the {self.batch} rows are cut along data and fsdp into {self._parts()} parts: take a multiple of that"
            )
        if self.accumulate > 1 and self.compare:
            raise InputError("compare is for whole batches: leave it or accumulate out")

    @property
    def quantization(self) -> str | None:
        """How the layers' kernels are quantised, if they are."""
        return None if self.quantize == "none" else self.quantize

    @property
    def queries(self) -> int:
        """How many queries' attention is computed at a time."""
        return min(self.attention_block, self.sequence)

    def axes(self) -> dict[str, int]:
        """The mesh, also where none was asked for."""
        if self.mesh is None:
            return {"fsdp": topology.read(self.topology).count}
        for name, size in self.mesh.items():
            if name not in AXES or size < 1:
                raise InputError(f"mesh takes {', '.join(AXES)}, each with a size of at least 1, not {name}={size}")
        return dict(self.mesh)

    def rows(self) -> int:
        """The rows of the batch, also where no number was asked for."""
        return self.accumulate * self._parts() if self.batch is None else self.batch

    def make_mesh(self, devices: Sequence[Any] | None) -> Any:
        """The mesh of these devices or, without any, an abstract one; `None` for one chip that was asked for without a mesh."""
        axes = self.axes()
        return None if self.mesh is None and math.prod(axes.values()) == 1 else mesh_of(axes, devices)

    def for_model(self, config: DecoderConfig) -> "Request":
        """The same, with the targets that a model has where none were asked for."""
        return self if self.targets else dataclasses.replace(self, targets=projections(config))

    def step(self, mesh: Any) -> DecoderStep:
        """The step on a mesh."""
        model = ModelOptions(
            dtype=self.dtype,
            quantize=self.quantization,
            block=self.block,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention_block=self.attention_block,
        )
        lora = LoraConfig(rank=self.rank, targets=self.targets)
        rows: Any = {"rows": self.rows(), "length": self.sequence, "accumulate": self.accumulate}
        return DecoderStep(model=model, lora=lora, mesh=mesh, **rows)

    def _parts(self) -> int:
        axes = self.axes()
        return axes.get("data", 1) * axes.get("fsdp", 1)


def mesh_of(axes: Mapping[str, int], devices: Sequence[Any] | None) -> Any:
    """A mesh of devices or, without any, one to trace for."""
    if devices is not None:
        return make_mesh(axes, devices)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def axes_text(axes: Mapping[str, int]) -> str:
    """The axes of a mesh as the command line takes them.

    >>> axes_text({"fsdp": 4, "model": 2})
    'fsdp=4,model=2'
    """
    return ",".join(f"{name}={size}" for name, size in axes.items())


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What one train step needs on one chip.

    Args:
      step: `"lora"`, or one of `COMPARISONS`.
      source: `"compiler"`, `"analytic estimate"`, or beside that for a GPU `"compiler, for CPUs"`.
      trainable: numbers that are trained.
      optimizer_bytes: Adam's moments.
      flops: of all matrix products, over all layers and chips, from the jaxpr.
      argument_bytes: parameters, adapters, moments and the batch.
      temporary_bytes: all else; see `topology.Compiled`.
      peak_bytes_per_chip: the most that is held at once; of a program that does not fit what its compiler says it needs.
      fits: whether that is no more than the chip has; `None` where it is not known what it has.
      compiler_flops: the compiler's own count for a chip, the body of a scan once.
      compiler_seconds: the compiler's own estimate of the time, the body of a scan once.
      step_seconds: the same over all layers, from its cycles for each operation, without what moves between chips.
      collectives: `{kind: Collective}`, over all layers; `None` where nothing was compiled.
      unknown_loops: how many loops with collectives have an unknown number of iterations; they count as one.
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
    step_seconds: float | None = None
    collectives: Mapping[str, Collective] | None = None
    unknown_loops: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer, for each of the chips.

    Args:
      request: what was asked.
      mesh: of the chips.
      batch: rows in a step.
      parameters: numbers in the base.
      chips: how many there are.
      chip: what one is called.
      hbm_bytes_per_chip: what a program can use of its memory; `None` for a CPU.
      steps: the step that trains the adapters, and those it is compared with; for GPUs each from both sources.
      note: what to know about the figures.
    """

    request: Request
    mesh: Mapping[str, int]
    batch: int
    parameters: int
    chips: int
    chip: str
    hbm_bytes_per_chip: int | None
    steps: tuple[StepPlan, ...]
    note: str

    def to_json(self) -> str:
        """As JSON text; `peak_bytes_per_chip` is that of the step that trains the adapters."""
        peak = self.steps[0].peak_bytes_per_chip
        return json.dumps({**dataclasses.asdict(self), "peak_bytes_per_chip": peak}, indent=1)


def make(request: Request, progress: Callable[[str], None] = lambda text: None) -> Plan:
    """Compile the steps for the topology; without its compiler, estimate them.

    Args:
      request: what to plan.
      progress: called with what is being done.

    Raises:
      InputError: the model can't be read, a target is not there, a mesh axis does not divide a parameter, or the TPU compiler
        does not know the topology.
    """
    config = read_sizes(request.model)
    request = request.for_model(config)
    return make_for(request, request.step, config, progress=progress)


def make_for(
    request: Request,
    step: Callable[[Any], DecoderStep],
    config: DecoderConfig,
    tx: optax.GradientTransformation = train_steps.OPTIMIZER,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """The same for a step that is more than a request says: with other adapters, or another optimiser.

    Args:
      request: what the plan is called.
      step: makes the step on a mesh, or on none.
      config: the model's sizes.
      tx: the optimiser of the adapters.
      progress: called with what is being done.

    Raises:
      InputError: as for `make`.
    """
    target = topology.read(request.topology)
    places = list(sources(target))  # before JAX starts: it may need more CPU devices than it has
    setups = {source: prepare(step, request, config, devices, tx) for source, devices in places}
    plans = []
    for name in ("lora", *request.compare):
        for source, setup in setups.items():
            progress(f"{'estimating' if source == ESTIMATE else 'compiling'} the step {name} for {target.name}")
            plans.append(step_plan(name, setup, source, target))
    parameters = next(iter(setups.values())).summary.parameters
    notes = " ".join(_NOTES[source] for source in setups)
    return Plan(
        request, request.axes(), request.rows(), parameters, target.count, target.chip, target.hbm_bytes, tuple(plans), notes
    )


_COMPILED = (
    "FLOPs are those of all matrix products over all layers and chips; the compiler's own FLOPs and seconds are a chip's and "
    "count the layers, which are a scan, once."
)
_NOTES = {
    COMPILER: "Bytes are those of the compiler: temporaries are what it reserves, the peak is what is held at once "
    f"with the arguments. {_COMPILED}",
    ESTIMATE: "ANALYTIC ESTIMATE where it says so: the bytes of the arguments and the FLOPs are exact; the temporaries are "
    "estimated. For TPUs there is a compiler: pip install 'lora-jax[plan]'.",
    CPU_COMPILER: "What a compiler makes of the same step for CPUs is beside it, which may hold bfloat16 products in float32. "
    f"{_COMPILED}",
}


def sources(target: topology.Topology) -> Iterator[tuple[str, Sequence[Any] | None]]:
    """Where figures come from, and the devices to compile for."""
    if target.is_here:
        yield COMPILER, topology.devices(target)
        return
    if target.platform == "gpu" or (target.platform == "tpu" and not topology.has_libtpu()):
        yield ESTIMATE, None
    if target.platform != "tpu" or topology.has_libtpu():
        yield CPU_COMPILER if target.platform == "gpu" else COMPILER, topology.devices(target)


def prepare(
    step: Callable[[Any], DecoderStep],
    request: Request,
    config: DecoderConfig,
    devices: Sequence[Any] | None,
    tx: optax.GradientTransformation = train_steps.OPTIMIZER,
) -> train_steps.Setup:
    """The shapes of a step on these devices or, without any, to trace only."""
    own = step(request.make_mesh(devices))
    return train_steps.prepare(own, config, tx, None if devices is None or own.mesh is not None else devices[0])


def read_sizes(model: str) -> DecoderConfig:
    """The sizes of a model by its name here or on the hub, its `config.json`, or the directory or `.gguf` file that it is in.

    Of a model of the hub `config.json` alone is fetched, if the cache lacks it.
    """
    if model in presets.NAMES:
        return presets.named(model)
    path = pathlib.Path(model)
    if path.suffix == ".gguf":
        return llama.sizes(path)
    file = _config_file(path)
    fields = read_json_object(file)
    with within(f"model: {file}"):
        return read_config(fields)


def _config_file(path: pathlib.Path) -> pathlib.Path:
    name = None if path.exists() else hub.parse(path)
    if name is not None:
        return hub.config_file(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        known = ", ".join(presets.NAMES)
        raise MissingError(f"model: {path} is neither a config.json, nor owner/name of the hub, nor one of {known}")
    return file


def step_plan(
    name: str,
    setup: train_steps.Setup,
    source: str,
    target: topology.Topology,
    compile_for: Callable[[topology.Topology, Any], topology.Compiled] = topology.compile_for,
) -> StepPlan:
    """What one of `train_steps.STEPS` needs, estimated or compiled, as the source says."""
    step = train_steps.STEPS[name](setup)
    arguments = train_steps.chip_bytes(step.args)
    traced = step.jitted.trace(*step.args)
    if source == ESTIMATE:
        temporary = memory_estimate.temporary_bytes(name, setup)
        found = topology.Compiled(arguments, temporary, arguments + temporary)
    else:
        found = compile_for(target, traced)
    peak, hbm = found.peak_bytes, None if source == CPU_COMPILER else target.hbm_bytes
    return StepPlan(
        step=name,
        source=source,
        trainable=step.trainable,
        optimizer_bytes=step.optimizer_bytes,
        flops=dot_flops(traced.jaxpr),
        argument_bytes=arguments if found.argument_bytes is None else found.argument_bytes,
        temporary_bytes=found.temporary_bytes,
        peak_bytes_per_chip=peak,
        fits=False if found.error else None if hbm is None or peak is None else peak <= hbm,
        compiler_flops=found.compiler_flops,
        compiler_seconds=found.compiler_seconds,
        step_seconds=found.step_seconds,
        collectives=None if found.traffic is None else found.traffic.kinds,
        unknown_loops=0 if found.traffic is None else found.traffic.unknown_loops,
        error=found.error,
    )

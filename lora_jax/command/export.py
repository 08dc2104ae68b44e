"""Runs as files of other tools, and back: what `lora-jax export` and `lora-jax import` do."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors

from lora_jax import peft
from lora_jax.command import adapter_files, gguf_export, hf_export, metrics, model_card, run
from lora_jax.command.arguments import model_source
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import classify, lm, places
from lora_jax.command.tasks.registry import task_module
from lora_jax.core import files, paths
from lora_jax.core.adapter import Adapter, Full, LowRank
from lora_jax.core.errors import InputError
from lora_jax.huggingface import hub, hub_push
from lora_jax.huggingface.names import HFName
from lora_jax.models import encoder_families, llama, vision, vision_config
from lora_jax.training import checkpoint

# What the pinned models are called on the Hugging Face hub.
_ORIGINALS = {"classify": "sentence-transformers/all-MiniLM-L6-v2", "lm": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_ORIGINALS["dpo"] = _ORIGINALS["lm"]
_GGUF = (
    "the adapters were trained on the weights of a GGUF file, which PEFT can't apply them to; on the model that the file was "
    "made from, the outputs differ as its weights do (lora-jax export --format merged has the file's own)"
)
_COMMIT = "the adapters were trained on the commit {} of the base, which adapter_config.json can't say: give it as revision="
_LOCAL = (
    "the base was trained on from a directory or file: adapter_config.json names it {!r}, without the path on that machine, so "
    "load it from where it is on yours"
)
_BESIDE = (
    "the adapters were trained beside kernels quantised to {}; with the base as it is stored, or quantised by another library, "
    "the outputs differ by what the quantisation changes"
)
_QUANTIZED = {
    "peft": _BESIDE,
    "gguf": _BESIDE,
    "merged": "the adapters were trained beside kernels quantised to {} and are folded into the base as it is stored, so that "
    "the outputs differ by what the quantisation changes",
}
_SEVERAL = (
    "the pairs have several ranks or scales, as rank_pattern and alpha_pattern say; what goes by r and lora_alpha alone, as "
    "some servers do, scales them wrongly: adapters through lj.algebra.fold_scale and pad_rank need no patterns"
)
_GATED = "the gated MLPs have the names that transformers 5 gives them, which older versions can't read"
_LOSS = 0.01  # the share of the adapters' change from which on rounding is worth a note
_TASK_TYPES = {"classify": "SEQ_CLS", "lm": "CAUSAL_LM", "dpo": "CAUSAL_LM", "images": None}  # PEFT has none for images
_LAST_LAYERS = (".classifier.weight", ".classifier.out_proj.weight")  # of heads, in PEFT's files


def export_command(line: argparse.Namespace) -> int:
    """`lora-jax export`; returns the exit code."""
    out = line.out or line.run / line.format
    if line.push_to_hub is not None:
        hub_push.check(line.push_to_hub, line.private)
    elif line.private or line.commit_message is not None:
        raise InputError("--private and --commit-message need --push-to-hub: give it, or leave them out")
    notes = export(line.run, line.format, out, line.push_to_hub, line.base_model)
    size = sum(file.stat().st_size for file in out.iterdir())
    _report(f"written: {out} ({size:,} bytes)", notes)
    if line.push_to_hub is not None:
        message = line.commit_message or ("Upload model" if line.format == "merged" else "Upload adapters")
        print(f"pushed: {hub_push.push(out, line.push_to_hub, private=line.private, message=message)}")
    return 0


def import_command(line: argparse.Namespace) -> int:
    """`lora-jax import`; returns the exit code."""
    out = line.out or run.free_directory(pathlib.Path("runs"))
    return _report(f"run: {out}", import_(line.directory, line.model, out, line.untie))


def _report(done: str, notes: Sequence[str]) -> int:
    print(done)
    for note in notes:
        print(f"lora-jax: note: {note}", file=sys.stderr)
    return 0


def export(
    directory: pathlib.Path, form: str, out: pathlib.Path, repository: str | None = None, base_model: str | None = None
) -> tuple[str, ...]:
    """Write a run's adapters for PEFT or llama.cpp, or the base with the adapters folded in as a Hugging Face directory.

    Args:
      directory: the run.
      form: `"peft"`, `"gguf"`, or `"merged"`, which is the base as it is stored also where the run quantised it.
      out: a directory that is not there yet, or empty.
      repository: where on the hub the directory will be, as its model card says; the path of a base is left out then.
      base_model: what the hub calls the base, where the run has it from elsewhere.

    Returns:
      What the user should know about the files.

    Raises:
      InputError: there is no such run, its base is gone or changed, `out` has files, or the model can't be written so.
    """
    config = run.read_config(directory)
    files.check_empty(out)
    hub_base = _hub_base(config, form, base_model)
    if form == "gguf":
        gguf_export.check(directory, config)
    task = task_module(config)
    source = task.base_directory(config)
    # The sum of kernel and adapter is made in float32 and rounded once, to the base's own dtype.
    plain = dataclasses.replace(config, dtype="float32", quantize=None, block=None)
    base = task.load_base(source, plain, own=run.own_base(directory))
    adapters = run.load_adapters(directory, base.model.variables)
    notes = _notes(base) if config.quantize is None else (*_notes(base), _QUANTIZED[form].format(config.quantize))
    if form == "merged":
        return (*notes, *_rounding(_export_merged(config, base, adapters, source, out)), *_renamed(base))
    if form == "gguf":
        with files.fresh_directory(out) as fresh:
            return (*notes, *gguf_export.write(fresh, config, base, adapters, pathlib.PurePath(hub_base or source).name))
    name = hub_base or source.name
    stored = (_GGUF,) if source.is_file() else ()
    local = (_LOCAL.format(name),) if repository is not None and hub_base is None else ()
    commit = (_COMMIT.format(config.model_commit),) if config.model_commit else ()
    notes += (*stored, *local, *commit, *_several(adapters))
    of_run = {"config": config, "lines": metrics.read(directory), "name": directory.resolve().name, "repository": repository}
    step = run.trained_step(directory)
    card = model_card.Card(**of_run, step=step, notes=notes, base=name, is_of_the_hub=hub_base is not None)
    _export_peft(config, base, adapters, source, out, card)
    return notes


def _export_peft(
    config: RunConfig,
    base: Any,
    adapters: Mapping[str, Adapter],
    source: pathlib.Path,
    out: pathlib.Path,
    card: model_card.Card,
) -> None:
    tables = _own_embeddings(base)
    with files.fresh_directory(out) as directory:
        # Without a configuration every alpha is over r, rsLoRA's too: many readers of the format do not know `use_rslora`.
        peft.save(
            directory,
            {**tables, **adapters},
            names=base.model.names,
            base_model=card.base if card.is_of_the_hub or card.repository is not None else str(source),
            task_type=_TASK_TYPES[config.task],
            variables=_as_stored(base, source),
            changed=tables,
        )
        if base.own is not None:
            hf_export.write_tokenizer(directory, base.own, base.tokenizer)
        card.write(directory)


def _hub_base(config: RunConfig, form: str, given: str | None) -> str | None:
    """The base's repository on the hub, if it is from there or was given."""
    name = places.hub_name(config)
    if given is not None:
        if form == "merged":
            raise InputError("--base-model is for the formats peft and gguf, which name a base: leave it out")
        if hub.parse(given) != hub.HubName(given, None):
            raise InputError(f"--base-model is OWNER/NAME, what the hub calls the base, not {given!r}")
        if name is not None and name.repository != given:
            raise InputError(f"--base-model names {given}, but the run's base is {name.repository} of the hub: leave it out")
        return given
    return _ORIGINALS[config.task] if config.model is None else None if name is None else name.repository


def _own_embeddings(base: Any) -> dict[str, Adapter]:
    """What the run has in place of the base's embedding and head, as parameters that PEFT puts in their place, too."""
    stored = {} if base.own is None else run.own_embeddings(base.own)
    leaves = paths.flatten(base.model.variables)[0]
    return {path: Full(leaves[path]) for path, name in base.model.names.items() if name.name in stored}


def _as_stored(base: Any, source: pathlib.Path) -> Any:
    """The base's parameters in the dtypes of their tensors, of which PEFT's file may need some."""
    dtypes, names = hf_export.stored_dtypes(source), _file_names(base)
    leaves, treedef = paths.flatten(base.model.variables)
    first = {path: next(iter(names[path].tensors(leaf.shape).values())) for path, leaf in leaves.items()}
    stored = (leaf.astype(hf_export.stored_dtype(dtypes, first[path], leaf.dtype)) for path, leaf in leaves.items())
    return jax.tree.unflatten(treedef, list(stored))


def _several(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    scales = {(pair.rank, float(pair.scale)) for pair in adapters.values() if isinstance(pair, LowRank)}
    return (_SEVERAL,) if len(scales) > 1 else ()


def _export_merged(
    config: RunConfig, base: Any, adapters: Mapping[str, Adapter], source: pathlib.Path, out: pathlib.Path
) -> dict[str, tuple[float, float]]:
    _check_pooling(base)
    others: Iterable[tuple[str, np.ndarray]] = ()
    if isinstance(base, lm.Base):
        fields = hf_export.llama_fields(source, base.model.config)
        others = hf_export.other_parts(source, base.model.config)
    elif config.task == "images":
        family = vision_config.FAMILIES[base.model.config.family]
        fields = {**hf_export.labelled_fields(source, config.labels, family.architecture), **family.written}
    else:
        architecture = encoder_families.FAMILIES[base.model.config.model_type].architecture
        fields = hf_export.labelled_fields(source, config.labels, architecture)
    dtypes = hf_export.stored_dtypes(source)
    with files.fresh_directory(out) as directory:
        lost = hf_export.write(directory, base.model.variables, adapters, _file_names(base), fields, dtypes, others)
        hf_export.write_preprocessor(directory, source)
        if config.task != "images":
            hf_export.write_tokenizer(directory, base.own or source, base.tokenizer)
        if isinstance(base, lm.Base):
            generation = hf_export.generation_fields(source, base.model.config, lm.end_ids(base, config))
            hf_export.write_json(directory / "generation_config.json", generation)
            hf_export.name_end(directory, base.tokenizer, config.ends)
    return lost


def _rounding(lost: Mapping[str, tuple[float, float]]) -> tuple[str, ...]:
    """What to say of the share of the adapters' change that rounding to the base's dtype took, over all tensors."""
    errors, changes = (np.linalg.norm(sizes) for sizes in zip(*lost.values(), strict=True))
    share = float(errors / changes) if changes else 0.0
    if share < _LOSS:
        return ()
    return (
        f"the weights are rounded to the base's own dtype, which takes {share:.1%} off what the adapters change; --format peft "
        "keeps all of it",
    )


def _renamed(base: Any) -> tuple[str, ...]:
    return (_GATED,) if isinstance(base.model.config, vision.VisionConfig) and base.model.config.gated else ()


def _file_names(base: Any) -> dict[str, HFName]:
    """What the base's tensors are called in files, where transformers calls some otherwise in memory."""
    if isinstance(base.model.config, vision.VisionConfig):
        return vision.file_names(base.model.names, base.model.config)
    return llama.file_names(base.model) if isinstance(base.model, llama.Loaded) else base.model.names


def _pools_otherwise(base: Any) -> tuple[str, str] | None:
    """What the head of a sentence model reads, and transformers' class, whose head does not; `None` for all other models."""
    if not isinstance(base, classify.Base):
        return None
    config = base.model.config
    if config.pooling == "pooler" or config.head_act is not None:
        return None
    read = {"mean": "the mean of the tokens", "cls": "the first token"}[config.pooling]
    return read, encoder_families.FAMILIES[config.model_type].architecture


def _check_pooling(base: Any) -> None:
    otherwise = _pools_otherwise(base)
    if otherwise:
        read, architecture = otherwise
        raise InputError(
            f"the head of this model reads {read} alone, but transformers' {architecture} has more layers there and would give "
            "other logits: export the adapters with --format peft and apply them to a model that pools alike"
        )


def _notes(base: Any) -> tuple[str, ...]:
    otherwise = _pools_otherwise(base)
    if not otherwise:
        return ()
    read, architecture = otherwise
    return (
        f"the head of this model reads {read} alone; {architecture} has more layers there and would give other logits, so "
        "these adapters are for a model that pools alike",
    )


# --- import -----------------------------------------------------------------------------------------------------------


def import_(source: pathlib.Path, model: str | pathlib.Path, out: pathlib.Path, untie: bool = False) -> tuple[str, ...]:
    """Make a run of a PEFT directory.

    Args:
      source: the PEFT directory.
      model: the adapters' base: a Hugging Face directory, a name on the hub, or a `.gguf` file.
      out: the run's directory.
      untie: whether a head that is the embedding gets a kernel of its own.

    Returns:
      What the user should know about the run.

    Raises:
      InputError: there is no such base, the adapters do not fit it or can't be read, `untie` means nothing there, or `out` has
        files.
    """
    files.check_empty(out)
    source, named, model = source.absolute(), model_source(str(model)), hub.find(model)
    task = _task_of(model)
    if untie and task != "lm":
        raise InputError(f"{model} has no head that could be its embedding: leave --untie out")
    options: dict[str, Any] = {"task": task, "model": named, "imported": str(source), "max_length": 3, "untie": untie}
    if task != "lm":
        options["labels"] = [f"LABEL_{i}" for i in range(_head_size(source))]
    config = RunConfig(**options)
    base = task_module(config).load_base(model, config)
    options |= {"model_sha256": base.sha256, "model_commit": places.commit(config, model)}
    if task != "images":
        options["max_length"] = base.model.config.max_position_embeddings
    if task != "lm":
        options["labels"] = base.model.labels
    with files.fresh_directory(out) as directory:
        run.create(directory, RunConfig(**options))
        brought = () if task == "images" else adapter_files.keep(source, model, base, directory / "base")
        if brought:
            base = task_module(config).with_own(base, directory / "base")
        adapters = peft.load(source, base.model.variables, names=base.model.names)
        checkpoint.save(directory / "adapters", adapters, step=0)
    return (*_notes(base), *_named(source, named), *brought)


def _named(source: pathlib.Path, model: str) -> tuple[str, ...]:
    """What PEFT's files call the base, where that is another name than the one that was given."""
    named, given = files.read_json_object(source / "adapter_config.json").get("base_model_name_or_path"), hub.parse(model)
    if not isinstance(named, str) or hub.parse(named) is None or (given is not None and given.repository == named):
        return ()
    return (f"the adapters name {named} as their base; files of `lora-jax export --base-model {named}` name it, too",)


def _task_of(model: pathlib.Path) -> str:
    """`classify` for a text encoder, `images` for a vision model, else `lm`, whose loader says what it can't read."""
    file = model / "config.json"
    kind = files.read_json_object(file).get("model_type") if file.is_file() else None
    return "classify" if kind in encoder_families.FAMILIES else "images" if kind in vision.FAMILY else "lm"


def _head_size(source: pathlib.Path) -> int:
    """The outputs of the head in an adapter file; 0 if there is none, so that the base's own is kept.

    What is wrong with the file `peft.load` says.
    """
    try:
        with safetensors.safe_open(source / "adapter_model.safetensors", framework="numpy") as opened:
            heads = [name for name in opened.keys() if name.endswith(_LAST_LAYERS)]  # noqa: SIM118  not a dict
            shapes: Sequence[Sequence[int]] = [opened.get_slice(name).get_shape() for name in heads]
    except (OSError, safetensors.SafetensorError):
        return 0
    return int(np.prod(shapes[0][:1])) if shapes and len(shapes[0]) == 2 and shapes[0][0] < 100_000 else 0

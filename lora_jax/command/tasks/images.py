"""The task `images`: a ViT or DINOv2 with a head, on a folder of images for each label."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.adapters.init import init
from lora_jax.command.metrics import ACCURACY
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import labels, places
from lora_jax.command.tasks.base import Evaluation, Examples, Session, Task, check_weights, digest, with_steps
from lora_jax.core.adapter import Adapter
from lora_jax.core.errors import InputError
from lora_jax.core.transform import lora
from lora_jax.data import images, pixels
from lora_jax.data.images import Images
from lora_jax.data.pixels import Preprocessing
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.names import HFName
from lora_jax.models import vision
from lora_jax.models.vision_config import FAMILIES

_HELD_OUT = 1000
_TEST_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model and how its images become pixels; a run has no files of its own in their place, so `own` is `None`."""

    model: vision.Loaded
    preprocessing: Preprocessing
    sha256: str
    own: None = None


def location(config: RunConfig) -> pathlib.Path:
    """Where the run's base model is.

    Raises:
      InputError: the options do not say.
    """
    if config.model is None:
        raise InputError("--task images has no model of its own: give --model, a Hugging Face directory of a ViT or DINOv2")
    return places.location(config, pathlib.Path(config.model))


def base_directory(config: RunConfig) -> pathlib.Path:
    """Where the run's base model is, fetched if it is on the hub.

    Raises:
      InputError: the options do not say, it could not be fetched, or it is no longer where the run found it.
    """
    return places.find(config, lambda: location(config))


def load_base(directory: pathlib.Path, config: RunConfig, mesh: Mesh | None = None, own: pathlib.Path | None = None) -> Base:
    """The base model with a head for the run's labels, on the mesh if there is one; a run of images has no `own` files.

    Raises:
      InputError: the directory does not hold a ViT or DINOv2 and its preprocessing, or another one than the run was made with.
    """
    assert own is None
    model = vision.load(directory, dtype=jnp.dtype(config.dtype), **labels.loading(config, mesh, vision.shardings))
    weights = digest(directory)
    check_weights(config, directory, weights)
    processor = FAMILIES[model.config.family].processor
    return Base(model, pixels.read(directory, model.config.num_channels, processor), weights)


def names(config: RunConfig) -> dict[str, HFName]:
    """What Hugging Face calls the parameters of the run's base, by path."""
    return load_base(base_directory(config), config).model.names


def load_images(config: RunConfig) -> tuple[Images, Images | None]:
    """The run's data, and what is held out apart from it.

    Raises:
      InputError: the options do not say where, or it can't be read.
    """
    if config.data is None:
        raise InputError("--task images has no data of its own: give --data, a folder with a folder of images for each label")
    if not isinstance(config.data, str):
        raise InputError(f"--task images takes one folder as --data, not {len(config.sources)}: put them into one")
    return images.read(config.data), None if config.eval_data is None else images.read(config.eval_data)


def prepare(config: RunConfig, mesh: Mesh | None = None) -> Session:
    """Check everything and bring it into memory, on the mesh if there is one.

    Raises:
      InputError: any of it can't be used.
    """
    source, (found, held_out) = base_directory(config), load_images(config)
    config = labels.of_data(config, found, held_out)
    base = load_base(source, config, mesh)
    config = labels.of_base(config, source, base)
    config = _check_preprocessing(config, base.preprocessing)
    for part in (found, held_out):
        if part is not None:
            images.check(part, base.preprocessing)
    training, test = (found, held_out) if held_out else images.split(found, min(_HELD_OUT, len(found) // 3))
    config = with_steps(config, len(training))
    task = _task(config, base, training, test, mesh)
    return Session(config, task, functools.partial(_init, base), base.model.names)


def _check_preprocessing(config: RunConfig, preprocessing: Preprocessing) -> RunConfig:
    """The options with the digest of how images become pixels.

    Raises:
      InputError: the run was made with other pixels.
    """
    found = hashlib.sha256(repr(dataclasses.astuple(preprocessing)).encode()).hexdigest()
    if config.tokens_sha256 not in ("", found):
        raise InputError(
            f"the {checkpoint_files.PREPROCESSOR} of the run's model has changed, so the run can't go on: put it back, or "
            "start a new one"
        )
    return dataclasses.replace(config, tokens_sha256=found)


def _init(base: Base, config: RunConfig) -> dict[str, Adapter]:
    """The adapters that a run begins with; where the head is new, its seed is the run's."""
    image = jax.ShapeDtypeStruct((2, *base.preprocessing.shape), jnp.float32)
    variables = vision.with_new_head(base.model, config.seed).variables
    return init(jax.random.key(config.seed), config.lora, base.model.apply, variables, image)


def _task(config: RunConfig, base: Base, training: Images, test: Images, mesh: Mesh | None) -> Task:
    model, preprocessing, test_size = base.model, base.preprocessing, sharding.round_up(mesh, _TEST_BATCH)
    head = "a new head" if model.new else "the checkpoint's head"
    height, width, _ = preprocessing.shape
    batches = functools.partial(images.train_batches, training, config.labels, preprocessing, config.batch_size)
    assert config.model is not None and config.data is not None
    return Task(
        variables=model.variables,
        loss=functools.partial(_loss, model.apply),
        train_batches=lambda seed: batches(seed, least=config.crop, flip=config.flip, mesh=mesh),
        measure=functools.partial(_measure, model.apply),
        test_batches=lambda: images.eval_batches(test, config.labels, preprocessing, test_size, mesh),
        test_count=-(-len(test) // test_size),
        score=labels.accuracy,
        metric=ACCURACY,
        per_step=config.batch_size,
        unit="examples",
        description=(
            f"{len(training)} images to train on, {len(test)} to test on, of {height} x {width} pixels",
            _changes(config),
            f"{head} for the labels {', '.join(config.labels)}",
        ),
        held_out=f"{len(test)} images",
        title=f"{pathlib.Path(config.model).name} on {config.data_name}",
        examples=_examples(config, base, test, mesh),
        baseline=labels.baseline(test.indices(config.labels)),
    )


def _examples(config: RunConfig, base: Base, test: Images, mesh: Mesh | None) -> Examples:
    some = images.take(test, labels.few(test.indices(config.labels)))
    size = sharding.round_up(mesh, len(some))
    shown = [
        {"text": file.name, "label": label, "picture": pixels.thumbnail(base.preprocessing.open(file))}
        for file, label in zip(some.files, some.labels)
    ]
    batches = lambda: images.eval_batches(some, config.labels, base.preprocessing, size, mesh)
    return labels.examples(config.labels, shown, functools.partial(_logits, base.model.apply), lambda: next(batches()))


def evaluation(config: RunConfig, base: Base, file: pathlib.Path) -> Evaluation:
    """How a run is measured on all images of a folder.

    Raises:
      InputError: it can't be read, or has other labels than the run.
    """
    test = images.read(file)
    labels.check_of_run(config, file, test.classes())
    images.check(test, base.preprocessing)
    return Evaluation(
        measure=functools.partial(_measure, base.model.apply),
        batches=lambda: images.eval_batches(test, config.labels, base.preprocessing, _TEST_BATCH),
        report=functools.partial(labels.report, config.labels),
        data=f"{len(test):,} images",
    )


def _changes(config: RunConfig) -> str:
    crops = f"random crops of {config.crop:.0%} to all of an image" if config.crop < 1 else "no crops"
    return f"in training: {crops}, {'mirrored half of the time' if config.flip else 'never mirrored'}"


def _loss(apply: Any, params: Any, batch: Mapping[str, jax.Array], key: jax.Array) -> jax.Array:
    return labels.cross_entropy(lora(apply, key=key)(params, batch["pixel_values"]), batch)


def _logits(apply: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return lora(apply)(params, batch["pixel_values"])


def _measure(apply: Any, params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
    return labels.confusion(_logits(apply, params, batch), batch)

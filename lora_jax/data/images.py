"""Labelled images for `lora-jax finetune`: a folder per label, splitting, and batches of pixels.

The training batches are a `grain` pipeline whose position is a small JSON value: the same seed and position always give the
same batch, random crops and flips included.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.core import files
from lora_jax.core.errors import InputError, MissingError
from lora_jax.data import fetch, labelled
from lora_jax.data.pixels import Preprocessing
from lora_jax.huggingface.names import listing

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_THREADS = min(16, os.cpu_count() or 1)
_AHEAD = 4  # batches


@dataclasses.dataclass(frozen=True)
class Images:
    """Image files, and the label and the SHA-256 of each."""

    files: tuple[pathlib.Path, ...]
    labels: tuple[str, ...]
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def classes(self) -> tuple[str, ...]:
        """The distinct labels, sorted."""
        return tuple(sorted(set(self.labels)))

    def digest(self) -> str:
        """A SHA-256 of all images and labels, in hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.digests, self.labels]).encode()).hexdigest()

    def indices(self, classes: Sequence[str]) -> np.ndarray:
        """The index of each image's label among the classes, `(images,)`."""
        return np.array([classes.index(label) for label in self.labels], np.int32)


def read(folder: str | pathlib.Path) -> Images:
    """The images of a folder, whose folders are the labels. Hidden files and folders are passed over.

    Raises:
      MissingError: there is no such folder.
      InputError: a file that is no image or lies in no label's folder, a label without images, or no labels.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise MissingError(f"there is no folder {folder}: images need one with a folder for each label")
    with files.reading(folder):
        labels = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
        if stray := [entry.name for entry in labels if not entry.is_dir()]:
            raise InputError(
                f"{folder} has the files {listing(stray)} beside the labels' folders: move them into these, or away"
            )
        found = [(file, label.name) for label in labels for file in _below(label)]
    if not labels:
        raise InputError(f"{folder} has no folders: images need one for each label")
    if empty := [label.name for label in labels if label.name not in {name for _, name in found}]:
        raise InputError(f"{folder}: the folders {listing(empty)} hold no images: fill or remove them")
    if odd := [str(file.relative_to(folder)) for file, _ in found if file.suffix.lower() not in SUFFIXES]:
        raise InputError(f"{folder}: {listing(odd)} are no images ({', '.join(SUFFIXES)}): remove them")
    paths, names = zip(*found)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        return Images(paths, names, tuple(threads.map(fetch.sha256, paths)))


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of a folder and of those in it, in the order of their names."""
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry)
        else:
            yield entry


def check(images: Images, preprocessing: Preprocessing) -> None:
    """Raise an InputError unless every image can be read."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        for _ in threads.map(lambda file: preprocessing.open(file).close(), images.files):
            pass


def split(images: Images, held_out: int, seed: int = 0) -> tuple[Images, Images]:
    """Training and test images by a fixed seed; the same image is never on both sides.

    Args:
      held_out: how many images to test on, at most.

    Raises:
      InputError: a class has no image left to train on, or there is nothing to test on.
    """
    test = labelled.held_out_rows(images.digests, images.labels, held_out, seed)
    return take(images, np.flatnonzero(~test)), take(images, np.flatnonzero(test))


def take(images: Images, rows: np.ndarray) -> Images:
    """Some of the images, by their numbers."""
    files, labels, digests = (images.files, images.labels, images.digests)
    return Images(tuple(files[i] for i in rows), tuple(labels[i] for i in rows), tuple(digests[i] for i in rows))


def train_batches(
    images: Images,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    batch_size: int,
    seed: int,
    *,
    least: float,
    flip: bool,
    mesh: Mesh | None = None,
) -> grain.DatasetIterator[dict[str, Any]]:
    """Endless training batches: every epoch shuffled, `pixel_values` `(rows, height, width, channels)` and `labels` `(rows,)`.

    The last rows of an epoch that fill no batch are left out of it. The iterator's `get_state()` is JSON-able, and `set_state`
    goes on from it. On a mesh the batches are the same, and each process makes its own rows alone.

    Args:
      images: what to learn.
      classes: the labels, in the order of the logits.
      preprocessing: how images become pixels.
      batch_size: the rows of a batch.
      seed: of the order, the crops and the flips.
      least: the smallest share of an image that a random crop keeps; 1: no crops.
      flip: whether images are mirrored half of the time.
      mesh: the devices.
    """
    places, labels = sharding.batch_rows(mesh, batch_size), images.indices(classes)
    stream = grain.MapDataset.range(len(images)).seed(seed).shuffle().repeat()
    per_epoch = max(1, len(images) // batch_size)

    def batch(index: int) -> dict[str, Any]:
        epoch, place = divmod(int(index), per_epoch)
        numbers = epoch * len(images) + place * batch_size + places
        rows = np.array([stream[int(number)] for number in numbers])
        draws = [np.random.default_rng((seed, int(number))) for number in numbers]
        opened = (preprocessing.open(images.files[row]) for row in rows)
        pixels = [preprocessing.random_pixels(image, draw, least, flip) for image, draw in zip(opened, draws)]
        return sharding.place_batch(mesh, {"pixel_values": np.stack(pixels), "labels": labels[rows]}, batch_size)

    batches = grain.MapDataset.range(sys.maxsize).map(batch)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)))


def eval_batches(
    images: Images, classes: Sequence[str], preprocessing: Preprocessing, batch_size: int, mesh: Mesh | None = None
) -> Iterator[dict[str, Any]]:
    """Every image once, in batches of one size; rows that fill up the last have the label -1. On a mesh as for training."""
    places, labels = sharding.batch_rows(mesh, batch_size), images.indices(classes)
    for start in range(0, len(images), batch_size):
        rows = start + places
        held = rows < len(images)
        part = {
            "pixel_values": np.zeros((len(places), *preprocessing.shape), np.float32),
            "labels": np.full(len(places), -1, np.int32),
        }
        for place, row in zip(np.flatnonzero(held), rows[held]):
            part["pixel_values"][place] = preprocessing.pixels(preprocessing.open(images.files[row]))
            part["labels"][place] = labels[row]
        yield sharding.place_batch(mesh, part, batch_size)

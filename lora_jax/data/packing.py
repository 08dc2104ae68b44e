"""Rows of packed documents, and batches of rows.

Several documents share a row, each with a segment number and positions of its own, so that none of them sees another.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh

from lora_jax import sharding
from lora_jax.data.language import Document
from lora_jax.data.mixing import Mix

_OPEN = 64  # rows that are looked through for a free place


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Packed documents; all arrays are `(rows, length)`, or of preferences `(pairs, 2, length)`.

    Args:
      input_ids: int32 token ids; 0 in what is left free.
      segment_ids: int32, 1, 2, ... for the documents of a row, 0 in what is left free.
      positions: int32, the place of a token in its document.
      targets: whether a token is learnt.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, rows: np.ndarray, size: int, places: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """These rows, and free ones up to the size; with places, which grow, those of this batch alone."""
        places = np.arange(size) if places is None else places
        held = rows[places[places < len(rows)]]
        free = len(places) - len(held)

        def fill(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array[held], np.zeros((free, *array.shape[1:]), array.dtype)])

        return {field.name: fill(getattr(self, field.name)) for field in dataclasses.fields(self)}


def pack(documents: Sequence[Document], length: int) -> PackedRows:
    """Put documents into rows: each into the first of the last few rows that has room for it.

    >>> three = [Document(np.full(n, n, np.int32), np.arange(n) > 0) for n in (3, 4, 2)]
    >>> rows = pack(three, length=5)
    >>> rows.input_ids.tolist(), rows.segment_ids.tolist(), rows.positions[0].tolist()
    ([[3, 3, 3, 2, 2], [4, 4, 4, 4, 0]], [[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]], [0, 1, 2, 0, 1])
    """
    places: list[list[Document]] = []
    free: list[tuple[int, int]] = []  # the rows that are still open, and their room
    for document in documents:
        size = len(document.tokens)
        found = next((i for i, (_, room) in enumerate(free) if room >= size), None)
        if found is None:
            found = len(free)
            free.append((len(places), length))
            places.append([])
        row, room = free[found]
        places[row].append(document)
        free[found] = (row, room - size)
        free = [(row, room) for row, room in free[-_OPEN:] if room > 1]
    return _fill(places, length)


def pack_sources(documents: Sequence[Document], length: int, count: int) -> tuple[PackedRows, np.ndarray]:
    """Rows of which each has documents of one of `count` sources, and the source of each row, `(rows,)`."""
    parts = [pack([document for document in documents if document.source == i], length) for i in range(count)]
    arrays = {field.name: [getattr(part, field.name) for part in parts] for field in dataclasses.fields(PackedRows)}
    whole = PackedRows(**{name: np.concatenate(own) for name, own in arrays.items()})
    return whole, np.repeat(np.arange(count), [len(part) for part in parts])


def pair_up(pairs: Sequence[tuple[Document, Document]], length: int) -> PackedRows:
    """Two documents that belong together, a row each: arrays `(pairs, 2, length)`.

    >>> one, two = (Document(np.full(n, n, np.int32), np.arange(n) > 0) for n in (3, 2))
    >>> pair_up([(one, two)], length=4).input_ids.tolist()
    [[[3, 3, 3, 0], [2, 2, 0, 0]]]
    """
    rows = _fill([[document] for pair in pairs for document in pair], length)
    two = lambda array: array.reshape(len(pairs), 2, length)
    return PackedRows(**{field.name: two(getattr(rows, field.name)) for field in dataclasses.fields(rows)})


def _fill(places: Sequence[Sequence[Document]], length: int) -> PackedRows:
    shape = (len(places), length)
    ids, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    targets = np.zeros(shape, bool)
    for row, documents in enumerate(places):
        start = 0
        for number, document in enumerate(documents, 1):
            end = start + len(document.tokens)
            ids[row, start:end], targets[row, start:end] = document.tokens, document.targets
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)
            start = end
    return PackedRows(ids, segments, positions, targets)


def train_batches(
    rows: PackedRows, batch_size: int, seed: int, mesh: Mesh | None = None, mix: Mix | None = None
) -> grain.DatasetIterator[dict[str, Any]]:
    """Endless training batches, every epoch shuffled; a batch may begin in one epoch and end in the next.

    The iterator's `get_state()` is JSON-able, and `set_state` goes on from it. On a mesh the batches are the same, and each
    process makes its own rows alone. A mix says how often rows are drawn.
    """
    order = (Mix(np.zeros(len(rows), int)) if mix is None else mix).rows(seed)

    def batch(index: int) -> dict[str, Any]:
        start = int(index) * batch_size
        return _batch(rows, np.array([order[start + i] for i in range(batch_size)]), batch_size, mesh)

    batches = grain.MapDataset.range(sys.maxsize).map(batch)  # `.batch(1)` of an endless one is longer than Python takes
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=0)))


def eval_batches(rows: PackedRows, batch_size: int, mesh: Mesh | None = None) -> Iterator[dict[str, Any]]:
    """Every row once, in batches of one size; on a mesh as for `train_batches`."""
    for start in range(0, len(rows), batch_size):
        yield _batch(rows, np.arange(start, min(start + batch_size, len(rows))), batch_size, mesh)


def _batch(rows: PackedRows, numbers: np.ndarray, size: int, mesh: Mesh | None) -> dict[str, Any]:
    return sharding.place_batch(mesh, rows.batch(numbers, size, sharding.batch_rows(mesh, size)), size)

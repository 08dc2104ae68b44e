"""The order of training examples, which may be from several sources with weights."""

import dataclasses

import grain
import numpy as np

from lora_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Mix:
    """Which examples are drawn, and how often.

    Args:
      sources: the number of the source of each example, `(examples,)`.
      weights: how often an epoch draws the examples of each source, on average; empty: once.

    Raises:
      InputError: a source has no examples.

    >>> Mix(np.array([0, 0, 0, 1]), (1.0, 2.0)).epoch
    5
    """

    sources: np.ndarray
    weights: tuple[float, ...] = ()

    def __post_init__(self):
        counts = np.bincount(self.sources, minlength=len(self.weights))
        if self.weights and not counts.all():
            raise InputError(f"the data's source {int(np.argmin(counts)) + 1} has no examples left to train on: leave it out")

    @property
    def epoch(self) -> int:
        """How many examples an epoch draws."""
        if not self.weights:
            return len(self.sources)
        return max(1, round(float(np.array(self.weights)[self.sources].sum())))

    def rows(self, seed: int) -> grain.MapDataset:
        """The numbers of the examples, endless: each source is shuffled anew whenever it was drawn in whole."""
        if not self.weights:
            return grain.MapDataset.range(len(self.sources)).seed(seed).shuffle().repeat()
        parts = [np.flatnonzero(self.sources == i) for i in range(len(self.weights))]
        drawn = [grain.MapDataset.range(len(part)).seed(seed).shuffle().repeat().map(part.__getitem__) for part in parts]
        return grain.MapDataset.mix(drawn, weights=[weight * len(part) for weight, part in zip(self.weights, parts)])

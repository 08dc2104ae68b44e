"""Rotary positions: the frequencies of a decoder's heads, and how models stretch them to longer texts.

Pairs of a head's values are turned by `position * frequency`, with the frequencies `theta^(-2i / dim)`
(https://arxiv.org/abs/2104.09864).
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling(abc.ABC):
    """How the frequencies are changed; the classes below say how.

    Args:
      attention_factor: what the cosines and sines are multiplied by.
    """

    attention_factor: float = 1.0

    @abc.abstractmethod
    def frequencies(self, theta: float, dim: int, length: Any) -> Any:
        """The scaled frequencies `(dim / 2,)` of texts of `length` tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope(Scaling):
    """All rotary frequencies divided by `factor`."""

    factor: float

    def frequencies(self, theta: float, dim: int, length: Any) -> np.ndarray:
        """The scaled frequencies."""
        return plain(theta, dim) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope(Scaling):
    """Llama 3's scaling of the rotary frequencies, by wavelength against the length of pretraining.

    Wavelengths below `original / high` stay, those above `original / low` are divided by `factor`, with a smooth step between.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, length: Any) -> np.ndarray:
        """The scaled frequencies."""
        return self.scale(plain(theta, dim))

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """These frequencies, scaled."""
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        length = 2 * np.pi / frequencies
        smooth = np.clip((original / length - low) / (high - low), 0, 1)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        scaled = np.where(length > original / low, frequencies / self.factor, between)
        return np.where(length < original / high, frequencies, scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRope(Scaling):
    """YaRN (https://arxiv.org/abs/2309.00071): fast frequencies stay, slow ones are divided by `factor`, with a ramp between.

    Args:
      beta_fast: turns over the length of pretraining above which a frequency stays.
      beta_slow: turns below which it is divided.
      truncate: whether the ends of the ramp are whole places.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def frequencies(self, theta: float, dim: int, length: Any) -> np.ndarray:
        """The scaled frequencies."""
        low, high = (self._place(turns, theta, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = (np.arange(dim // 2, dtype=np.float32) - low) / ((high - low) or 0.001)
        slow, unscaled = np.clip(ramp, 0, 1), plain(theta, dim)
        return unscaled / self.factor * slow + unscaled * (1 - slow)

    def _place(self, turns: float, theta: float, dim: int) -> float:
        """The place of the frequency that makes so many turns over the length of pretraining."""
        return dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRope(Scaling):
    """A larger base for texts that are longer than those of pretraining ("dynamic NTK")."""

    factor: float
    original_max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, length: Any) -> jax.Array:
        """The scaled frequencies."""
        original = self.original_max_position_embeddings
        longer = jnp.maximum(length, original).astype(jnp.float32)
        base = theta * (self.factor * longer / original - (self.factor - 1)) ** (dim / (dim - 2))
        return 1 / base ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(Scaling):
    """LongRoPE (https://arxiv.org/abs/2402.13753): a divisor for each frequency, others for texts above the original length."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int

    def frequencies(self, theta: float, dim: int, length: Any) -> jax.Array:
        """The scaled frequencies."""
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != dim // 2:
                raise InputError(f"the rope scaling's {name} has {len(getattr(self, name))} numbers; {dim // 2} are needed")
        short, long = (plain(theta, dim) / np.array(factors, np.float32) for factors in (self.short_factor, self.long_factor))
        return jnp.where(length > self.original_max_position_embeddings, long, short)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer: the base of the frequencies, and their scaling, if any.

    >>> Rope(10000.0).frequencies(4, 8).tolist()
    [1.0, 0.009999999776482582]
    """

    theta: float
    scaling: Scaling | None = None

    def frequencies(self, dim: int, length: Any) -> Any:
        """The frequencies `(dim / 2,)` in float32 for texts of `length` tokens."""
        if self.scaling is None:
            return plain(self.theta, dim)
        return jnp.asarray(self.scaling.frequencies(self.theta, dim, jnp.asarray(length)), jnp.float32)


def plain(theta: float, dim: int) -> np.ndarray:
    """The frequencies `theta^(-2i / dim)`: `(dim / 2,)` in float32."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1 / np.float32(theta) ** exponents).astype(np.float32)


def turns(rope: Rope | None, dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cosines and sines `(batch, length, 1, dim / 2)` of positions `(batch, length)`; without a rope no turn at all."""
    if rope is None:
        still = jnp.zeros((*positions.shape, 1, dim // 2), jnp.float32)
        return still + 1, still
    angles = positions[:, :, None, None].astype(jnp.float32) * rope.frequencies(dim, positions.max() + 1)[None, None, None]
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + half) of the first values of each head, as many as there are angles for; the others stay."""
    dim = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :dim].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if dim == x.shape[-1] else jnp.concatenate([turned, x[..., dim:]], axis=-1)

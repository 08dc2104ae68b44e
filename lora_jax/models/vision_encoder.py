"""The vision encoder: a Linen model whose parts the configuration chooses."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.stacking import Remat, again, scanned
from lora_jax.models.vision_config import Size, VisionConfig


class VisionAttention(nn.Module):
    """Multi-head self-attention of all patches: `(batch, length, hidden)`."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        config, dense = self.config, functools.partial(nn.Dense, param_dtype=self.param_dtype)
        width = config.num_attention_heads * config.head_dim
        by_head = (*x.shape[:-1], config.num_attention_heads, config.head_dim)
        project = functools.partial(dense, width, use_bias=config.qkv_bias)
        query, key, value = (project(name=name)(x).reshape(by_head) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        weights = nn.softmax(scores / math.sqrt(config.head_dim)).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:-1], width)
        return dense(config.hidden_size, name="out")(mixed)


class VisionMLP(nn.Module):
    """Two dense layers, or with a gate three: `(batch, length, hidden)`."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        config, dense = self.config, functools.partial(nn.Dense, param_dtype=self.param_dtype)
        hidden = dense(config.intermediate_size, name="up")(x)
        if config.gated:
            hidden = nn.silu(dense(config.intermediate_size, name="gate")(x)) * hidden
        else:
            hidden = FUNCTIONS[config.hidden_act](hidden)
        return dense(config.hidden_size, name="down")(hidden)


class VisionLayer(nn.Module):
    """One encoder layer, `x -> (x, None)`: norms before, and what is added may be scaled."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        for part, place, norm in ((VisionAttention, "attention", "norm_before"), (VisionMLP, "mlp", "norm_after")):
            change = part(self.config, self.param_dtype, name=place)(_norm(self, norm)(x))
            if self.config.layer_scales:
                scale = self.param(f"scale_{place}", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
                change = change * scale[None, None]
            x = x + change
        return x, None


class VisionEncoder(nn.Module):
    """All encoder layers, one by one or scanned."""

    config: VisionConfig
    param_dtype: Any
    scan_layers: bool
    remat: Remat | None

    @nn.compact
    def __call__(self, x):
        layer, count = again(VisionLayer, self.remat, self.scan_layers), self.config.num_hidden_layers
        if self.scan_layers:
            return scanned(layer, count)(self.config, self.param_dtype, name="layers")(x)[0]
        for i in range(count):
            x, _ = layer(self.config, self.param_dtype, name=f"layer_{i}")(x)
        return x


class VisionEmbeddings(nn.Module):
    """The class token and the patches of `(batch, height, width, channels)`, with positions: `(batch, length, hidden)`."""

    config: VisionConfig
    param_dtype: Any

    @nn.compact
    def __call__(self, pixel_values):
        config, (rows, columns) = self.config, self.config.grid
        normal, size, dtype = nn.initializers.normal(config.initializer_range), config.hidden_size, self.param_dtype
        token = self.param("cls_token", normal, (1, 1, size), dtype)
        table = self.param("position", normal, (1, rows * columns + 1, size), dtype)
        window = {"strides": config.patch_size, "padding": "VALID", "param_dtype": dtype}
        patches = nn.Conv(size, config.patch_size, **window, name="patch")(pixel_values)
        batch, *grid, _ = patches.shape
        tokens = jnp.broadcast_to(token, (batch, 1, size))
        x = jnp.concatenate([tokens, patches.reshape(batch, -1, size)], axis=1)
        return x + _positions(table, (rows, columns), tuple(grid))


class Vision(nn.Module):
    """An encoder with a classification head: pixels `(batch, height, width, channels)` -> logits `(batch, num_labels)`.

    The pixels are floats, normalised as the checkpoint's `preprocessor_config.json` says. Images of another size than its own
    get interpolated position embeddings, as transformers makes them (for ViT: with `interpolate_pos_encoding=True`).

    Args:
      config: its sizes and parts.
      param_dtype: the dtype of the parameters, and of the computation but for attention weights.
      scan_layers: whether the layers' parameters are stacked, and scanned over.
      remat: what the backward pass computes again, as in `load`.

    >>> from lora_jax.models.vision_config import read_config
    >>> sizes = dict(hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
    >>> model, pixels = Vision(read_config({"model_type": "vit", **sizes}, num_labels=3)), jnp.ones((2, 8, 8, 3))
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), pixels)
    >>> jax.eval_shape(model.apply, variables, pixels).shape
    (2, 3)
    """

    config: VisionConfig
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: Remat | None = None

    @nn.compact
    def __call__(self, pixel_values):
        """The logits of each image.

        Args:
          pixel_values: `(batch, height, width, channels)`, floats.

        Raises:
          InputError: the pixels are of another shape, or no floats.
        """
        config = self.config
        _check_pixels(config, pixel_values)
        x = VisionEmbeddings(config, self.param_dtype, name="embeddings")(pixel_values.astype(self.param_dtype))
        x = VisionEncoder(config, self.param_dtype, self.scan_layers, self.remat, name="encoder")(x)
        x = _norm(self, "norm")(x)
        read = [x[:, 0], x[:, 1:].mean(1)] if config.patches_in_head else [x[:, 0]]
        return nn.Dense(config.num_labels, param_dtype=self.param_dtype, name="classifier")(jnp.concatenate(read, axis=-1))


def _norm(module: Any, name: str) -> nn.LayerNorm:
    eps = module.config.layer_norm_eps
    return nn.LayerNorm(epsilon=eps, param_dtype=module.param_dtype, use_fast_variance=False, name=name)


def _check_pixels(config: VisionConfig, pixel_values: Any) -> None:
    shape, dtype = pixel_values.shape, pixel_values.dtype
    fits = len(shape) == 4 and shape[-1] == config.num_channels
    if not fits or any(size < least for size, least in zip(shape[1:3], config.patch_size)):
        least = " x ".join(map(str, config.patch_size))
        raise InputError(
            f"pixel_values has the shape {shape}; it must be (batch, height, width, {config.num_channels}) of {least} "
            "pixels or more (PyTorch has the channels second: transpose by (0, 2, 3, 1))"
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"pixel_values has the dtype {dtype}; it must be floats, normalised as the checkpoint's images are")


def _positions(table: jax.Array, grid: Size, wanted: tuple[int, ...]) -> jax.Array:
    """The position embeddings `(1, length, hidden)` for a grid of patches, interpolated where it is not their own."""
    if grid == wanted:
        return table
    if grid[0] != grid[1]:
        raise InputError(
            f"the positions of {grid[0]} x {grid[1]} patches can't be interpolated: give images of the model's own size"
        )
    by_place = table[0, 1:].reshape(*grid, -1).astype(jnp.float32)
    rows, columns = (jnp.asarray(_bicubic(old, new)) for old, new in zip(grid, wanted))
    found = jnp.einsum("rh,cw,hwd->rcd", rows, columns, by_place).astype(table.dtype)
    return jnp.concatenate([table[:, :1], found.reshape(1, -1, table.shape[-1])], axis=1)


def _bicubic(old: int, new: int) -> np.ndarray:
    """The matrix `(new, old)` that interpolates a line as PyTorch does: cubic convolution with a = -0.75, edges repeated."""
    place = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for shift in range(-1, 3):
        source = np.floor(place).astype(int) + shift
        x = np.abs(place - source)
        near, far = (1.25 * x - 2.25) * x**2 + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(matrix, (np.arange(new), np.clip(source, 0, old - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)

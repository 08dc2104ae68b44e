"""Images as a checkpoint wants them, by its `preprocessor_config.json`, with random crops and flips in training.

Pillow reads and resizes them, in bytes, as transformers' own image processors for ViT and DINOv2 do.
"""

import base64
import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from lora_jax.core.errors import InputError, within
from lora_jax.huggingface import checkpoint_files
from lora_jax.huggingface.names import listing

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_WIDE_MODES = ("I", "F")  # and "I;16", ...: Pillow cuts their values off at 255
_RATIO = 4 / 3  # the sides of a random crop are out of proportion by this at most
# What is left out is what transformers has for it.
_COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
_VIT = {**_COMMON, "size": 224, "resample": 2, "do_center_crop": False, "image_mean": 0.5, "image_std": 0.5, "crop_size": None}
_BIT = {
    **_COMMON,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": 224,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_PROCESSORS = {
    "ViTImageProcessor": _VIT,
    "ViTFeatureExtractor": _VIT,
    "ViTImageProcessorFast": _VIT,
    "BitImageProcessor": _BIT,
    "BitImageProcessorFast": _BIT,
}
_IDLE = {"image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "default_to_square"}
_IDLE |= {"data_format", "input_data_format", "device", "return_tensors", "disable_grouping"}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes pixels.

    Args:
      channels: 1 (grey), 3 (red, green, blue) or 4 (and alpha).
      size: (height, width) that images are resized to; or the length of their shorter side.
      crop: (height, width) of the middle that is kept; `None`: all.
      resample: Pillow's number of the filter.
      scale: what bytes are multiplied by; then `mean` is taken off and the rest divided by `std`: `(channels,)` each.
    """

    channels: int
    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The (height, width, channels) of the pixels."""
        size = self.crop or self.size
        assert isinstance(size, tuple)
        return *size, self.channels

    def open(self, file: pathlib.Path) -> PIL.Image.Image:
        """An image file, upright and with the right channels.

        Raises:
          InputError: it can't be read, or has more than eight bits for a channel.
        """
        try:
            with PIL.Image.open(file) as image:
                if image.mode.startswith(_WIDE_MODES):
                    raise InputError(f"{file} has more than 8 bits for each channel (mode {image.mode}): convert it to 8")
                return PIL.ImageOps.exif_transpose(image).convert(_MODES[self.channels])
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{file} can't be read as an image ({error}): mend or remove it") from None

    def pixels(self, image: PIL.Image.Image) -> np.ndarray:
        """The pixels of a whole image, as for tests and predictions: `(height, width, channels)` in float32."""
        width, height = image.size
        if isinstance(self.size, tuple):
            rows, columns = self.size
        else:
            rows, columns = (int(self.size * side / min(width, height)) for side in (height, width))
        image = image.resize((columns, rows), self._filter)
        if self.crop is not None:
            top, left = ((side - kept) // 2 for side, kept in zip((rows, columns), self.crop))
            image = image.crop((left, top, left + self.crop[1], top + self.crop[0]))
        return self._normalised(image)

    def random_pixels(self, image: PIL.Image.Image, draw: np.random.Generator, least: float, flip: bool) -> np.ndarray:
        """The pixels of a random part of an image, mirrored half of the time, as for training.

        Args:
          image: the image.
          draw: the source of what is random.
          least: the smallest share of the image's area that is kept; 1: there are no crops.
          flip: whether to mirror.
        """
        mirrored = flip and draw.random() < 0.5
        if least < 1:
            box = _random_box(self._proportioned(image), image.size, draw, least)
            found = self._normalised(image.resize((self.shape[1], self.shape[0]), self._filter, box=box))
        else:
            found = self.pixels(image)
        return found[:, ::-1] if mirrored else found

    @property
    def _filter(self) -> PIL.Image.Resampling:
        return PIL.Image.Resampling(self.resample)

    def _proportioned(self, image: PIL.Image.Image) -> tuple[float, float]:
        """The (width, height) of the largest part that keeps its proportions, or of all where none does."""
        width, height = image.size
        if isinstance(self.size, tuple):
            return width, height
        fit = min(width / self.shape[1], height / self.shape[0])
        return fit * self.shape[1], fit * self.shape[0]

    def _normalised(self, image: PIL.Image.Image) -> np.ndarray:
        pixels = np.asarray(image, np.float32).reshape(self.shape) * np.float32(self.scale)
        return (pixels - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


def thumbnail(image: PIL.Image.Image, side: int = 112) -> str:
    """A small JPEG of an image as a `data:` URL."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    small.save(file, format="JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _random_box(
    largest: tuple[float, float], whole: tuple[int, int], draw: np.random.Generator, least: float
) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a random part of an image of this (width, height)."""
    share, ratio = draw.uniform(least, 1), math.exp(draw.uniform(-1, 1) * math.log(_RATIO))
    width, height = (side * min(1, math.sqrt(share * way)) for side, way in zip(largest, (ratio, 1 / ratio)))
    left, top = (draw.uniform(0, side - part) for side, part in zip(whole, (width, height)))
    return left, top, left + width, top + height


def read(directory: pathlib.Path, channels: int, processor: str) -> Preprocessing:
    """The preprocessing of a checkpoint.

    Args:
      directory: the checkpoint, with a `preprocessor_config.json`.
      channels: of the model.
      processor: the class of its image processor, where the file names none.

    Raises:
      MissingError: there is no such file.
      InputError: a field is out of range, or asks for what is not known here.
    """
    fields = checkpoint_files.read_json(directory, checkpoint_files.PREPROCESSOR)
    with within(directory / checkpoint_files.PREPROCESSOR):
        return _parse({"image_processor_type": processor} | fields, channels)


def _parse(fields: Mapping[str, Any], channels: int) -> Preprocessing:
    if channels not in _MODES:
        raise InputError(f"the model has {channels} channels; images have {', '.join(map(str, _MODES))}")
    kind = fields.get("feature_extractor_type") or fields["image_processor_type"]
    if kind not in _PROCESSORS:
        raise InputError(f"the image_processor_type is {kind!r}; {', '.join(_PROCESSORS)} can be read")
    known = _PROCESSORS[kind]
    asked = {name for name, value in fields.items() if value not in (None, False)}
    if unknown := asked - set(known) - _IDLE:
        raise InputError(f"the fields {listing(sorted(unknown))} are not known here and may change the pixels")
    values = {**known, **{name: fields[name] for name in known if fields.get(name) is not None}}
    if values["do_resize"] is not True:
        raise InputError(f"do_resize is {values['do_resize']!r}; only images that are resized can be read")
    size, crop = _size(values["size"], known is _BIT), None
    if values["do_center_crop"]:
        crop = _size(values["crop_size"], False, "crop_size")
        assert isinstance(crop, tuple)
        smallest = size if isinstance(size, tuple) else (size, size)
        if any(kept > side for kept, side in zip(crop, smallest)):
            raise InputError(f"the crop_size {crop} is larger than the size {size}")
    elif not isinstance(size, tuple):
        raise InputError("without do_center_crop, size must have a height and a width: all images need one size")
    if isinstance(values["resample"], bool) or values["resample"] not in tuple(PIL.Image.Resampling):
        raise InputError(f"resample must be the number of a filter of Pillow's, 0 to 5, not {values['resample']!r}")
    scale = _numbers("rescale_factor", values["rescale_factor"], 1)[0] if values["do_rescale"] else 1.0
    mean, std = (_numbers(name, values[name], channels) for name in ("image_mean", "image_std"))
    if not all(std):
        raise InputError(f"image_std must not have a 0, as {values['image_std']!r} has")
    if not values["do_normalize"]:
        mean, std = (0.0,) * channels, (1.0,) * channels
    return Preprocessing(channels, size, crop, int(values["resample"]), scale, mean, std)


def _size(value: Any, by_shorter: bool, name: str = "size") -> tuple[int, int] | int:
    """(height, width), or the length of the shorter side."""
    if isinstance(value, dict):
        keys = sorted(key for key, side in value.items() if side is not None)
        found = [value[key] for key in keys]
        by_shorter = keys == ["shortest_edge"] and name == "size"
        right = by_shorter or keys == ["height", "width"]
    else:
        found, right = [value] if by_shorter else [value, value], True
    if not right or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in found):
        raise InputError(
            f"{name} must be a whole number or have a height and a width, or for size a shortest_edge; not {value!r}"
        )
    return found[0] if by_shorter else (found[0], found[1])


def _numbers(name: str, value: Any, count: int) -> tuple[float, ...]:
    """A number for each channel, which may be written as one."""
    found = value if isinstance(value, list) else [value] * count
    if len(found) != count or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in found):
        raise InputError(f"{name} must be a number, or one for each of the {count} channels, not {value!r}")
    return tuple(map(float, found))

"""A tiny ViT with random weights, and images it can learn within seconds, for tests of the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from safetensors.numpy import save_file

from lora_jax.core import paths
from lora_jax.models import vision
from lora_jax.models.vision_config import read_config

CONFIG = {
    "model_type": "vit",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 16, "width": 16},
    "resample": 2,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
LABELS = ("across", "along", "plain")


def model(directory, fields=CONFIG, preprocessor=PREPROCESSOR):
    """A Hugging Face directory of an encoder alone with random weights, without a head."""
    directory.mkdir(parents=True)
    config = read_config(fields)
    pixels = jnp.zeros((1, *config.image_size, config.num_channels))
    leaves, _ = paths.flatten(vision.Vision(config).init(jax.random.key(0), pixels))
    names = {path: name for path, name in vision.hf_names(config).items() if "classifier" not in path}
    tensors = {name.name.removeprefix("vit."): name.export(np.asarray(leaves[path])) for path, name in names.items()}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


def image(label, draw):
    """Stripes across or along in two random colours, or one colour, with noise: bytes `(height, width, 3)`."""
    height, width = draw.integers(18, 30, 2)
    colours, period = draw.integers(0, 256, (2, 3)), draw.integers(6, 10)
    place = {"across": np.arange(height)[:, None], "along": np.arange(width)[None, :], "plain": np.zeros((1, 1), int)}[label]
    stripe = np.broadcast_to(place // (period // 2) % 2, (height, width))
    noisy = colours[stripe] + draw.normal(0, 8, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def folder(directory, count=240):
    """A folder for each label, with PNG files."""
    draw = np.random.default_rng(0)
    for i in range(count):
        label = LABELS[i % len(LABELS)]
        (directory / label).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image(label, draw)).save(directory / label / f"{i}.png")
    return directory


def home(directory):
    """A directory with the model and the images, as `options` takes it."""
    model(directory / "model")
    folder(directory / "images")
    return directory


def options(directory, out, steps=40):
    """The arguments of `lora-jax` for a run on the two."""
    given = {
        "--task": "images",
        "--model": directory / "model",
        "--data": directory / "images",
        "--rank": 4,
        "--learning-rate": 0.01,
        "--batch-size": 16,
        "--steps": steps,
        "--out": out,
    }
    return ["finetune", *(str(x) for pair in given.items() for x in pair)]

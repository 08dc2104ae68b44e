"""`lora-jax finetune --task images` on scikit-learn's digits, with a tiny ViT of random weights: what adapters and a head learn.

    pip install scikit-learn
    python tests/benchmarks/digits.py [OPTIONS OF FINETUNE]     # half a minute on 2 idle cores

It writes the 1,797 images as a folder for each digit, and the model, into a temporary directory, and runs the command on them.
"""

import pathlib
import sys
import tempfile

import numpy as np
import PIL.Image
import sklearn.datasets

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))  # so that it runs as a script, too

from lora_jax.command import cli
from tests.support import tiny_images

CONFIG = {
    "model_type": "vit",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "initializer_range": 0.5,  # of positions, too: the smaller ones of pretraining's start would hardly be seen
}
PREPROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": 8}
OPTIONS = "--no-flip --crop 0.8 --rank 16 --alpha 32 --learning-rate 5e-3 --steps 600"


def write(directory: pathlib.Path) -> None:
    """A folder for each digit."""
    digits = sklearn.datasets.load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target)):
        folder = directory / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((image * 255 / 16).astype(np.uint8)).save(folder / f"{i}.png")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        home = pathlib.Path(temporary)
        write(home / "digits")
        tiny_images.model(home / "model", CONFIG, PREPROCESSOR)
        places = {"--model": home / "model", "--data": home / "digits", "--out": home / "run"}
        line = [str(x) for place in places.items() for x in place]
        sys.exit(cli.main(["finetune", "--task", "images", *line, *OPTIONS.split(), *sys.argv[1:]]))

"""Runs of encoders and vision models whose layers are scanned: they learn what runs with layers one by one learn."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.command import cli
from tests.support import tiny, tiny_images

pytestmark = pytest.mark.usefixtures("usual_promotion")
MODERNBERT = pathlib.Path(__file__).parents[1] / "data" / "families" / "modernbert" / "base"
SCANNED = ("--scan-layers", "--remat", "products")


def classify(home):
    tiny.model(home / "model", MODERNBERT)
    tiny.reviews(home / "reviews.csv", 60)
    return tiny.options


def images(home):
    tiny_images.home(home)
    return tiny_images.options


def scores(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [classify, images])
def test_it_goes_on_where_the_other_would(kind, tmp_path):
    """From the same pairs both runs end with the same ones, in both directions, and write the same files."""
    options = kind(tmp_path)

    def train(name, steps, *more, start=None):
        line = list(map(str, options(tmp_path, tmp_path / name, steps)))
        if start is not None:
            place = line.index("--rank")
            line[place : place + 2] = ["--adapter", str(tmp_path / start)]
        assert cli.main([*line, *more]) == 0
        return lj.checkpoint.load(tmp_path / name / "adapters")

    def exported(name, form):
        out = tmp_path / f"{name}-{form}"
        assert cli.main(["export", str(tmp_path / name), "--format", form, "--out", str(out)]) == 0
        return load_file(next(out.glob("*.safetensors")))

    train("start", 1)
    one, scanned = train("one", 3, start="start"), train("scanned", 3, *SCANNED, start="start")
    assert any("/layers/" in path for path in scanned) and not any("/layers/" in path for path in one)
    np.testing.assert_allclose(scores(tmp_path / "scanned"), scores(tmp_path / "one"), rtol=1e-5)
    for form in ("peft", "merged"):
        ours, theirs = exported("scanned", form), exported("one", form)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            np.testing.assert_allclose(ours[name], tensor, atol=2e-4, err_msg=name)
    assert train("back", 1, start="scanned").keys() == one.keys()

"""Images as files, as pixels (against transformers' image processors) and as batches."""

import itertools
import json

import jax
import numpy as np
import PIL.Image
import pytest
from transformers import BitImageProcessor, ViTImageProcessor

from lora_jax import sharding
from lora_jax.core.errors import InputError, MissingError
from lora_jax.data import images, pixels
from lora_jax.huggingface import checkpoint_files
from tests.support import tiny_images

DINOV2 = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 21},
    "crop_size": {"height": 16, "width": 14},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "resample": 3,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def parse(directory, fields, channels=3):
    (directory / checkpoint_files.PREPROCESSOR).write_text(json.dumps(fields))
    return pixels.read(directory, channels, "ViTImageProcessor")


def picture(height, width, mode="RGB"):
    data = np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return PIL.Image.fromarray(data).convert(mode)


PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor"},
    "no name": {"size": 9},
    "vit of before": {"feature_extractor_type": "ViTFeatureExtractor", "size": 20, "do_resize": True, "do_normalize": True},
    "sizes": {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 20}, "resample": 3},
    "not rescaled": {
        "image_processor_type": "ViTImageProcessor",
        "size": 8,
        "do_rescale": False,
        "image_mean": [9.0, 8.0, 7.0],
    },
    "not normalised": {"image_processor_type": "ViTImageProcessor", "size": 8, "do_normalize": False, "rescale_factor": 0.5},
    "bit": {"image_processor_type": "BitImageProcessor"},
    "dinov2": DINOV2,
    "one number": {"image_processor_type": "BitImageProcessor", "size": 18, "crop_size": 15, "resample": 0},
    "not cropped": {**DINOV2, "do_center_crop": False, "size": {"height": 9, "width": 8}},
}


@pytest.mark.parametrize("case", PROCESSORS)
@pytest.mark.parametrize("size", [(31, 45), (45, 30), (16, 16)])
def test_pixels_are_those_of_transformers(tmp_path, case, size):
    fields = PROCESSORS[case]
    kind = BitImageProcessor if "BitImageProcessor" in fields.values() else ViTImageProcessor
    wanted = kind(**fields)(picture(*size), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = parse(tmp_path, fields)
    found = ours.pixels(picture(*size))
    assert found.shape == ours.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_files_become_upright_and_of_the_right_channels(tmp_path):
    wide = picture(10, 20)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    wide.save(tmp_path / "turned.png", exif=exif)
    picture(10, 20, "P").save(tmp_path / "palette.png")
    rgb = parse(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 8})
    np.testing.assert_array_equal(np.asarray(rgb.open(tmp_path / "turned.png")), np.rot90(np.asarray(wide), -1))
    assert rgb.open(tmp_path / "palette.png").mode == "RGB"
    grey = parse(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 8, "image_mean": [0.25]}, channels=1)
    found = grey.pixels(grey.open(tmp_path / "palette.png"))
    assert found.shape == (8, 8, 1) and grey.mean == (0.25,)


def test_random_crops_and_flips(tmp_path):
    ours = parse(
        tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 16, "do_normalize": False, "rescale_factor": 1.0}
    )
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (120, 240, 3))
    image = PIL.Image.fromarray(np.ascontiguousarray(ramp))
    shares, mirrored = [], 0
    for i in range(200):
        found = ours.random_pixels(image, np.random.default_rng(i), 0.3, True)
        np.testing.assert_array_equal(found, ours.random_pixels(image, np.random.default_rng(i), 0.3, True))
        line = found[8, :, 0]
        mirrored += bool(line[0] > line[-1])
        shares.append(abs(line[-1] - line[0]) / 240 * 16 / 15)
        assert found.min() >= 0 and found.max() <= 239
    assert 70 < mirrored < 130
    assert min(shares) > 0.4 and max(shares) < 1.05 and np.std(shares) > 0.1
    whole = ours.pixels(image)
    np.testing.assert_array_equal(ours.random_pixels(image, np.random.default_rng(0), 1, False), whole)
    one_of_two = [ours.random_pixels(image, np.random.default_rng(i), 1, True) for i in range(8)]
    assert all(np.array_equal(one, whole) or np.array_equal(one, whole[:, ::-1]) for one in one_of_two)
    assert not any(ours.random_pixels(image, np.random.default_rng(i), 0.3, False)[8, 0, 0] > 200 for i in range(50))


def test_random_crops_keep_proportions_where_the_model_does(tmp_path):
    ours = parse(tmp_path, {**DINOV2, "crop_size": 16, "do_normalize": False, "rescale_factor": 1.0})
    place = np.stack(np.meshgrid(np.arange(120), np.arange(240), indexing="ij"), -1).astype(np.uint8)
    image = PIL.Image.fromarray(np.concatenate([place, place[..., :1]], -1))
    for i in range(50):
        found = ours.random_pixels(image, np.random.default_rng(i), 0.3, False)
        height, width = found[12, 8, 0] - found[4, 8, 0], found[8, 12, 1] - found[8, 4, 1]
        assert 0.6 < width / height < 1.7  # of an image twice as wide as high


BAD_FIELDS = {
    "another kind": ({"image_processor_type": "CLIPImageProcessor"}, "the image_processor_type is 'CLIPImageProcessor'; ViT"),
    "unknown": ({"do_pad": True, "pad_size": 3}, "the fields do_pad, pad_size are not known here and may change the pixels"),
    "not resized": ({"do_resize": False}, "do_resize is False; only images that are resized"),
    "a size of one side": ({"size": {"width": 8}}, "size must be a whole number or have a height and a width"),
    "a size of zero": ({"size": 0}, "size must be a whole number"),
    "a size of sides that differ": (
        {"size": {"shortest_edge": 8}},
        "without do_center_crop, size must have a height and a width",
    ),
    "a crop too large": (
        {"do_center_crop": True, "size": 8, "crop_size": 9},
        r"the crop_size \(9, 9\) is larger than the size",
    ),
    "a filter": ({"resample": 9}, "resample must be the number of a filter of Pillow's"),
    "two means": ({"image_mean": [0.5, 0.5]}, "image_mean must be a number, or one for each of the 3 channels"),
    "a deviation of zero": ({"image_std": [1, 0, 1]}, "image_std must not have a 0"),
    "a scale in words": ({"rescale_factor": "1/255"}, "rescale_factor must be a number"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_preprocessing(tmp_path, case):
    fields, message = BAD_FIELDS[case]
    with pytest.raises(InputError, match=rf"preprocessor_config\.json: {message}"):
        parse(tmp_path, fields)


def test_bad_channels(tmp_path):
    with pytest.raises(InputError, match="the model has 2 channels; images have 1, 3, 4"):
        parse(tmp_path, {}, channels=2)
    with pytest.raises(MissingError, match=r"has no preprocessor_config\.json"):
        pixels.read(tmp_path / "..", 3, "ViTImageProcessor")


# --- folders and batches ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_images.folder(tmp_path_factory.mktemp("images") / "folder", count=40)


@pytest.fixture
def preprocessing(tmp_path):
    return parse(tmp_path, tiny_images.PREPROCESSOR)


def test_a_folder_for_each_label(folder):
    found = images.read(folder)
    assert len(found) == 40 and found.classes() == tuple(sorted(tiny_images.LABELS))
    assert all(file.parent.name == label for file, label in zip(found.files, found.labels))
    assert list(found.files) == sorted(found.files)
    assert found.digest() == images.read(str(folder)).digest()


def test_bad_folders(tmp_path):
    def refused(message, error=InputError):
        with pytest.raises(error, match=message):
            images.read(tmp_path / "data")

    refused("there is no folder .*data: images need one with a folder for each label", MissingError)
    for name in ("cat", "dog", ".cache"):
        (tmp_path / "data" / name).mkdir(parents=True)
    refused("the folders cat, dog hold no images")
    picture(4, 4).save(tmp_path / "data" / "cat" / "a.png")
    (tmp_path / "data" / "dog" / "more").mkdir()
    picture(4, 4).save(tmp_path / "data" / "dog" / "more" / "b.png")
    (tmp_path / "data" / "dog" / ".DS_Store").touch()
    assert [file.name for file in images.read(tmp_path / "data").files] == ["a.png", "b.png"]
    (tmp_path / "data" / "dog" / "notes.txt").touch()
    refused(r"dog/notes\.txt are no images \(\.bmp, ")
    (tmp_path / "data" / "dog" / "notes.txt").rename(tmp_path / "data" / "notes.txt")
    refused(r"has the files notes\.txt beside the labels' folders")
    (tmp_path / "data" / "notes.txt").unlink()
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).rename(tmp_path / label)
    refused("has no folders: images need one for each label")


def test_bad_images(tmp_path, preprocessing):
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        picture(40, 40).save(tmp_path / "data" / label / "a.jpg")
    found = images.read(tmp_path / "data")
    images.check(found, preprocessing)
    whole = found.files[1].read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"GIF89a"):
        found.files[1].write_bytes(content)
        with pytest.raises(InputError, match=r"dog/a\.jpg can't be read as an image \(.*\): mend or remove it"):
            images.check(found, preprocessing)
    PIL.Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(tmp_path / "data" / "dog" / "a.png")
    with pytest.raises(InputError, match=r"a\.png has more than 8 bits for each channel \(mode I;16\)"):
        preprocessing.open(tmp_path / "data" / "dog" / "a.png")


def test_the_same_image_is_on_one_side(folder, tmp_path):
    for label in tiny_images.LABELS:
        (tmp_path / "data" / label).mkdir(parents=True)
        for file in (folder / label).iterdir():
            for copy in ("one", "two"):
                (tmp_path / "data" / label / f"{copy}-{file.name}").write_bytes(file.read_bytes())
    found = images.read(tmp_path / "data")
    training, test = images.split(found, 25)
    assert len(training) + len(test) == 80 and len(test) == 24
    assert not set(training.digests) & set(test.digests)
    assert set(training.files) | set(test.files) == set(found.files)
    assert images.split(found, 25)[1] == test
    with pytest.raises(InputError, match="there is no row of the class 'across', 'along', 'plain' to train on"):
        images.split(found, 80)


def batches(folder, preprocessing, seed=0, mesh=None, **options):
    found = images.read(folder)
    options = {"least": 0.5, "flip": True, **options}
    return images.train_batches(found, found.classes(), preprocessing, 8, seed, mesh=mesh, **options)


def same(one, other):
    assert one.keys() == other.keys() == {"pixel_values", "labels"}
    return all(np.array_equal(one[name], other[name]) for name in one)


def test_training_batches_go_on_from_their_position(folder, preprocessing):
    whole = list(itertools.islice(batches(folder, preprocessing), 12))
    begun = batches(folder, preprocessing)
    for _ in range(5):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    resumed = batches(folder, preprocessing)
    resumed.set_state(state)
    assert all(same(next(resumed), batch) for batch in whole[5:])
    assert not any(same(a, b) for a, b in itertools.combinations(whole, 2))
    assert not same(next(batches(folder, preprocessing, seed=1)), whole[0])
    assert whole[0]["pixel_values"].shape == (8, 16, 16, 3) and whole[0]["pixel_values"].dtype == np.float32


def test_an_epoch_holds_every_image_once(folder, preprocessing):
    found = images.read(folder)
    known = {preprocessing.pixels(preprocessing.open(f)).tobytes(): label for f, label in zip(found.files, found.labels)}
    seen = []
    for batch in itertools.islice(batches(folder, preprocessing, least=1, flip=False), 5):
        seen += [pixel.tobytes() for pixel in batch["pixel_values"]]
        for pixel, label in zip(batch["pixel_values"], batch["labels"]):
            assert known[pixel.tobytes()] == found.classes()[label]
    assert sorted(seen) == sorted(known)


def test_batches_on_a_mesh_are_the_same(folder, preprocessing):
    mesh = sharding.make_mesh({"data": 4}, jax.devices()[:4])
    for ours, theirs in zip(range(3), zip(batches(folder, preprocessing), batches(folder, preprocessing, mesh=mesh))):
        assert same(*theirs), ours
        assert theirs[1]["pixel_values"].sharding.spec == jax.P("data")


def test_test_batches_hold_every_image_once(folder, preprocessing):
    found = images.read(folder)
    parts = list(images.eval_batches(found, found.classes(), preprocessing, 16))
    labels = np.concatenate([part["labels"] for part in parts])
    assert [part["pixel_values"].shape for part in parts] == [(16, 16, 16, 3)] * 3
    np.testing.assert_array_equal(labels[:40], found.indices(found.classes()))
    assert (labels[40:] == -1).all()
    for part, file in zip(np.concatenate([part["pixel_values"] for part in parts]), found.files):
        np.testing.assert_array_equal(part, preprocessing.pixels(preprocessing.open(file)))

"""Data sets of the layouts that Hugging Face datasets reads."""

import datasets
import numpy as np
import pytest
from PIL import Image

from experiments.common import images

pytestmark = pytest.mark.experiment


def pixels(count, shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3)])
def test_parquet(tmp_path, shape):
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b", "c"])
    )
    for split, count in (("train", 7), ("test", 4)):
        rows = {
            "image": [Image.fromarray(v) for v in pixels(count, shape)],
            "label": [i % 3 for i in range(count)],
        }
        rows = datasets.Dataset.from_dict(rows, features=features)
        rows.to_parquet(tmp_path / f"{split}-0.parquet")
    train, test = images.load("mnist", tmp_path)
    channels = shape if len(shape) == 3 else (*shape, 1)
    np.testing.assert_array_equal(train.images, pixels(7, shape).reshape(7, *channels))
    np.testing.assert_array_equal(train.labels, np.arange(7) % 3)
    assert train.labels.dtype == np.int32
    assert test.images.shape == (4, *channels)


def test_folders_and_a_damaged_image(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                value = np.full((4, 5, 3), 10 * label + i, np.uint8)
                Image.fromarray(value).save(folder / f"{i}.png")
    damaged = tmp_path / "train" / "dog" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.warns(UserWarning, match=r"left out .*1\.png"):
        train, test = images.load("cifar10", tmp_path)
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 10]
    assert train.labels.tolist() == [0, 0, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]


def test_what_cannot_be_read(tmp_path):
    message = r"mnist cannot be read from .*nowhere: .*name their folder by --data-dir"
    with pytest.raises(images.DataError, match=message):
        images.load("mnist", tmp_path / "nowhere")


def test_digits():
    train, test = images.load("digits")
    assert train.images.shape == (1397, 8, 8, 1)
    assert test.images.shape == (400, 8, 8, 1)
    assert train.images.max() == 16
    assert set(train.labels) == set(test.labels) == set(range(10))

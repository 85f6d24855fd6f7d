"""Photographs as training examples: every kind of file, layout and damage."""

import io
import math
import shutil
import struct
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image, ImageChops

from experiments import data_parallel
from experiments.common import results
from experiments.common.data import (
    decoding,
    distortions,
    idx,
    photos,
    pipeline,
    records,
    shuffling,
    synthetic,
    tfexample,
    tfrecord,
)
from experiments.common.data.folders import Encoded
from experiments.common.models import imagenet, networks
from experiments.common.studies import curves
from experiments.data_parallel import Config

pytestmark = pytest.mark.experiment


def saved(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (70, 50), colour)


def as_others_write_cmyk(image: Image.Image) -> bytes:
    """As it is, and with no segment that names Adobe; Pillow inverts what it writes."""
    content = saved(ImageChops.invert(image), quality=100)
    start = content.index(b"\xff\xee\x00\x0eAdobe")
    return content[:start] + content[start + 16 :]


CMYK = 200, 50, 10, 30
CMYK_AS_RGB = [(255 - ink) * (255 - 30) / 255 for ink in CMYK[:3]]
RED = 200, 50, 10
KINDS = {
    "rgb": (saved(solid("RGB", RED), quality=100), RED),
    "grey": (saved(solid("L", 77), quality=100), (77, 77, 77)),
    "adobe cmyk": (saved(solid("CMYK", CMYK), quality=100), CMYK_AS_RGB),
    "plain cmyk": (as_others_write_cmyk(solid("CMYK", CMYK)), CMYK_AS_RGB),
    "png": (saved(solid("RGB", RED), "PNG"), RED),
    "png with a palette": (saved(solid("RGB", RED).quantize(), "PNG"), RED),
    "png, transparent": (saved(solid("RGBA", (*RED, 99)), "PNG"), RED),
    "png, grey": (saved(solid("L", 77), "PNG"), (77, 77, 77)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_becomes_rgb(kind):
    content, colour = KINDS[kind]
    rng = np.random.default_rng(0)
    for pixels in (
        decoding.validation(content, 32),
        decoding.training(content, rng, 32, "none"),
    ):
        assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
        np.testing.assert_allclose(pixels, np.broadcast_to(colour, (32, 32, 3)), atol=2)


def ramps(width: int, height: int) -> Image.Image:
    """Red tells how far to the right a pixel is, green how far down."""
    y, x = np.mgrid[:height, :width]
    blue = np.zeros_like(x)
    pixels = np.stack([255 * x / (width - 1), 255 * y / (height - 1), blue], -1)
    return Image.fromarray(pixels.round().astype(np.uint8))


def ramp(length: int, resized: int, start: int, size: int) -> np.ndarray:
    """A ramp of `length` pixels, resized, and `size` pixels of that from `start` on."""
    centres = (np.arange(start, start + size) + 0.5) * length / resized - 0.5
    return (255 * centres / (length - 1)).clip(0, 255)


@pytest.mark.parametrize(
    ("width", "height", "resized", "left", "top"),
    [
        (400, 300, (341, 256), 58, 16),
        (300, 400, (256, 341), 16, 58),
        (100, 100, (256, 256), 16, 16),
        (1601, 1200, (342, 256), 59, 16),
    ],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_validation_crop_by_hand(format, width, height, resized, left, top):
    content = saved(ramps(width, height), format, quality=95)
    pixels = decoding.validation(content, 224).astype(float)
    x, y = ramp(width, resized[0], left, 224), ramp(height, resized[1], top, 224)
    tolerance = 1 if format == "PNG" else 4
    red, green = np.meshgrid(x, y)
    np.testing.assert_allclose(pixels[..., 0], red, atol=tolerance)
    np.testing.assert_allclose(pixels[..., 1], green, atol=tolerance)
    assert abs(pixels[..., 0] - red).mean() < 0.7


def test_large_photographs_are_decoded_small():
    """Never to fewer pixels than are asked for."""
    for width, scale in ((1600, 1 / 4), (600, 1 / 2), (511, 1), (4100, 1 / 8)):
        image = decoding.opened(saved(Image.new("RGB", (width, width))))
        box = 0, 0, width, width
        assert decoding.shrink(image, box, 256, 256) == scale
        assert image.size == (math.ceil(width * scale),) * 2
    image = decoding.opened(saved(Image.new("RGB", (1600, 1600))))
    assert decoding.shrink(image, (0, 0, 400, 1600), 256, 256) == 1


@pytest.mark.parametrize("size", [(500, 375), (80, 600), (1000, 100), (1, 1), (3, 900)])
def test_crops_are_those_of_inception(size):
    width, height = size
    rng = np.random.default_rng(0)
    boxes = np.array([distortions.crop(*size, rng) for _ in range(1000)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 <= top.min()
    assert right.max() <= width
    assert bottom.max() <= height
    w, h = right - left, bottom - top
    assert min(w.min(), h.min()) >= 1
    if size == (500, 375):
        shares = w * h / (width * height)
        assert 0.079 < shares.min() < 0.09
        assert 0.95 < shares.max() <= 1
        always = shares[shares < 0.75**2]  # of any aspect, these fit
        assert abs(always.mean() - (0.08 + 0.75**2) / 2) < 0.015
        assert 0.74 < (w / h).min() < 0.76
        assert 1.32 < (w / h).max() < 1.35
        assert len(np.unique(left)) > 200
    if size == (1000, 100):
        in_the_middle = [433, 0, 566, 100]  # 133 = 4/3 of the height
        assert in_the_middle in boxes.tolist()


def test_training_crop_by_hand():
    content, mirrored = saved(ramps(500, 400), "PNG"), 0
    for seed in range(20):
        found = decoding.training(content, np.random.default_rng(seed), 64, "none")
        left, top, right, bottom = distortions.crop(
            500, 400, np.random.default_rng(seed)
        )
        x = (left + (np.arange(64) + 0.5) * (right - left) / 64 - 0.5) * 255 / 499
        y = (top + (np.arange(64) + 0.5) * (bottom - top) / 64 - 0.5) * 255 / 399
        flipped = found[0, 0, 0] > found[0, -1, 0]
        mirrored += flipped
        x = x[::-1] if flipped else x
        np.testing.assert_allclose(found[..., 0], np.tile(x, (64, 1)), atol=2)
        np.testing.assert_allclose(found[..., 1].T, np.tile(y, (64, 1)), atol=2)
    assert 4 < mirrored < 16


@pytest.mark.parametrize(("strength", "amount"), [("weak", 0.2), ("strong", 0.5)])
def test_colours_are_changed_by_so_much(strength, amount):
    """Of grey, only brightness changes."""
    image, rng = solid("RGB", (100, 100, 100)), np.random.default_rng(0)
    values = []
    for _ in range(300):
        pixels = np.asarray(distortions.photometric(image, rng, strength))
        assert len(np.unique(pixels)) == 1
        values.append(pixels[0, 0, 0] / 100)
    assert 1 - amount - 0.02 <= min(values) < 1 - 0.9 * amount
    assert 1 + 0.9 * amount < max(values) <= 1 + amount + 0.02


def changed(pixels: np.ndarray, seed: int) -> np.ndarray:
    """What strong changes of colour come to, in real numbers."""
    rng = np.random.default_rng(seed)

    def grey(x):
        return (x @ [0.299, 0.587, 0.114])[..., None]

    for which in rng.permutation(3):
        factor = 1 + rng.uniform(-0.5, 0.5)
        base = [np.zeros_like, lambda x: grey(x).mean(), grey][which](pixels)
        pixels = (base + factor * (pixels - base)).clip(0, 255)
    return pixels


def test_colours_against_real_numbers():
    start = np.random.default_rng(0).integers(60, 200, (20, 30, 3)).astype(np.uint8)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        found = distortions.photometric(Image.fromarray(start), rng, "strong")
        expected = changed(start.astype(float), seed)
        np.testing.assert_allclose(np.asarray(found), expected, atol=4)
    rng = np.random.default_rng(0)
    image = Image.fromarray(start)
    assert distortions.photometric(image, rng, "none") is image
    assert rng.integers(100) == np.random.default_rng(0).integers(100)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_of_images_in_memory(channels):
    """They are changed after all else."""
    images = np.random.default_rng(0).integers(0, 256, (2, 6, 5, channels), np.uint8)
    batch = pipeline.Batch(images, np.arange(2, dtype=np.int32))
    plain = pipeline.ImageData(batch, batch, padding=2, flip=True)
    vivid = plain._replace(colours="strong")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        image = plain.training_example(1, rng).images
        mode = Image.fromarray(image[..., 0] if channels == 1 else image)
        expected = np.asarray(distortions.photometric(mode, rng, "strong"))
        found = vivid.training_example(1, np.random.default_rng(seed))
        np.testing.assert_array_equal(found.images, expected.reshape(image.shape))
        assert (found.images != image).any()
    assert (plain.classes, plain.shape) == (2, (6, 5, channels))


def stored(count: int, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    pictures = (synthetic.picture(60, 50, 0.1 * i, rng) for i in range(count))
    return [
        Encoded(saved(picture), number, f"picture {number}")
        for number, picture in enumerate(pictures)
    ]


def source(train: list[Encoded], test: list[Encoded] | None = None) -> photos.Photos:
    return photos.Photos(photos.Splits(train, test or train, len(train)), 32, "strong")


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.images, other.images)


@pytest.mark.parametrize("shuffle", ["thorough", "within-shards", "shards-only"])
def test_streams_do_not_depend_on_the_number_of_processes(shuffle):
    options = {"shuffle": shuffle, "shard_size": 4}
    one = pipeline.training(source(stored(10)), 0, 6, 0, 1, **options)
    two = [pipeline.training(source(stored(10)), 0, 6, p, 2, **options) for p in (0, 1)]
    together = [
        jax.tree.map(lambda *x: np.concatenate(x), *(share[k] for share in two))
        for k in range(6)
    ]
    assert_equal(together, [one[k] for k in range(6)])
    stream = pipeline.from_step(one, 3)
    assert_equal([next(stream) for _ in range(3)], together[3:])
    assert together[0].images.shape == (6, 32, 32, 3)
    assert together[0].labels.dtype == np.int32
    other = pipeline.training(source(stored(10)), 1, 6, 0, 1, **options)[0]
    assert other.images.tolist() != together[0].images.tolist()


CUT = stored(1)[0].content[:-300]  # within the pixels


def test_damaged_files_are_skipped_and_named_once():
    """All other positions of the stream are as without the damage."""
    sound = stored(10)
    damaged = [*sound]
    damaged[3] = Encoded(b"", 3, "an empty file")
    damaged[4] = Encoded(sound[4].content[:-300], 4, "the middle")
    damaged[9] = Encoded(b"GIF? No.", 9, "the last file")
    before, shares = (
        pipeline.training(source(s), 0, 4, 0, 1) for s in (sound, damaged)
    )
    with pytest.warns() as caught:
        after = [next_ for next_, _ in zip(pipeline.from_step(shares, 0), range(10))]
    texts = sorted(str(warning.message) for warning in caught)
    assert len(texts) == 3
    assert texts[0].startswith("an empty file cannot be decoded (0 bytes of no known f")
    assert texts[2].startswith("the middle cannot be decoded (image file is trunca")
    assert texts[1].startswith("the last file cannot be decoded (8 bytes of no known")
    assert all("left out, and the next image takes its place." in t for t in texts)
    replaced = {3: 5, 4: 5, 9: 0}
    for k in range(10):
        for place in range(4):
            label = before[k].labels[place]
            assert after[k].labels[place] == replaced.get(label, label)
            if label not in replaced:
                equal = after[k].images[place] == before[k].images[place]
                assert equal.all()


def test_nothing_can_be_decoded():
    files = [Encoded(CUT, i, f"file {i}") for i in range(3)]
    message = "training images in a row, or all, cannot be decoded, the last of them "
    with pytest.warns(match="truncated") as caught:
        with pytest.raises(idx.DataError, match=f"{message}file 1: expected JPEG"):
            source(files).training_example(2, np.random.default_rng(0))
    assert len(caught) == 3


def test_damaged_test_image():
    """It counts as one that is not recognized, and no other one counts twice."""
    files = stored(5)
    files[2] = Encoded(CUT, 2, "file 2")
    tests = pipeline.testing(source(stored(4), files), 4, 0, 1)
    with pytest.warns(match=r"file 2 cannot .*: it is left out, and no prediction for"):
        first, second = tests
    assert first.labels.tolist() == [0, 1, -1, 3]
    assert second.labels.tolist() == [4, -1, -1, -1]
    assert not first.images[2].any()
    np.testing.assert_array_equal(
        first.images[3], decoding.validation(files[3].content, 32)
    )


class Counted:
    """A source that counts what it is asked for."""

    train_count, test_count, shape, classes = 1, 10_000, (1, 1, 1), 2
    asked = 0

    def training_example(self, index: int, rng: np.random.Generator) -> pipeline.Batch:
        raise AssertionError

    def test_example(self, index: int) -> pipeline.Batch:
        self.asked += 1
        return pipeline.Batch(np.zeros((1, 1, 1), np.uint8), np.int32(index % 2))


def test_test_images_are_not_kept():
    data = Counted()
    tests = pipeline.testing(data, 10, 0, 1)
    assert (len(tests), data.asked) == (1000, 0)
    np.testing.assert_array_equal(tests[7].labels, [0, 1] * 5)
    assert data.asked == 10
    next(iter(tests))
    assert data.asked < 10 * (2 * pipeline.THREADS + 10)


@pytest.mark.parametrize("within", [False, True])
def test_shuffling_by_shards(within):
    """Shards come whole, each time in another order; their insides too, or never."""
    dealt = np.random.default_rng((0, 0)).permutation(100)
    parts = [dealt[start : start + 30].tolist() for start in range(0, 100, 30)]
    orders, turns = [], set()
    for number in range(6):
        orders.append(shuffling.order(0, 100, 30, within, number).tolist())
        assert sorted(orders[-1]) == list(range(100))
        rest, turn = orders[-1], []
        while rest:
            (part,) = (p for p in parts if rest[0] in p)
            chunk, rest = rest[: len(part)], rest[len(part) :]
            assert set(chunk) == set(part)
            assert (chunk == part) != within
            turn.append(parts.index(part))
        turns.add(tuple(turn))
    assert len(turns) > 3
    assert shuffling.order(1, 100, 30, within, 0).tolist() != orders[0]


def test_shards_in_the_stream():
    stream = shuffling.stream(10, 0, "shards-only", 4)
    for number in range(3):
        found = [stream[10 * number + place] for place in range(10)]
        assert found == shuffling.order(0, 10, 4, False, number).tolist()


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    """A folder with 200 synthetic photographs."""
    folder = tmp_path_factory.mktemp("imagenet")
    synthetic.make(folder)
    return folder


def test_synthetic_photographs(layout):
    files = {s: sorted((layout / s).rglob("*.JPEG")) for s in ("train", "val")}
    assert [len(found) for found in files.values()] == [160, 40]
    modes, sizes, unreadable = [], [], []
    for path in files["train"] + files["val"]:
        with Image.open(path) as image:
            modes.append((image.format, image.mode, "adobe" in image.info))
            sizes += image.size
            try:
                image.load()
            except OSError:
                unreadable.append(path.name)
    counts = {mode: modes.count(mode) for mode in modes}
    assert counts[("PNG", "RGB", False)] == 1
    assert counts[("JPEG", "L", False)] == 20
    assert counts[("JPEG", "CMYK", True)] == counts[("JPEG", "CMYK", False)] == 10
    assert sum(counts.values()) - 41 == counts[("JPEG", "RGB", False)]
    assert unreadable == ["train_00000025.JPEG"]
    assert min(sizes) >= 80
    assert max(sizes) <= 600


def test_folders(layout):
    data = photos.load(layout)
    assert (data.train_count, data.test_count, data.classes) == (160, 40, 5)
    assert data.shape == (224, 224, 3)
    train = photos.splits(layout).train
    wnids = sorted(synthetic.WNIDS)
    for number in (0, 31, 32, 159):
        content, label, name = train[number]
        assert Path(name).parent.name == wnids[label]
        assert content == Path(name).read_bytes()
    assert [train[n].label for n in (0, 31, 32, 159)] == [0, 0, 1, 4]
    image, label = data.test_example(39)
    assert (image.shape, label) == ((224, 224, 3), 4)


@pytest.fixture
def small(tmp_path) -> Path:
    folder = tmp_path / "imagenet"
    synthetic.make(folder, train=5, val=5, smallest=20, largest=30)
    return folder


def fails(folder: Path | None) -> str:
    with pytest.raises(idx.DataError) as error:
        photos.load(folder)
    return str(error.value)


def test_folders_that_are_missing(small, monkeypatch):
    monkeypatch.delenv(idx.VARIABLE, raising=False)
    assert "received None for the folder of ImageNet: expected one" in fails(None)
    assert f"received {small / 'no'} for" in fails(small / "no")
    monkeypatch.setenv(idx.VARIABLE, str(small))
    assert photos.load().train_count == 5
    shutil.rmtree(small / "val")
    text = f"{small / 'val'} is missing: expected train/<wnid>/*.JPEG and val/<wnid>/*."
    assert text in fails(small)
    (small / "val").mkdir()
    assert f"{small / 'val'} is empty: expected train/<wnid>/*.JPEG and" in fails(small)
    shutil.rmtree(small / "train")
    assert f"{small / 'train'} is missing: expected" in fails(small)


def test_val_that_is_flat(small):
    for path in sorted((small / "val").rglob("*.JPEG")):
        path.rename(small / "val" / path.name)
        path.parent.rmdir()
    text = fails(small)
    assert (
        f"{small / 'val'} holds 5 images and no folder: expected train/<wnid>" in text
    )
    assert f"valprep.sh in {small / 'val'}." in text


def test_class_without_images(small):
    wnid = synthetic.WNIDS[1]
    (small / "train" / wnid / "notes.txt").touch()
    for path in (small / "train" / wnid).glob("*.JPEG"):
        path.unlink()
    text = f"{small / 'train' / wnid} holds no image: expected files that end in .jpeg"
    assert text in fails(small)


def test_class_of_val_alone(small):
    shutil.rmtree(small / "train" / synthetic.WNIDS[2])
    text = f"val has 1 classes that {small / 'train'} has not, as {synthetic.WNIDS[2]}"
    assert text in fails(small)


def message(name: str, *fields: tuple[str, int, str, bool]) -> descriptor_pb2:
    """A message of fields: name, number, type, whether repeated."""
    made = descriptor_pb2.DescriptorProto(name=name)
    for field, number, kind, repeated in fields:
        label = "LABEL_REPEATED" if repeated else "LABEL_OPTIONAL"
        scalar = (
            f"TYPE_{kind.upper()}" in descriptor_pb2.FieldDescriptorProto.Type.keys()
        )
        made.field.add(
            name=field,
            number=number,
            label=label,
            type=f"TYPE_{kind.upper()}" if scalar else "TYPE_MESSAGE",
            type_name=None if scalar else f".tf.{kind}",
        )
    return made


@pytest.fixture(scope="module")
def example():
    """(features) -> an Example of bytes and integers, as protobuf serializes it."""
    file = descriptor_pb2.FileDescriptorProto(name="tf", package="tf", syntax="proto3")
    file.message_type.extend(
        [
            message("BytesList", ("value", 1, "bytes", True)),
            message("FloatList", ("value", 1, "float", True)),
            message("Int64List", ("value", 1, "int64", True)),
            message(
                "Feature",
                ("bytes_list", 1, "BytesList", False),
                ("float_list", 2, "FloatList", False),
                ("int64_list", 3, "Int64List", False),
            ),
            message(
                "Item", ("key", 1, "string", False), ("value", 2, "Feature", False)
            ),
            message("Features", ("feature", 1, "Item", True)),
            message("Example", ("features", 1, "Features", False)),
        ]
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("tf.Example"))
    lists = {bytes: "bytes_list", float: "float_list", int: "int64_list"}

    def serialize(**features):
        one = made()
        for name, values in features.items():
            item = one.features.feature.add(key=name.replace("__", "/"))
            getattr(item.value, lists[type(values[0])]).value.extend(values)
        return one.SerializeToString()

    return serialize


def test_examples_as_protobuf_writes_them(example):
    features = {
        "image__encoded": [b"x" * 1000, b"", b"y"],
        "image__class__label": [1, 0, -1, 2**63 - 1, -(2**63), 300],
        "image__object__bbox": [0.5, 0.25],
    }
    assert tfexample.parse(example(**features)) == {
        "image/encoded": [b"x" * 1000, b"", b"y"],
        "image/class/label": [1, 0, -1, 2**63 - 1, -(2**63), 300],
        "image/object/bbox": [],
    }
    not_packed = bytes([0x0A, 11, 0x0A, 9, 0x0A, 1, 97, 0x12, 4, 0x1A, 2, 8, 42])
    assert tfexample.parse(not_packed) == {"a": [42]}
    assert tfexample.parse(b"") == {}
    for wrong in (b"\x0a\x05abc", b"\xff" * 20, b"\x0b", b"\x08"):
        with pytest.raises(tfexample.Malformed):
            tfexample.parse(wrong)


def test_checksums():
    """Those of RFC 3720, appendix B.4, and the usual one."""
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA
    assert tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert tfrecord.crc32c(b"123456789") == 0xE3069283


def test_record_as_tensorflow_writes_it(tmp_path):
    """The first of every file of events, and its checksums."""
    content = b"\x09\x00\x00\xc0%\xdd\x75\xd5\x41\x1a\x0dbrain.Event:1"
    record = b"\x18" + bytes(7) + b"\xa3\x7fK\x22" + content + b"\xec\xf3\x32\x8d"
    (tmp_path / "events").write_bytes(record)
    assert list(tfrecord.TFRecord(tmp_path / "events")) == [content]
    write_tfrecord(tmp_path / "ours", [content])
    assert (tmp_path / "ours").read_bytes() == record


def write_tfrecord(path: Path, contents: list[bytes]) -> None:
    with path.open("wb") as file:
        for content in contents:
            length = struct.pack("<Q", len(content))
            checksums = (tfrecord.masked(part) for part in (length, content))
            first, second = (struct.pack("<I", checksum) for checksum in checksums)
            file.write(length + first + content + second)


def write_array_record(path: Path, contents: list[bytes]) -> None:
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def test_tfrecord(tmp_path):
    contents = [b"a", b"", b"abc" * 100_000]
    write_tfrecord(tmp_path / "file", contents)
    assert list(tfrecord.TFRecord(tmp_path / "file")) == contents
    by_grain = grain.experimental.TFRecordIterDataset(str(tmp_path / "file"))
    assert list(by_grain) == contents


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def shards(folder: Path, example, kind: str, images: Path, style: str) -> Path:
    """A folder's images as record files, three for each split."""
    for split, name in (("train", "train"), ("val", "validation")):
        stored = getattr(photos.splits(images), "test" if split == "val" else split)
        one = "image__encoded", "image__class__label", 1
        keys = one if style == "models" else ("image", "label", 0)
        contents = [
            example(**{keys[0]: [e.content], keys[1]: [e.label + keys[2]]})
            for e in (stored[i] for i in range(len(stored)))
        ]
        for shard in range(3):
            part = contents[shard * len(contents) // 3 :]
            part = part[: (shard + 1) * len(contents) // 3 - shard * len(contents) // 3]
            path = folder / f"imagenet-{name}.{kind}-{shard:05}-of-00003"
            WRITERS[kind](path, part)
    return folder


@pytest.mark.parametrize("style", ["models", "datasets"])
@pytest.mark.parametrize("kind", WRITERS)
def test_record_files(small, tmp_path, example, kind, style):
    """The same examples as from the folder that they were made of."""
    folder = shards(tmp_path, example, kind, small, style)
    data, expected = photos.load(folder), photos.load(small)
    assert data.classes == 1000
    assert (data.train_count, data.test_count) == (5, 5)
    for process in range(2):
        share = 0, 4, process, 2
        one, other = (pipeline.training(d, *share) for d in (data, expected))
        stream = pipeline.from_step(one, 0)
        assert_equal([next(stream) for _ in range(4)], [other[k] for k in range(4)])
    tests = [pipeline.testing(d, 4, 0, 1) for d in (data, expected)]
    assert_equal(*tests)


def test_split_folders_of_record_files(small, tmp_path, example):
    for split in ("train", "validation"):
        folder = tmp_path / "records" / split
        folder.mkdir(parents=True)
        write_tfrecord(folder / "1.tfrecord", [example(image=[b"x"], label=[3])] * 2)
    train, test, _ = photos.splits(tmp_path / "records")
    assert (len(train), len(test), test[1].label) == (2, 2, 3)


def test_record_files_of_one_split(tmp_path, example):
    write_tfrecord(tmp_path / "train-00000-of-00001", [example(image=[b"x"])])
    text = "has 1 record files of training and 0 of validation among 1: expected both"
    assert text in fails(tmp_path)


def wrong_records(folder: Path, content: bytes, kind: str = "tfrecord") -> str:
    for split in ("train", "val"):
        WRITERS[kind](folder / f"{split}-00000-of-00001", [content])
    with pytest.raises(idx.DataError) as error:
        photos.load(folder).test_example(0)
    return str(error.value)


def test_records_of_something_else(tmp_path, example):
    name = f"record 0 of {tmp_path / 'val-00000-of-00001'}"
    text = wrong_records(tmp_path, example(image=[b"x"], other=[1]))
    assert f"{name} has the features image, other: expected image/encoded and" in text
    text = wrong_records(tmp_path, b"no message")
    assert f"{name} is no tf.train.Example (" in text
    one = example(image__encoded=[b"x"], image__class__label=[0])
    assert f"{name} has image/class/label 0: expected 1 to 1000, the" in wrong_records(
        tmp_path, one
    )
    assert "label 1000: expected 0 to 999, " in wrong_records(
        tmp_path, example(image=[b"x"], label=[1000])
    )
    for split in ("train", "val"):
        write_tfrecord(tmp_path / f"{split}-00000-of-00001", [])
    assert "1 record files, " in fails(tmp_path)


def test_file_that_is_no_tfrecord(tmp_path):
    for split in ("train", "val"):
        path = tmp_path / f"{split}-00000-of-00001"
        path.write_bytes(b"\x1f\x8b something else")
    path = tmp_path / "train-00000-of-00001"
    text = f"{path} has 1f8b20736f6d657468696e67 at byte 0: expected an uncompressed"
    assert text in fails(tmp_path)


@pytest.mark.parametrize("missing", [1, 4, 5, 6, 16])
def test_tfrecord_that_is_cut_off(tmp_path, missing):
    """In a checksum, in the data, in a header."""
    path = tmp_path / "train-00000-of-00001"
    write_tfrecord(path, [b"abc", b"d"])
    path.write_bytes(path.read_bytes()[:-missing])
    with pytest.raises(idx.DataError) as error:
        tfrecord.TFRecord(path)
    if missing <= 5:
        assert f"record 1 of {path} ends at byte 36: expected at most" in str(
            error.value
        )
    else:
        assert "at byte 19: expected an uncompressed TFRecord" in str(error.value)


def test_damaged_array_record(tmp_path):
    path = tmp_path / "train.array_record-00000-of-00001"
    write_array_record(path, [b"abc" * 1000])
    for content in (b"", path.read_bytes()[:-50], b"something else" * 10_000):
        path.write_bytes(content)
        with pytest.raises(
            idx.DataError, match="cannot be read as an ArrayRecord file"
        ):
            records.Records([path])[0]


@pytest.mark.parametrize(
    "stages", [(1,), pytest.param((2, 2, 2, 2), marks=pytest.mark.slow)]
)
def test_trains_on_photographs(layout, tmp_path, monkeypatch, stages):
    """Part of ResNet-18, or all, at 224 x 224, on a folder with one damaged file."""
    monkeypatch.setitem(networks.STAGES, 18, (imagenet.Basic, stages))
    config = Config(
        data="imagenet",
        data_dir=layout,
        out=tmp_path,
        depth=18,
        width=4,
        batch_size=32,
        epochs=1,
        warmup_epochs=0.5,
        log_every=1,
    )
    with pytest.warns(match="train_00000025.JPEG cannot be decoded") as caught:
        assert data_parallel.main(config) == 0
    assert len(caught) == 1
    found = results.read(tmp_path / "data_parallel.jsonl")
    losses = [r["loss"] for r in curves.by_step(found, "step").values()]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    (test,) = curves.by_step(found, "test").values()
    assert test["accuracy"] * 40 == pytest.approx(round(test["accuracy"] * 40))
    assert found[-1]["kind"] == "end"


def test_settings_for_photographs(layout, tmp_path, capsys):
    for data, depth, text in (
        ("imagenet", 8, "18, 34 or 50"),
        ("digits", 18, "6 n + 2"),
    ):
        config = Config(data=data, data_dir=layout, out=tmp_path, depth=depth)
        assert data_parallel.main(config) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert f"received --depth {depth} for --data {data}: expected {text}" in said

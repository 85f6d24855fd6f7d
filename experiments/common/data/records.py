"""ImageNet as record files of `tf.train.Example`: TFRecord, or ArrayRecord by grain.

Two conversions are known by the names of their features: that of TensorFlow's models,
with labels from 1 on, and that of TensorFlow Datasets, with labels from 0 on. Both have
the classes in the order of their sorted wnids.
"""

import bisect
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain

from experiments.common.data import tfexample
from experiments.common.data.folders import Encoded
from experiments.common.data.idx import DataError
from experiments.common.data.tfrecord import TFRecord

CLASSES = 1000
SHARD = re.compile(r"tf_?record|array_?record|-\d{5}-of-\d{5}")
ARRAY = re.compile(r"array_?record")
TRAIN = re.compile(r"(^|[^a-z])train([^a-z]|$)")
VAL = re.compile(r"(^|[^a-z])val(idation)?([^a-z]|$)")


class Layout(NamedTuple):
    """The names of two features, and the label of the first class."""

    image: str
    label: str
    first: int


LAYOUTS = Layout("image/encoded", "image/class/label", 1), Layout("image", "label", 0)


class Records(Sequence[Encoded]):
    """The images of some files, one file after another."""

    def __init__(self, paths: Sequence[Path], classes: int = CLASSES):
        """
        Args:
            paths: of the files.
            classes: how many there are.

        Raises:
            DataError: one is no such file, or is cut off.
        """
        self._paths, self._classes = paths, classes
        self._files = [_open(path) for path in paths]
        self._ends = list(itertools.accumulate(map(len, self._files)))
        if not len(self):
            raise DataError(
                f"{len(paths)} record files, {paths[0]} the first, hold no record: "
                "expected some. Fetch them again."
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Encoded:
        file = bisect.bisect_right(self._ends, index)
        place = index - (self._ends[file] - len(self._files[file]))
        name = f"record {place} of {self._paths[file]}"
        try:
            features = tfexample.parse(self._files[file][place])
        except tfexample.Malformed as error:
            raise DataError(
                f"{name} is no tf.train.Example ({error}): expected one."
            ) from error
        for layout in LAYOUTS:
            image, label = features.get(layout.image), features.get(layout.label)
            if image and label and isinstance(image[0], bytes):
                return Encoded(image[0], self._label(label[0], layout, name), name)
        raise DataError(
            f"{name} has the features {', '.join(sorted(features)) or '(none)'}: "
            f"expected {' or '.join(f'{x.image} and {x.label}' for x in LAYOUTS)}."
        )

    def _label(self, stored: int | bytes, layout: Layout, name: str) -> int:
        label = int(stored) - layout.first
        if 0 <= label < self._classes:
            return label
        raise DataError(
            f"{name} has {layout.label} {stored}: expected {layout.first} to "
            f"{layout.first + self._classes - 1}, the classes in the order of their "
            f"wnids, counted from {layout.first} on."
        )


def open_splits(data_dir: Path) -> tuple[Records, Records, int] | None:
    """Training and validation images, and how many classes; None without such files.

    Files count if they are named as shards, and, with the name of the folder if that is
    train, val or validation, as one of the splits.

    Raises:
        DataError: there are some, but not of both splits, or not of a known kind.
    """
    places = data_dir, *(data_dir / name for name in ("train", "val", "validation"))
    files = (path for place in places if place.is_dir() for path in place.iterdir())
    shards = sorted(p for p in files if SHARD.search(p.name) and p.is_file())
    if not shards:
        return None
    train, val = ([p for p in shards if _within(p, data_dir, s)] for s in (TRAIN, VAL))
    if not train or not val:
        raise DataError(
            f"{data_dir} has {len(train)} record files of training and {len(val)} of "
            f"validation among {len(shards)}: expected both, named as "
            "train-00000-of-01024 and validation-00000-of-00128."
        )
    return Records(train), Records(val), CLASSES


def _within(path: Path, folder: Path, split: re.Pattern) -> bool:
    return split.search(str(path.relative_to(folder)).lower()) is not None


def _open(path: Path) -> Sequence[bytes]:
    if not ARRAY.search(path.name):
        return TFRecord(path)
    try:
        file: Any = grain.sources.ArrayRecordDataSource(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as an ArrayRecord file ({error}): expected a whole "
            "one, as its name says. Fetch it again, or name it for what it is."
        ) from error
    return file

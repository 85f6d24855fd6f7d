"""ImageNet as it is unpacked: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.

The label of an image is the place of its folder's name, the wnid, among those of train
in alphabetical order.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.common.data.idx import DataError

ENDINGS = ".jpeg", ".jpg", ".png"  # in letters of any case
LAYOUT = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
SORTING = (
    "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh"
)


class Encoded(NamedTuple):
    """An image as it is stored; the name is told if it cannot be decoded."""

    content: bytes
    label: int
    name: str


class Folder(Sequence[Encoded]):
    """The images in the folders of some classes."""

    def __init__(self, path: Path, labels: dict[str, int]):
        """
        Args:
            path: of the split.
            labels: of the folders to read, by their names.

        Raises:
            DataError: a class has no image.
        """
        self._path = path
        self._images: list[tuple[str, int]] = []
        for wnid, label in labels.items():
            names = images(path / wnid)
            if not names:
                raise DataError(
                    f"{path / wnid} holds no image: expected files that end in "
                    f"{', '.join(ENDINGS)}. Unpack {wnid}.tar there, or remove it."
                )
            self._images += [(f"{wnid}{os.sep}{name}", label) for name in names]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Encoded:
        name, label = self._images[index]
        path = self._path / name
        return Encoded(path.read_bytes(), label, str(path))


def open_splits(data_dir: Path) -> tuple[Folder, Folder, int]:
    """Training and validation images, and how many classes they have.

    Raises:
        DataError: the folder has another layout.
    """
    train, val = data_dir / "train", data_dir / "val"
    labels = {wnid: label for label, wnid in enumerate(classes(train))}
    tested = classes(val)
    if unknown := [wnid for wnid in tested if wnid not in labels]:
        raise DataError(
            f"{val} has {len(unknown)} classes that {train} has not, as {unknown[0]}: "
            f"expected some of those {len(labels)}. Complete train, or remove them."
        )
    val_labels = {wnid: labels[wnid] for wnid in tested}
    return Folder(train, labels), Folder(val, val_labels), len(labels)


def classes(split: Path) -> list[str]:
    """The names of the folders in the folder of a split, sorted.

    Raises:
        DataError: there are none.
    """
    if not split.is_dir():
        raise DataError(
            f"{split} is missing: expected {LAYOUT} in {split.parent}, or record files "
            "named as train-00000-of-01024 and validation-00000-of-00128."
        )
    with os.scandir(split) as entries:
        found = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
    if found:
        return found
    if flat := images(split):
        raise DataError(
            f"{split} holds {len(flat)} images and no folder: expected {LAYOUT}. The "
            "archive of the validation images unpacks like that; sort them into the "
            f"folders of their classes: run {SORTING} in {split}."
        )
    raise DataError(f"{split} is empty: expected {LAYOUT} in {split.parent}.")


def images(folder: Path) -> list[str]:
    """The names of the image files in a folder, sorted."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries if entry.name[0] != ".")
        return sorted(name for name in names if name.lower().endswith(ENDINGS))

"""CIFAR-10 in its binary layout: found or downloaded, verified, read."""

import math
import os
import tarfile
from pathlib import Path

import numpy as np
import pooch

from experiments.common.data.idx import VARIABLE, DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
SHAPE = 3, 32, 32  # of an image: planes of red, green and blue


def load(data_dir: Path | None = None) -> tuple[np.ndarray, ...]:
    """Images (n, 32, 32, 3), uint8, and labels (n,), int32: training, then test.

    Args:
        data_dir: the folder with the files, or with a folder `cifar-10-batches-bin`
            that holds them. None: $BNJAX_DATA if that is set, else the archive is
            downloaded, once.

    Raises:
        DataError: files are missing, altered, or cannot be downloaded.
    """
    if data_dir is None and os.environ.get(VARIABLE):
        data_dir = Path(os.environ[VARIABLE])
    files = _download() if data_dir is None else _read(data_dir)
    *training, test = (decode(name, content) for name, content in files.items())
    images, labels = map(np.concatenate, zip(*training, strict=True))
    return images, labels, *test


def decode(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of a file: records of a label and three colour planes.

    Raises:
        DataError: it is not a whole number of such records.
    """
    values = np.frombuffer(content, np.uint8)
    size = 1 + math.prod(SHAPE)
    if not content or len(content) % size or values[::size].max() > 9:
        raise DataError(
            f"{name} holds {len(content)} bytes: expected records of {size} bytes, a "
            "label from 0 to 9 and then the image. Remove it and fetch it again."
        )
    records = values.reshape(-1, size)
    images = records[:, 1:].reshape(-1, *SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int32)


def _read(data_dir: Path) -> dict[str, bytes]:
    """The verified files in a folder."""
    nested = data_dir / FOLDER
    folder = nested if nested.is_dir() else data_dir
    if missing := [name for name in MD5 if not (folder / name).is_file()]:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: expected the six files of CIFAR-10 "
            f"in its binary layout, {', '.join(MD5)}. Fetch and unpack {URL}, or leave "
            f"out --data-dir and {VARIABLE} to have that done."
        )
    for name, expected in MD5.items():
        received = pooch.file_hash(str(folder / name), alg="md5")
        if received != expected:
            raise DataError(
                f"{folder / name} has MD5 {received}: expected {expected}, that of "
                "CIFAR-10 as published. It is damaged or of another data set: replace "
                f"it by that in {URL}."
            )
    return {name: (folder / name).read_bytes() for name in MD5}


def _download() -> dict[str, bytes]:
    """The files in the archive, which is fetched unless it is in the cache.

    They are not unpacked: several processes may do this at the same time.
    """
    try:
        path = pooch.retrieve(
            URL, f"md5:{ARCHIVE_MD5}", path=pooch.os_cache("bnjax") / "cifar10"
        )
    except (OSError, ValueError) as error:  # no network, no space, another checksum
        raise DataError(
            f"CIFAR-10 could not be downloaded from {URL} ({error}). Fetch it by other "
            f"means, unpack it and name its folder by --data-dir or {VARIABLE}; or "
            "write --data digits, which needs no download."
        ) from error
    with tarfile.open(path) as archive:
        members = ((name, archive.extractfile(f"{FOLDER}/{name}")) for name in MD5)
        return {name: member.read() for name, member in members if member is not None}

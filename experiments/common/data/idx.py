"""The files of the MNIST family: found or downloaded, verified, read."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from experiments.common.images import DataError

VARIABLE = "BNJAX_DATA"
FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class Source(NamedTuple):
    """Where a data set comes from.

    Attributes:
        url: the folder that holds the files.
        sha256: of each of FILES.
    """

    url: str
    sha256: tuple[str, ...]


SOURCES = {
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            "0b367032e93c5d0cea0925647cfdb18614af8ee15f83e6f2fc2ad904a6835971",
            "1787548bbe0bff1ec2ecdc0ef292b02df999e2d1a6002d27500982c652b17203",
            "1a1a05eab793c14bb050b398624a11b0ffd1a2953baed553b1b9bd079e2a20be",
            "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
        ),
    ),
    "fashion_mnist": Source(  # no TLS on this host: the checksums stand for it
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        ),
    ),
}


def locate(name: str, data_dir: Path | None = None) -> list[Path]:
    """The paths of the verified FILES of the data set `name`.

    Args:
        name: a key of SOURCES.
        data_dir: the folder with the files, or with a folder `name` that holds them.
            None: $BNJAX_DATA if that is set, else the files are downloaded, once.

    Raises:
        DataError: files are missing, altered, or cannot be downloaded.
    """
    url, checksums = SOURCES[name]
    if data_dir is None and os.environ.get(VARIABLE):
        data_dir = Path(os.environ[VARIABLE])
    if data_dir is None:
        return _download(name)
    nested = data_dir / name
    folder = nested if nested.is_dir() else data_dir
    paths = [folder / file for file in FILES]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise DataError(
            f"{folder} lacks {', '.join(missing)}: expected the four files of {name}, "
            f"{', '.join(FILES)}. Fetch them from {url}, or leave out --data-dir and "
            f"{VARIABLE} to have them downloaded."
        )
    for path, expected in zip(paths, checksums, strict=True):
        received = pooch.file_hash(str(path), alg="sha256")
        if received != expected:
            raise DataError(
                f"{path} has sha256 {received}: expected {expected}, that of {name} as "
                "published. It is damaged, was compressed anew, or is of another data "
                f"set: replace it by {url}{path.name}."
            )
    return paths


def read(path: Path) -> np.ndarray:
    """The array of unsigned bytes in a gzipped IDX file.

    Raises:
        DataError: it is not such a file, or not all of one.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}): expected a whole gzip file. Remove it "
            "and fetch it again."
        ) from error
    rank = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    header = 4 + 4 * rank
    if rank and len(content) >= header:
        shape = np.frombuffer(content[4:header], ">u4").tolist()
        if len(content) == header + math.prod(shape):
            return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    raise DataError(
        f"{path} holds {len(content)} bytes that begin with {content[:4].hex()}: "
        "expected IDX, that is 000008 and the rank, the sizes as 32-bit integers, and "
        "as many bytes as they say. Remove it and fetch it again."
    )


def _download(name: str) -> list[Path]:
    """Fetches what the cache lacks; pooch verifies a file before it moves it there."""
    url, checksums = SOURCES[name]
    known = {f: f"sha256:{c}" for f, c in zip(FILES, checksums, strict=True)}
    store = pooch.create(pooch.os_cache("bnjax") / name, url, registry=known)
    try:
        return [Path(store.fetch(file)) for file in FILES]
    except (OSError, ValueError) as error:  # no network, no space, another checksum
        raise DataError(
            f"{name} could not be downloaded from {url} ({error}): expected "
            f"{', '.join(FILES)}. Fetch them by other means and name their folder by "
            f"--data-dir or {VARIABLE}, or write --data digits: those need no download."
        ) from error

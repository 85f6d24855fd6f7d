"""TFRecord files, uncompressed: any record, without TensorFlow.

A record is its length (8 bytes, little-endian), a checksum of that, the data, and a
checksum of those, each the masked CRC-32C. Those of all lengths are verified when a
file is opened: what is no TFRecord file, or is cut off, is found then. Those of the
data are not, as in pure Python that would take longer than decoding a photograph.
"""

import array
import os
import struct
from collections.abc import Sequence
from pathlib import Path

from experiments.common.data.idx import DataError

HEADER = struct.Struct("<QI")
FOOTER = 4  # bytes


class TFRecord(Sequence[bytes]):
    """The records of a file by number; only where they begin is kept in memory."""

    def __init__(self, path: Path):
        """
        Raises:
            DataError: it is no such file, or is cut off.
        """
        self._path = path
        self._starts, self._lengths = array.array("Q"), array.array("Q")
        with path.open("rb", buffering=0) as file:
            size, at = os.fstat(file.fileno()).st_size, 0
            while at < size:
                length = self._length(file.read(HEADER.size), at)
                self._starts.append(at + HEADER.size)
                self._lengths.append(length)
                at += HEADER.size + length + FOOTER
                if at > size:
                    raise DataError(
                        f"record {len(self) - 1} of {path} ends at byte {at}: expected "
                        f"at most {size}, the size of the file. It is cut off: fetch "
                        "it again."
                    )
                file.seek(at)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._starts[index])
            return file.read(self._lengths[index])

    def _length(self, header: bytes, at: int) -> int:
        if len(header) == HEADER.size:
            length, checksum = HEADER.unpack(header)
            if checksum == masked(header[:8]):
                return length
        raise DataError(
            f"{self._path} has {header.hex()} at byte {at}: expected an uncompressed "
            "TFRecord file, there a length of 8 bytes and its CRC-32C. It is damaged, "
            "or of another kind (ArrayRecord files have array_record in their names)."
        )


def masked(data: bytes) -> int:
    """The CRC-32C of some bytes as TFRecord files have it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """The CRC of Castagnoli, bit-reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _entry(crc: int) -> int:
    for _ in range(8):
        crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


TABLE = [_entry(byte) for byte in range(256)]

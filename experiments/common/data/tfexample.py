"""The message `tf.train.Example`, read without TensorFlow.

    message Example  { Features features = 1; }
    message Features { map<string, Feature> feature = 1; }
    message Feature  { oneof kind { BytesList bytes_list = 1; FloatList float_list = 2;
                                    Int64List int64_list = 3; } }

Each list has its values in field 1, integers packed into one or not. On the wire, a
message is a sequence of fields; a map, of messages of a key (1) and a value (2).
"""

from collections.abc import Iterator

Values = list[bytes] | list[int]
FIXED = {1: 8, 5: 4}  # bytes, by wire type
VARINT, LENGTH = 0, 2  # wire types


class Malformed(ValueError):
    """These bytes are no such message."""


def parse(record: bytes) -> dict[str, Values]:
    """The features by name; those that hold neither bytes nor integers are empty.

    Raises:
        Malformed: it is no such message.
    """
    found: dict[str, Values] = {}
    for features in _messages(record, 1):
        for item in _messages(features, 1):
            name, feature = (b"".join(_messages(item, field)) for field in (1, 2))
            found[name.decode(errors="replace")] = _values(feature)
    return found


def _values(feature: bytes) -> Values:
    if strings := _messages(feature, 1):
        return [value for part in strings for value in _messages(part, 1)]
    numbers: list[int] = []
    for part in _messages(feature, 3):
        for _, value in _fields(part):
            numbers += [value] if isinstance(value, int) else _unpacked(value)
    return [n - 2**64 if n >= 2**63 else n for n in numbers]


def _messages(message: bytes, number: int) -> list[bytes]:
    """What the fields of one number hold, if that has a length."""
    found = (value for field, value in _fields(message) if field == number)
    return [value for value in found if isinstance(value, bytes)]


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The number and content of each field: an integer, or bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == LENGTH:
            size, at = _varint(message, at)
        else:
            size = FIXED.get(kind, len(message))
        if at + size > len(message):
            raise Malformed(f"a field of type {kind} ends after the message")
        yield number, message[at : at + size]
        at += size


def _unpacked(packed: bytes) -> list[int]:
    found, at = [], 0
    while at < len(packed):
        value, at = _varint(packed, at)
        found.append(value)
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and where it ends."""
    value = 0
    for place, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise Malformed("a number has no end")

"""The text of an optimized program, read: its computations and their instructions."""

import math
import re
from typing import NamedTuple

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
    "token": 0,
    "opaque": 0,
}
CALLED = r"(?:calls|to_apply|body|branch_computations|(?:true|false)_computation)"


class Array(NamedTuple):
    """An array in a program: its type, whether it is on the chip; its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """A line of a program; `result` has one item per element of a tuple."""

    name: str
    result: list[list[Array]]
    op: str
    operands: list[str]
    attributes: str
    root: bool

    @property
    def called(self) -> list[str]:
        """The computations that it runs: of a fusion, call, loop or conditional."""
        found = []
        for names in re.findall(CALLED + r"=(\{[^}]*\}|%?[\w.\-]+)", self.attributes):
            found += re.findall(r"[\w.\-]+", names)
        return found

    @property
    def arrays(self) -> list[Array]:
        return [array for part in self.result for array in part]


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = None, []
    for row in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", row):
            lines = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", row):
            lines.append(_instruction(match[2], match[3], bool(match[1])))
    if entry is None:
        raise ValueError(f"no ENTRY computation in the program: {text[:200]!r}")
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    result, rest = text[:end], text[end:].lstrip()
    op, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    operands = [] if op == "constant" else re.findall(r"%([\w.\-]+)", rest[:end])
    parts = _items(result[1:-1]) if result.startswith("(") else [result]
    attributes = rest if op == "parameter" else rest[end + 1 :]
    return Instruction(name, list(map(_arrays, parts)), op, operands, attributes, root)


def _closing(text: str) -> int:
    """Where the parenthesis that opens `text` has been closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    raise ValueError(f"a parenthesis is not closed: {text[:200]!r}")


def _items(text: str) -> list[str]:
    """The types of a tuple: split at commas that are in no bracket."""
    items, depth, start = [], 0, 0
    for at, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and not depth:
            items.append(text[start:at])
            start = at + 1
    return [*items, text[start:]] if text else []


def _arrays(text: str) -> list[Array]:
    """The arrays of a type, those of nested tuples as well."""
    found = []
    for dtype, shape, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?", text):
        if dtype not in BYTES:
            raise ValueError(f"{dtype} is no type known here: {text[:200]!r}")
        sizes = tuple(int(size) for size in shape.split(",") if size)
        found.append(Array(dtype, sizes, "S(1)" in layout))
    return found

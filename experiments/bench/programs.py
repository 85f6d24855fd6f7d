"""What an optimized program does with device memory, counted in its text.

XLA's text of a compiled program (`compiled.as_text()`) lists, in order, the kernels
that the device runs: the instructions of the ENTRY computation. Each reads its operands
from device memory and writes its result there; what a fusion computes in between stays
on the chip. So the bytes of operands and results, summed over the kernels, are what
the program moves through device memory.

Counted so:

- Parameters, constants, tuples and other views of memory move nothing; a pair of
  `*-start` and `*-done` is one kernel.
- An operand that a kernel only slices counts for the slices, also where a fusion
  widens or reshapes it first. An update in place counts for the update.
- Arrays in on-chip memory (space 1 in their layout; only TPUs have it) do not count.
- The body of a loop counts as often as it runs, if the program says so. Else it may
  run not at all, and is counted apart, once.
- A conditional counts as its cheapest branch. The other branches are counted apart.

Known gaps: an operand counts once per kernel, however often the kernel reads it; the
padding of tiles on a TPU is not counted, nor what a cache saves.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
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

VIEWS = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "domain"),
}
VIEW_CALLS = 'custom_call_target="(?:AllocateBuffer|ConcatBitcast)"'
COLLECTIVES = {
    *("all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter"),
    *("collective-permute", "collective-broadcast"),
}
# What a fusion does element by element, so that a slice of it is of its operand.
ELEMENTWISE = {
    *("add", "subtract", "multiply", "negate", "convert", "bitcast", "copy"),
    *("reshape", "transpose"),
}
SLICES = ("slice", "dynamic-slice", "gather")


# The text of a program: its computations and their instructions


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


# What is counted


class Kernel(NamedTuple):
    """A part of the program that is run at once.

    Attributes:
        name: of its instruction.
        reads: from device memory, in bytes.
        writes: to device memory, each array.
        times: how often it runs.
    """

    name: str
    reads: int
    writes: list[Array]
    times: int = 1

    @property
    def bytes(self) -> int:
        return self.times * (self.reads + sum(array.bytes for array in self.writes))


class Collective(NamedTuple):
    """What each device hands in."""

    kind: str
    elements: int
    bytes: int


@dataclass
class Part:
    """Kernels that run together, and their collectives."""

    kernels: list[Kernel] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Read and written in device memory."""
        return sum(kernel.bytes for kernel in self.kernels)

    def written(self, least: int) -> list[tuple[str, str]]:
        """The arrays of at least so many elements that it writes; which kernel does."""
        return [
            (str(array), kernel.name)
            for kernel in self.kernels
            for array in kernel.writes
            if array.elements >= least
        ]

    def add(self, other: "Part") -> None:
        self.kernels += other.kernels
        self.collectives += other.collectives


class Program:
    """An optimized program.

    Attributes:
        always: what runs on each call; of a conditional, its cheapest branch.
        sometimes: all other branches.
        unknown_loops: loops of which the program does not say how often they run.
    """

    def __init__(self, text: str):
        """
        Raises:
            ValueError: there is no entry computation, or nothing in it that the device
                would run.
        """
        self._computations, self._entry = parse(text)
        self.unknown_loops = 0
        self._demands: dict[str, list[int]] = {}
        self.always, self.sometimes = self._run(self._entry, 1)
        if not self.always.kernels:
            raise ValueError(f"nothing is run by the program: {text[:200]!r}")

    def on_chip(self, least: int) -> int:
        """How many arrays of at least so many elements are in on-chip memory."""
        return sum(
            array.on_chip and array.elements >= least
            for line in self._top()
            for array in line.arrays
        )

    def convolutions(self) -> tuple[int, int]:
        """How many fusions hold a convolution; how many of these a reduction as well.

        A TPU computes the sums of a convolution's output there, at no cost in memory.
        """
        fusions = [line for line in self._top() if line.op == "fusion"]
        ops = [set(self._ops(line.called)) for line in fusions]
        held = [found for found in ops if "convolution" in found]
        return len(held), sum("reduce" in found for found in held)

    def _top(self) -> list[Instruction]:
        return self._computations[self._entry]

    def _ops(self, computations: Iterable[str]) -> Iterator[str]:
        for name in computations:
            for line in self._computations[name]:
                yield line.op
                if line.op in ("fusion", "call"):  # not the addition of a reduction
                    yield from self._ops(line.called)

    def _run(self, computation: str, times: int) -> tuple[Part, Part]:
        """What a computation runs always, and sometimes."""
        always, sometimes = Part(), Part()
        lines = self._computations[computation]
        types = {line.name: line for line in lines}
        for line in lines:
            called, rounds = line.called, times
            if line.op == "conditional":
                branches = [self._run(name, times) for name in called]
                branches.sort(key=lambda parts: _cost(parts[0]))
            elif line.op == "while":
                rounds = self._trips(line)
                branches = [self._run(called[-1], times * (rounds or 1))]
                if rounds is None:  # not at all, perhaps
                    branches.insert(0, (Part(), Part()))
            elif line.op == "call" or (line.op == "async-start" and called):
                branches = [self._run(called[0], times)]
            else:
                always.collectives += self._sent(line, types) * times
                always.kernels += self._kernel(line, types, times)
                continue
            always.add(branches[0][0])
            sometimes.add(branches[0][1])
            for rare in branches[1:]:
                for part in rare:
                    sometimes.add(part)
        return always, sometimes

    def _trips(self, line: Instruction) -> int | None:
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes)
        self.unknown_loops += found is None
        return int(found[1]) if found else None

    def _sent(
        self, line: Instruction, types: dict[str, Instruction]
    ) -> list[Collective]:
        kind = line.op.removesuffix("-start")
        if kind in COLLECTIVES:
            arrays = [a for name in line.operands for a in types[name].arrays]
            elements = sum(array.elements for array in arrays)
            return [Collective(kind, elements, sum(array.bytes for array in arrays))]
        found = []
        if kind == "fusion":  # some TPU programs have them inside
            for name in line.called:
                inner = {line.name: line for line in self._computations[name]}
                for each in inner.values():
                    found += self._sent(each, inner)
        return found

    def _kernel(
        self, line: Instruction, types: dict[str, Instruction], times: int
    ) -> list[Kernel]:
        """What one instruction moves; nothing if it is a view."""
        op = line.op.removesuffix("-start")
        if op in VIEWS or op.endswith(("-done", "-update")):
            return []
        if re.search(VIEW_CALLS, line.attributes):
            return []
        results = line.result
        if line.op.endswith("-start"):  # (source, result, ...), a copy's the other way
            result = {"copy-start": 0, "all-reduce-start": slice(None)}
            which = result.get(line.op, 1)
            results = results[which] if isinstance(which, slice) else [results[which]]
        sources = [
            (index, array)
            for index, name in enumerate(line.operands)
            if name not in line.operands[:index]
            for array in types[name].arrays
            if not array.on_chip
        ]
        writes = [array for part in results for array in part]
        if op == "dynamic-update-slice":
            update = types[line.operands[1]].arrays[0]
            sources = [source for source in sources if source[0] > 0]
            writes = [update._replace(on_chip=writes[0].on_chip)]
        reads = [array.bytes for _, array in sources]
        if op in SLICES:
            moved = sum(array.bytes for array in writes)
            reads = [
                min(r, moved) if i == 0 else r for r, (i, _) in zip(reads, sources)
            ]
        elif op == "fusion" and line.called:
            demands = self._demanded(line.called[0])
            reads = [min(r, demands[i]) for r, (i, _) in zip(reads, sources)]
            writes = self._updated(line.called[0], writes)
        writes = [array for array in writes if not array.on_chip]
        return [Kernel(line.name, sum(reads), writes, times)]

    def _demanded(self, computation: str) -> list[int]:
        """The bytes of each parameter that a fused computation reads."""
        if computation not in self._demands:
            lines = self._computations[computation]
            elements: dict[str, int] = {}
            for line in reversed(lines):  # users stand behind what they use
                elements[line.name] = self._read(line, lines, elements)
            parameters = {
                int(line.attributes.split(")")[0]): line
                for line in lines
                if line.op == "parameter"
            }
            self._demands[computation] = [
                elements[line.name] * BYTES[line.arrays[0].dtype]
                for _, line in sorted(parameters.items())
            ]
        return self._demands[computation]

    def _read(
        self, line: Instruction, lines: list[Instruction], elements: dict[str, int]
    ) -> int:
        """The elements of an instruction's result that are needed."""
        size = sum(array.elements for array in line.arrays)
        needed = size if line.root else 0
        for user in lines:
            if line.name not in user.operands:
                continue
            first = user.operands[0] == line.name
            same = sum(array.elements for array in user.arrays) == size
            if (user.op in SLICES and first) or (user.op in ELEMENTWISE and same):
                needed += elements[user.name]
            elif user.op == "dynamic-update-slice" and first:
                continue  # in place: what is not updated stays
            elif user.op == "fusion":
                inner = self._demanded(user.called[0])
                width = BYTES[line.arrays[0].dtype] or 1
                at = [i for i, name in enumerate(user.operands) if name == line.name]
                needed += sum(inner[i] // width for i in at)
            else:
                return size
        return min(needed, size)

    def _updated(self, computation: str, writes: list[Array]) -> list[Array]:
        """What a fusion writes: of an array updated in place, the update."""
        lines = {line.name: line for line in self._computations[computation]}
        (root,) = (line for line in lines.values() if line.root)
        names = root.operands if root.op == "tuple" else [root.name]
        if len(names) != len(writes):
            return writes
        result = []
        for name, array in zip(names, writes):
            while lines[name].op == "bitcast":
                name = lines[name].operands[0]
            if lines[name].op == "dynamic-update-slice":
                update = lines[lines[name].operands[1]].arrays[0]
                array = update._replace(on_chip=array.on_chip)
            result.append(array)
        return result


def _cost(part: Part) -> tuple[int, int]:
    return part.bytes, len(part.collectives)

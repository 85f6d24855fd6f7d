"""Results as JSON lines: appended while a run goes on, and stamped with its origin."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import bnjax

Record = dict[str, Any]

HERE = Path(__file__).parents[1]
PLACES = "data_dir", "out", "part", "record", "smoke", "plot_only"
"""The settings that do not change a result."""


class Log:
    """A JSON-lines file that one run is appended to, record by record.

    Each record is one line, on disk once `add` returns, with the fields `kind`, `run`
    and `seconds` (since the start). Several processes may append to one file.
    """

    def __init__(self, path: Path, digits: int | None = 6):
        """
        Args:
            path: of the file, which is made if need be.
            digits: significant digits of each number; None for all.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
        self._start = time.perf_counter()
        self._digits = digits
        self.run = uuid.uuid4().hex[:12]
        self._file = path.open("ab", buffering=0)  # each line in one write
        self._file.write(b"" if whole else b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, kind: str, **fields: Any) -> None:
        """Appends one record; numbers that are not finite become null."""
        seconds = time.perf_counter() - self._start
        record = {"kind": kind, "run": self.run, "seconds": seconds, **fields}
        line = json.dumps(plain(record, self._digits), allow_nan=False)
        self._file.write(f"{line}\n".encode())


def read(path: Path) -> list[Record]:
    """The records in `path`, without any line that was cut off as it was written."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def last_run(path: Path, **settings: Any) -> tuple[Record, list[Record]]:
    """The first record of the newest run with these settings, and its measurements.

    Raises:
        LookupError: no run has these settings and a measurement.
    """
    records = read(path) if path.exists() else []
    for first in reversed([r for r in records if r["kind"] == "run"]):
        if first["settings"].items() >= settings.items():
            of_run = (r for r in records if r["run"] == first["run"])
            rows = [r for r in of_run if r["kind"] == "measurement"]
            if rows:
                return first, rows
    sought = ", ".join(f"{name} {value}" for name, value in settings.items())
    raise LookupError(
        f"{path} has no measurements with {sought}: expected some. "
        "Leave out --plot-only to train."
    )


def places(name: str, out: Path, record: bool) -> tuple[Path, Path]:
    """The file of an experiment's records, and the folder of its pictures.

    Args:
        name: of the experiment.
        out: the folder of both.
        record: the folders that are committed, instead.
    """
    if record:
        return HERE / "results" / f"{name}.jsonl", HERE / "figures"
    return out / f"{name}.jsonl", out


def settings_of(config: Any) -> Record:
    """The fields of a dataclass that decide the results."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in PLACES}


def stamp() -> Record:
    """When, with what and on what this runs; call it after JAX has its devices."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "bnjax": bnjax.__version__,
            **versions,
        },
        "commit": _commit(),
        "hardware": {
            "platform": jax.default_backend(),
            "device": jax.devices()[0].device_kind,
            "cpu": _cpu(),
            "cores": cores(),
        },
    }


def cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str | None:
    """The commit of the source, marked if changed since; None without git."""
    git = ["git", "-C", str(HERE)]

    def output(*command: str) -> str:
        return subprocess.check_output(
            [*git, *command], stderr=subprocess.DEVNULL, text=True
        ).strip()

    try:
        commit = output("describe", "--always", "--abbrev=12")
        written = ":(exclude)results", ":(exclude)figures"  # by the runs before
        changed = output("status", "--porcelain", "--", ":/", *written)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-changed" if changed else commit


def _cpu() -> str:
    """The processor's name, as far as the system tells."""
    table = Path("/proc/cpuinfo")
    if table.exists():
        for line in table.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def plain(value: Any, digits: int | None = 6) -> Any:
    """`value` as JSON has it: None for NaN and infinities, lists, no arrays.

    Args:
        value: of dicts, sequences, arrays, paths and scalars.
        digits: significant digits of each number; None for all.
    """
    if isinstance(value, dict):
        return {key: plain(v, digits) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, digits) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), digits)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value

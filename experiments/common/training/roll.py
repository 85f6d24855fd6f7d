"""Which of several processes is alive, and in what: notes in a folder that they share.

Each process renews its note every second, or ten if there are many. Those that have to
give up read them all, and so can name the process that is missing, silent or elsewhere.

Run as a program, this reports the end of a process that had no time to do so itself.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WATCHED = 3  # periods: a process that wrote nothing for so long is called silent
READERS = 16  # processes that read the notes; more would only burden the file system
SHOWN = 12  # lines about other processes


class Roll:
    """The notes of `processes` processes, of which this is number `process`."""

    def __init__(self, folder: Path, process: int, processes: int):
        self.folder = folder
        self.process = process
        self.processes = processes
        self.period = min(10.0, max(1.0, processes / 64))  # seconds between two notes
        self.watched = WATCHED * self.period
        self._count = 0
        self._ended = False

    def note(self, phase: str, *, ended: bool = False) -> None:
        """Renews this process's note; if that fails, the others call it silent.

        After an `ended` one there is no other: threads may race.
        """
        if self._ended:
            return
        self._ended = ended
        self._count += 1
        fields = {"count": self._count, "time": time.time(), "pid": os.getpid()}
        content = json.dumps({"phase": phase, "ended": ended, **fields})
        temporary = self.folder / f"{self.process}.tmp"
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(content)
            temporary.replace(self._path(self.process))

    def others(self) -> list[str]:
        """A line on each other process, after watching them for a while."""
        if self.process >= READERS:
            return [f"processes 0 to {READERS - 1} tell how the others are"]
        before = self._read()
        time.sleep(self.watched)
        after = self._read()
        lines = []
        for process in range(self.processes):
            if process != self.process:
                note = after.get(process)
                lives = note is not None and note != before.get(process)
                lines.append(f"process {process} {self._state(note, lives)}")
        lines.sort(key=lambda line: "is alive" in line)
        more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        return lines[:SHOWN] + more

    def _path(self, process: int) -> Path:
        return self.folder / f"{process}.json"

    def _read(self) -> dict[int, dict[str, Any]]:
        notes = {}
        for process in range(self.processes):
            with contextlib.suppress(OSError, ValueError):
                notes[process] = json.loads(self._path(process).read_text())
        return notes

    def _state(self, note: dict[str, Any] | None, lives: bool) -> str:
        if note is None:
            return "has not been heard of: it did not start, or has another --out"
        if lives and not note["ended"]:
            return f"is alive: {note['phase']}"
        age = max(0, time.time() - self.watched - note["time"])
        if note["ended"]:
            return f"ended {age:.0f} s ago: {note['phase']}"
        return (
            f"is silent (killed, stopped or cut off), last heard of {age:.0f} s ago: "
            f"{note['phase']} (pid {note['pid']})"
        )


def report(reason: str, roll: Roll | None, advice: str) -> str:
    """The last message of a process: why it ends, how the others do, what to do."""
    if roll is None:
        return f"\nerror: {reason}\n{advice}\n"
    lines = "".join(f"  {line}\n" for line in roll.others())
    name = f"process {roll.process} of {roll.processes}"
    return f"\nerror: {name} gives up: {reason}\n{lines}{advice}\n"


def main(folder: str, process: str, processes: str, advice: str) -> None:
    """Waits for the end of standard input, then reports, unless told not to."""
    if sys.stdin.buffer.read():
        return
    reason = (
        "it was killed, or aborted by JAX because process 0, which coordinates, or "
        "another one is gone"
    )
    roll = Roll(Path(folder), int(process), int(processes))
    print(report(reason, roll, advice), file=sys.stderr, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

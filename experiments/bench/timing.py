"""How the benches measure time: calls that take turns, and their medians."""

import os
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

# Outputs of megabytes are page-faulted anew on every call unless glibc keeps memory.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

Name = TypeVar("Name", bound=Hashable)


def keep_memory(module: str, settings: Mapping[str, str] = MALLOC) -> None:
    """Restarts `python -m module` with these settings, if some are missing."""
    if not all(name in os.environ for name in settings):
        arguments = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | settings)


def interleaved(
    calls: dict[Name, Callable[[], Any]],
    seconds: float,
    least: int = 5,
    untimed: int = 0,
) -> dict[Name, float]:
    """The median seconds of each call; they take turns, after three to warm up.

    Args:
        calls: each starts the work and returns its result, which is waited for.
        seconds: for all together.
        least: turns, however long they take.
        untimed: calls at the start of each turn; with one, a call follows itself, and
            finds neither the caches nor the busy threads that another one left.
    """
    for call in calls.values():
        for _ in range(3):
            jax.block_until_ready(call())
    times: dict[Name, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or any(len(t) < least for t in times.values()):
        for name, call in calls.items():
            for _ in range(untimed):
                jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}

"""Starts the processes of a run on this machine, and again after a failure."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from experiments.common.training.guard import FAILED, LAUNCHER

POLL = 0.1  # seconds
GRACE = 10.0  # seconds for the others to report, once one process has failed


def launch(
    command: Callable[[int, str, bool], Sequence[str]], processes: int, restarts: int
) -> int:
    """Runs all processes to their end; the exit status of the run.

    None is left when this returns or raises; if it is killed, they end themselves.

    Args:
        command: of a process, from its number, the coordinator's address and whether
            it is to resume.
        processes: how many.
        restarts: how often to start all of them again, from the last checkpoint, after
            one has failed. Wrong settings or data are no reason to.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    status = FAILED
    for attempt in range(restarts + 1):
        address = f"127.0.0.1:{free_port()}"
        commands = [command(i, address, attempt > 0) for i in range(processes)]
        try:
            status = _run(commands)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        if status in (0, 1):
            return status
        if attempt < restarts:
            _say(f"restart {attempt + 1} of {restarts}, from the last checkpoint")
    return status


def _run(commands: Sequence[Sequence[str]]) -> int:
    """One attempt: 0 if all went well, 1 for a wrong setting, else FAILED."""
    environment = {**os.environ, LAUNCHER: str(os.getpid())}
    workers: list[subprocess.Popen] = []
    try:
        for command in commands:
            # In a group of its own: an interrupt from the keyboard is the launcher's.
            worker = subprocess.Popen(command, env=environment, process_group=0)
            workers.append(worker)
        return _wait(workers)
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


def _wait(workers: Sequence[subprocess.Popen]) -> int:
    """Until all have ended well, or GRACE seconds after one has not."""
    deadline = float("inf")
    failed: dict[int, int] = {}
    while time.monotonic() < deadline:
        states = [worker.poll() for worker in workers]
        for process, state in enumerate(states):
            if state and process not in failed:
                failed[process] = state
                deadline = min(deadline, time.monotonic() + GRACE)
                _say(f"process {process} of {len(workers)} {_ending(state)}")
        if None not in states:
            break
        time.sleep(POLL)
    if not failed:
        return 0
    return 1 if 1 in failed.values() else FAILED


def _ending(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def _say(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]

"""Ends a process, with a message, when it can no longer go on together with others.

A process that waits for another one waits in C++, where no exception reaches it. What a
lost process leads to was measured with jax 0.10.2 and 0.12.0 on CPUs (gloo):

* killed: the next exchange of the others raises. They report that.
* stopped, or busy elsewhere: the others' next exchange never returns. A thread here
  sees that nothing has happened for too long.
* never started: the same, in `jax.distributed.initialize`.
* process 0, which coordinates, gone: JAX aborts the others at once (SIGABRT). A small
  helper process notices and reports for them.

JAX's own time limits end a process without a word on how to go on; `connect` sets
them far above the guard's. The process ends by `os._exit`, for the ordinary way out
waits for the others. A checkpoint that is being written is lost, whole ones are not.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import jax

from experiments.common.training import roll

FAILED = 75  # EX_TEMPFAIL of sysexits.h: the same command, resumed, may well succeed
LAUNCHER = "BNJAX_LAUNCHER"  # the process id of the launcher, whose end is a worker's
TICK = 0.25  # seconds
CURSOR_ON = "\033[?25h"  # a progress bar hides it


class Guard:
    """Watches over one of several processes while it is entered; see the module.

    A process alone needs none: then nothing here does anything.
    """

    def __init__(self, notes: Path, *, active: bool, timeout: float, advice: str):
        """
        Args:
            notes: the folder of the notes of `roll`.
            active: whether there are several processes.
            timeout: the longest phase, in seconds, unless `enter` says otherwise.
            advice: the end of every message: how to go on.
        """
        self._notes = notes
        self._active = active
        self._timeout = timeout
        self._advice = advice
        self._roll: roll.Roll | None = None
        self._helper: subprocess.Popen | None = None
        self._speaking = threading.Lock()
        self._done = threading.Event()
        self.enter("starting")

    def __enter__(self) -> Self:
        if self._active:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._active and error is not None:
            lost = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
            if not lost:
                traceback.print_exception(error)
            what = "an exchange failed" if lost else type(error).__name__
            reason = str(error).splitlines()[0] if str(error) else ""
            self._fail(f"{what} in {self._phase}: {reason}")
        self.end(0)

    def join(self, process: int, processes: int) -> None:
        """Tells who this is; from now on the others can see it, and it them."""
        if not self._active:
            return
        self._roll = roll.Roll(self._notes, process, processes)
        self._roll.note(self._phase)
        arguments = [str(self._notes), str(process), str(processes), self._advice]
        self._helper = subprocess.Popen(
            [sys.executable, "-P", roll.__file__, *arguments],
            stdin=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is not for it
        )

    def enter(self, phase: str, limit: float | None = None) -> None:
        """Tells that the last phase is over; `limit` seconds from now this one is."""
        self._phase = phase
        self._limit = self._timeout if limit is None else limit
        self._idle = 0.0

    def end(self, status: int) -> int:
        """Ends the watch; with several processes, a status other than 0 ends this."""
        self._done.set()
        if self._roll is not None:
            self._roll.note(f"exit status {status}", ended=True)
        self._dismiss_helper()
        sys.stdout.flush()
        return self._leave(status) if status and self._active else status

    def _watch(self) -> None:
        launcher = int(os.environ.get(LAUNCHER, "0"))
        for ticks in itertools.count():
            if self._done.wait(TICK):
                return
            # Counted, not timed: a process that was stopped itself is not late.
            self._idle += TICK
            if self._roll is not None:
                if ticks % round(self._roll.period / TICK) == 0:
                    self._roll.note(self._phase)
            if launcher not in (0, os.getppid()):
                os._exit(FAILED)
            if self._idle > self._limit:
                self._fail(f"no progress for {self._limit:g} s in {self._phase}")

    def _fail(self, reason: str) -> None:
        """Reports and leaves; of two threads, the first one does."""
        with self._speaking:
            self._done.set()
            if self._roll is not None:
                self._roll.note(reason, ended=True)
            message = roll.report(reason, self._roll, self._advice)
            cursor = CURSOR_ON if os.isatty(2) else ""
            os.write(2, (cursor + message).encode())  # waits for no other thread
            self._dismiss_helper()
            self._leave(FAILED)

    def _leave(self, status: int) -> NoReturn:
        if self._roll is not None and self._roll.process == 0:
            time.sleep(self._roll.watched)  # once it is gone, JAX aborts the others
        os._exit(status)

    def _dismiss_helper(self) -> None:
        if self._helper is not None and self._helper.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._helper.stdin.write(b"reported")
                self._helper.stdin.close()
            self._helper.wait()

"""The processes of a run: their settings, and how they meet."""

import dataclasses
import tempfile
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from experiments.common.settings import SettingsError
from experiments.common.training.guard import Guard

BEYOND = 3600  # seconds that JAX waits: the guard, which can explain, gives up before


class Preempted(Exception):
    """The machine is wanted back, and all that matters is saved."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Settings of the processes; each is an option of the command line."""

    out: Path | None = None
    """The run's folder, which all processes share: records, checkpoints. One each."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; if there is none, begin."""
    distributed: bool = False
    """One of several processes, as Slurm, Open MPI, Kubernetes or a TPU pod tells."""
    coordinator: str | None = None
    """Where nobody tells: the host and a free port of process 0, as host:port;"""
    num_processes: int | None = None
    """how many processes there are;"""
    process_id: int | None = None
    """and which of them this is, from 0 on."""
    timeout: float = 120.0
    """Seconds after which a step, or another phase, is given up: a process is lost."""
    start_timeout: float = 600.0
    """The same for the start of all processes, and for compilation."""
    local_processes: int | None = None
    """Start so many processes on this machine, to try things out."""
    devices_per_process: int | None = None
    """Virtual devices, on the CPU; with --local-processes one, unless said here."""
    max_restarts: int = 0
    """How often --local-processes starts all of them again when one was lost."""

    @property
    def several(self) -> bool:
        """Whether this is one of several processes."""
        return self.distributed or self.coordinator is not None

    @property
    def launches(self) -> bool:
        """Whether this is to start processes, and is none of them."""
        return self.local_processes is not None and not self.several


def check(cluster: Cluster) -> None:
    """Raises SettingsError if only some of what belongs together is given."""
    given = [cluster.coordinator, cluster.num_processes, cluster.process_id]
    if None in given and any(value is not None for value in given):
        raise SettingsError(
            f"received --coordinator {given[0]}, --num-processes {given[1]}, "
            f"--process-id {given[2]}: expected all three, or --distributed."
        )


def make_writable(folder: Path) -> None:
    """Makes a folder, if need be, and tries to write to it.

    Raises:
        SettingsError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"a byte, for a full disk to refuse")
    except OSError as error:
        raise SettingsError(
            f"{folder} cannot be written to ({error}): expected a folder for the run, "
            "which all processes share. Name another by --out."
        ) from error


def connect(cluster: Cluster, guard: Guard) -> tuple[int, int]:
    """Meets the other processes; this one's number and how many there are."""
    if cluster.devices_per_process is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cluster.devices_per_process)
    if not cluster.several:
        return 0, 1
    if cluster.process_id is not None and cluster.num_processes is not None:
        guard.join(cluster.process_id, cluster.num_processes)
    guard.enter("waiting for all processes to start", cluster.start_timeout)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        initialization_timeout=BEYOND,
        heartbeat_timeout_seconds=BEYOND,
        shutdown_timeout_seconds=BEYOND,
    )
    if cluster.process_id is None:
        guard.join(jax.process_index(), jax.process_count())
    return jax.process_index(), jax.process_count()


def preempted(cluster: Cluster, step: int) -> bool:
    """Whether a process got SIGTERM; in all processes first after the same step."""
    return cluster.several and multihost_utils.reached_preemption_sync_point(step)

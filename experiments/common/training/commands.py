"""Command lines: from the settings of a run back to what starts and resumes it."""

import dataclasses
import shlex
import sys
from pathlib import Path

from experiments.common.training import launcher
from experiments.common.training.cluster import Cluster


def command(module: str, config: Cluster) -> list[str]:
    """The arguments of Python that give these settings, which extend Cluster."""
    options = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            options.append("--" + field.name.replace("_", "-"))
            values = value if isinstance(value, tuple) else (value,)
            options += [] if isinstance(value, bool) else map(str, values)
    return ["-m", module, *options]


def launch(module: str, config: Cluster) -> int:
    """Runs `config.local_processes` of the module on this machine; the exit status."""

    def worker(process: int, address: str, again: bool) -> list[str]:
        settings = dataclasses.replace(
            config,
            coordinator=address,
            num_processes=config.local_processes,
            process_id=process,
            devices_per_process=config.devices_per_process or 1,
            resume=config.resume or again,
        )
        return [sys.executable, *command(module, settings)]

    return launcher.launch(worker, config.local_processes or 1, config.max_restarts)


def advice(module: str, config: Cluster, checkpoints: Path) -> str:
    """How to go on after a failure."""
    where, resumed = "", dataclasses.replace(config, resume=True)
    if config.local_processes is not None:
        resumed = dataclasses.replace(
            resumed, coordinator=None, num_processes=None, process_id=None
        )
    elif config.several:
        where = ", in every process as before"
    return (
        f"Whole checkpoints remain in {checkpoints}. To go on from the newest, "
        f"run{where}:\n  {shlex.join(['python', *command(module, resumed)])}"
    )

"""The settings that every experiment has, and what becomes of them."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parents[1] / "results"


class SettingsError(Exception):
    """Settings do not fit together; the message says how they would."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options that every experiment has."""

    data_dir: Path | None = None
    """Where the files of the data lie, if not to be downloaded; or BNJAX_DATA."""
    out: Path | None = None
    """The folder of the results, which are appended to, and of the pictures. By default
    experiments/results, or with --smoke one that is removed."""
    smoke: bool = False
    """A run of seconds, to see that all works."""
    plot_only: bool = False
    """Train nothing; print and draw what there is of these settings again."""


def use_cores(count: int) -> None:
    """Makes `count` CPU cores a device each; to be called before JAX is used.

    XLA's threads leave the second core half idle on matrices this small. Two devices
    with half of the networks each keep both busy.
    """
    jax.config.update("jax_num_cpu_devices", count)


def start(work: Callable[[Any], int], smoke: dict[str, Any], config: Any) -> int:
    """Does the work of an experiment; with --smoke, in seconds, and leaves nothing.

    Args:
        work: (config) -> the exit status.
        smoke: the settings of a run of seconds.
        config: with the fields `smoke` and `out` of `Settings`.
    """
    if not config.smoke:
        return work(config)
    # So few steps take less time than their optimization.
    jax.config.update("jax_disable_most_optimizations", True)
    with tempfile.TemporaryDirectory() as folder:
        changed = {"smoke": False, "out": config.out or Path(folder), **smoke}
        return work(dataclasses.replace(config, **changed))

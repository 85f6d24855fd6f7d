"""Names of `experiments.common.study`, for the experiments that are not rewritten."""

from pathlib import Path

import jax

from experiments.common.study import Settings as Settings
from experiments.common.study import SettingsError as SettingsError
from experiments.common.study import start as start

RESULTS = Path(__file__).parents[1] / "results"


def use_cores(count: int) -> None:
    """Makes `count` CPU cores a device each; to be called before JAX is used."""
    jax.config.update("jax_num_cpu_devices", count)

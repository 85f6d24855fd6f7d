"""Eight CPU devices, before any operation; strict rank promotion everywhere."""

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _eight_devices():
    assert len(jax.devices()) == 8, "conftest.py must run before the first operation"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quickly():
    """Compiles in two thirds of the time, what then runs for longer."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

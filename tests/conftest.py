"""Eight CPU devices, before any operation; strict rank promotion everywhere."""

import ctypes
import gc
import math
import os
import pathlib
import sys

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
gc.set_threshold(100_000, 20, 20)  # JAX makes many objects that live on


def pytest_addoption(parser):
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile as users do, which takes three times as long",
    )


def pytest_configure(config):
    if config.getoption("--optimized"):
        return
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # later ones do not have the choice
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")


def pytest_ignore_collect(collection_path, config):
    """Leaves what tests experiments out unread, where -m leaves it out anyway."""
    if "not experiment" in config.option.markexpr:
        return collection_path.name == "of_experiments" or None
    return None


def pytest_collection_modifyitems(config, items):
    """Leaves `slow` tests out, unless -m names them."""
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def _eight_devices():
    assert len(jax.devices()) == 8, "conftest.py must run before the first operation"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def resident() -> float:
    """Bytes of memory that this process holds; infinite where it cannot be read."""
    if sys.platform != "linux":
        return math.inf
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def _no_more_programs_than_fit():
    """A worker keeps every program that it compiles, of a megabyte each."""
    yield
    if resident() > 1.6e9:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

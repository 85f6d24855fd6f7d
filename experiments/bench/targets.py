"""TPUs and GPUs to compile for, on a machine that has neither.

XLA compiles for devices that are only described: TPUs by the name of their topology,
GPUs by facts about the card, as its data sheet and CUDA's guide have them. Both
compilers come as Python packages, `pip install -e ".[accelerators]"` (Python 3.12 or
newer, Linux on x86), and run on a CPU. Nothing can be run on such devices.

    compiled = compile("h100", jax.jit(f).lower(x))  # x is sharded on devices("h100")
"""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

INSTALL = 'pip install -e ".[accelerators]", with Python 3.12 or newer'
TPU = {  # of each number of chips, the smallest topology; one is the first of four
    "v5e": {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
    "v5p": {1: "2x2x1", 4: "2x2x1", 16: "2x2x4", 256: "4x8x8", 1024: "8x8x16"},
    "v6e": {1: "2x2", 4: "2x2", 16: "4x4", 64: "8x8", 256: "16x16"},
}
GPU_TOPOLOGY = {1: "1x1x1", 8: "1x1x8", 16: "1x2x8", 128: "1x16x8"}  # eight a host


class Card(NamedTuple):
    """What the compiler asks about a GPU."""

    capability: int  # the major number; the minor is 0
    cores: int  # streaming multiprocessors
    lanes: int  # for float32, of each
    clock_ghz: float
    shared_kib: int  # of each core, for shared memory
    cache_mib: int  # L2
    memory_gib: int
    terabytes_per_second: float


GPU = {
    "a100": Card(8, 108, 64, 1.41, 164, 40, 80, 2.04),
    "h100": Card(9, 132, 128, 1.98, 228, 50, 80, 3.35),
    "b200": Card(10, 148, 128, 1.965, 228, 126, 180, 7.7),
}
TARGETS = (*TPU, *GPU)
OPTIONS: dict[str, Any] = {  # nothing can be run to tune; kernels stay in the program
    "xla_gpu_autotune_level": 0,
    "xla_gpu_enable_command_buffer": "",
}


def chips(target: str) -> list[int]:
    """How many chips of a target can be described."""
    return list(TPU.get(target, GPU_TOPOLOGY))


def devices(target: str, count: int = 1) -> list[Any]:
    """So many devices of a target, for a `jax.sharding.Mesh`.

    Raises:
        ValueError: an unknown target, or a number that it is not described for.
        ModuleNotFoundError: its compiler is not installed.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}: expected one of {TARGETS}")
    if count not in chips(target):
        raise ValueError(
            f"{target} with {count} chips: expected one of {chips(target)}"
        )
    if target in TPU:
        return _tpu(f"{target}:{TPU[target][count]}")[:count]
    return _gpu(target, GPU_TOPOLOGY[count])


def compile(target: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The optimized program of the target."""
    return lowered.compile(compiler_options=OPTIONS if target in GPU else None)


@functools.cache
def _tpu(topology: str) -> list[Any]:
    _require("libtpu")
    # Else the library asks the network, and waits, for the machine that it runs on.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return topologies.get_topology_desc(topology, "tpu").devices


@functools.cache
def _gpu(target: str, topology: str) -> list[Any]:
    _require("jax_plugins.xla_cuda13")
    from jax._src import xla_bridge

    # JAX resolves the name "gpu", of which it lowers for CUDA and ROCm alike, by asking
    # which devices there are, and fails without one. Here it is always CUDA.
    xla_bridge._discover_and_register_pjrt_plugins()
    canonical = xla_bridge.canonicalize_platform
    xla_bridge.canonicalize_platform = lambda name: (
        "cuda" if name in ("gpu", "cuda") else canonical(name)
    )
    return topologies.get_topology_desc(
        target,
        "cuda",
        target_config=_description(target),
        topology=topology,
    ).devices


def _description(target: str) -> str:
    """Of the card, as XLA's GpuTargetConfigProto."""
    card = GPU[target]
    extension = "ACCELERATED_FEATURES" if card.capability > 8 else "NONE"
    return f"""
    platform_name: "CUDA"
    device_description_str: "{target.upper()}"
    dnn_version_info {{ major: 9 minor: 12 }}
    gpu_device_info {{
      cuda_compute_capability {{
        major: {card.capability} feature_extension: {extension}
      }}
      core_count: {card.cores}
      fpus_per_core: {card.lanes}
      clock_rate_ghz: {card.clock_ghz}
      shared_memory_per_block: {48 * 1024}
      shared_memory_per_block_optin: {(card.shared_kib - 1) * 1024}
      shared_memory_per_core: {card.shared_kib * 1024}
      l2_cache_size: {card.cache_mib * 2**20}
      device_memory_size: {card.memory_gib * 2**30}
      memory_bandwidth: {int(card.terabytes_per_second * 1e12)}
      threads_per_warp: 32
      threads_per_block_limit: 1024
      threads_per_core_limit: 2048
      registers_per_block_limit: 65536
      registers_per_core_limit: 65536
      block_dim_limit_x: {2**31 - 1}
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
    }}
    """


def _require(module: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of its parent
        found = None
    if found is None:
        raise ModuleNotFoundError(f"{module} is not installed: {INSTALL}", name=module)

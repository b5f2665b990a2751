"""Devices that are not here, for which programs are compiled all the same.

A compiler needs a description of a device and not the device. The packages are those of
`make compiled`, which has them in an environment of their own.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# What a program's text depends on: multiprocessors, their memories, registers, rates.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Else the TPU's library asks the machine what it is, and runs in one process alone.
_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
NAMES = ("H100", "v5e", "v6e")


class Target(NamedTuple):
    """What a program is compiled for.

    Attributes:
      name: of `NAMES`.
      platform: what jax.default_backend says on such a device.
      devices: four of them, which are connected.
    """

    name: str
    platform: str
    devices: list[Any]


def use_cpu() -> None:
    """Starts the program anew where jax, at its import, would look for a GPU."""
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "JAX_PLATFORMS": "cpu"})


def target(name: str) -> Target:
    """Describes four devices of a kind.

    Raises:
      RuntimeError: if its compiler is not installed.
    """
    try:
        if name == "H100":
            options = {"target_config": _H100, "topology": "1x1x4"}
            found = topologies.get_topology_desc("1x1x4", "cuda", **options)
        else:
            os.environ.update(_TPU)
            found = topologies.get_topology_desc(f"{name}:2x2", "tpu")
    except Exception as error:  # jax has no one type for it
        raise RuntimeError(
            f"targets.target: the compiler for {name} must be installed. Got "
            f"{type(error).__name__}: {error}. Type: make compiled"
        ) from error
    return Target(name, "gpu" if name == "H100" else "tpu", list(found.devices))


@contextlib.contextmanager
def told(platform: str) -> Iterator[None]:
    """Has jax.default_backend say this, as on the device that programs are for.

    What was traced under another answer is forgotten, before and after.
    """
    before = jax.default_backend
    jax.clear_caches()
    jax.default_backend = lambda: platform
    try:
        yield
    finally:
        jax.default_backend = before
        jax.clear_caches()

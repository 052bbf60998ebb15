"""Targets from text: `v5e-64`, `v5p-128`, `h100x8`, `cpu:8`; which compiler there is for them; their devices."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from fbi.analysis.chips import CHIPS, Chip
from fbi.errors import InputError, unknown

COMPILERS = ("auto", "tpu", "cuda", "cpu")
FORMS = "v5e-64, v6e-256, v5p-128, v4-64, h100x8, cpu:8"
EXTRAS = {"tpu": ("libtpu", "tpu"), "cuda": ("the CUDA plugin of jax", "cuda")}
MOST_EMULATED = 1024


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips of one kind, wired as one slice (TPU) or as hosts of a cluster (GPU)."""

    name: str
    kind: str
    count: int
    shape: tuple[int, ...]
    """TPU: the torus; GPU: hosts, GPUs of a host; CPU: devices."""

    @property
    def chip(self) -> Chip:
        """What one of them is."""
        return CHIPS[self.kind]

    def link(self, size: int, stride: int = 1) -> tuple[str, float]:
        """The link that a group of `size` devices, `stride` apart in the mesh, meets on, and a device's bytes/s there.

        On a TPU a group spans as many axes of the torus as its size needs, each of which adds its links; an axis that
        does not close to a ring has half. On GPUs a group within a host has NVLink, another the network.
        """
        chip = self.chip
        if chip.platform == "cuda":
            inside = size * stride <= chip.per_host
            return ("NVLink", chip.link) if inside else ("network", chip.network)
        if chip.platform == "cpu":
            return "memory", chip.link
        bandwidth, left = 0.0, size
        for length in sorted(self.shape, reverse=True):
            if left > 1 and length > 1:
                bandwidth += chip.link * (1.0 if length % chip.wrap == 0 else 0.5)
                left = math.ceil(left / length)
        return "ICI", bandwidth or chip.link


def parse(text: str) -> Target:
    """The target of that name.

    The number of `v4-N` and `v5p-N` counts TensorCores, two to a chip, as Google's names do; of v5e and v6e it counts
    chips. `InputError` for an unknown kind, or a size that there is none of, naming those that there are.
    """
    found = re.fullmatch(r"(v\d+[ep]?)-(\d+)|([a-z]+\d+)x(\d+)|(cpu):(\d+)", text.strip())
    if not found:
        raise InputError(f"unknown target {text!r}; valid: {FORMS}")
    kind, number = next((found[i], int(found[i + 1])) for i in (1, 3, 5) if found[i])
    if kind not in CHIPS:
        raise unknown("target chip", kind, CHIPS)
    chip = CHIPS[kind]
    if chip.platform == "tpu":
        if number not in chip.shapes:
            raise InputError(f"there is no slice {text}; valid: {', '.join(f'{kind}-{n}' for n in chip.shapes)}")
        shape = tuple(map(int, chip.shapes[number].split("x")))
        return Target(text.strip(), kind, math.prod(shape), shape)
    most = MOST_EMULATED if kind == "cpu" else math.inf
    if not 1 <= number <= most:
        raise InputError(f"target {text!r}: give from 1 to {MOST_EMULATED} devices, as cpu:8")
    if kind == "cpu":
        return Target(text.strip(), kind, number, (number,))
    if number > chip.per_host and number % chip.per_host:
        raise InputError(f"target {text!r}: beyond one host give a multiple of its {chip.per_host} GPUs, as {kind}x16")
    hosts = max(1, number // chip.per_host)
    return Target(text.strip(), kind, number, (hosts, number // hosts))


def larger(target: Target) -> list[Target]:
    """Targets of the same kind with more chips, the smallest first."""
    chip = target.chip
    if chip.platform == "tpu":
        named = [parse(f"{target.kind}-{number}") for number in chip.shapes]
        return [other for other in named if other.count > target.count]
    if chip.platform == "cuda":
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256) if size > target.count]
        return [parse(f"{target.kind}x{size}") for size in sizes]
    return []


def installed(platform: str) -> bool:
    """Whether the compiler for `tpu`, `cuda` or `cpu` is installed; it needs no such device."""
    modules = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")}.get(platform)
    return modules is None or any(map(_there, modules))


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def compiler_for(target: Target, asked: str = "auto") -> str:
    """The compiler to use: `tpu`, `cuda`, or `cpu` (emulated devices, the same sharding, other memory).

    `auto` takes the target's own where it is installed. `InputError` where one is demanded that is not installed, or
    that does not compile for the target.
    """
    if asked not in COMPILERS:
        raise unknown("compiler", asked, COMPILERS)
    own = target.chip.platform
    if asked == "auto":
        return own if installed(own) else "cpu"
    if asked not in (own, "cpu"):
        raise InputError(f"compiler {asked} does not compile for {target.name}; use {own}, cpu or auto")
    if not installed(asked):
        name, extra = EXTRAS[asked]
        raise InputError(
            f"compiler {asked} needs {name}, which is not installed; pip install 'fbi[{extra}]' (no {asked.upper()} "
            "device is needed), or use --compiler cpu, which emulates the devices"
        )
    return asked


# XLA's description of a target GPU: what the compiler would ask the driver for. From the H100 SXM's device properties.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


@functools.cache
def devices(target: Target, compiler: str) -> Sequence[Any]:
    """The devices of a target as the compiler sees them: described, or emulated on this CPU; none of them is used.

    `InputError` where JAX runs already with fewer emulated devices, or the plugin refuses.
    """
    import jax

    if compiler == "cpu":
        return _emulated(target.count)
    from jax.experimental import topologies

    _prefer_cpu()
    try:
        if compiler == "cuda":
            hosts, each = target.shape
            described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology=f"1x{hosts}x{each}")
        else:
            # Without these libtpu waits for the metadata of a TPU machine, and refuses a second process.
            os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
            topology = f"{target.kind}:{'x'.join(map(str, target.shape))}"
            described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"the {compiler} compiler does not know {target.name}: {first}; try --compiler cpu") from error
    return described.devices


def _prefer_cpu() -> None:
    """This process computes nothing: where JAX has not started, it shall take no accelerator."""
    import jax
    from jax._src import xla_bridge

    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")


def _emulated(count: int) -> Sequence[Any]:
    import jax
    from jax._src import xla_bridge

    _prefer_cpu()
    if not xla_bridge.backends_are_initialized():
        jax.config.update("jax_num_cpu_devices", count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise InputError(
            f"{count} emulated devices are needed and JAX runs here with {len(there)}; set JAX_NUM_CPU_DEVICES={count}"
        )
    return there[:count]

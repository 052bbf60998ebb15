"""What accelerators are, as data: peak rate, memory, bandwidths, how they are wired. Imports no jax.

Sources: Google Cloud TPU documentation, pages v4, v5e, v5p, v6e (rates, memory, chips per host, slice shapes); Austin
et al., How to Scale Your Model (2025), table of TPU specs (bandwidth of links); NVIDIA H100 data sheet, SXM (rate
without sparsity, memory, NVLink 900 GB/s in both directions) and DGX H100 (a 400 Gb/s network port for each GPU).
The share of memory that a program may use: 15.75 of 16 GiB is what the TPU compiler allows on v5e (its own message);
JAX takes 0.75 of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

import dataclasses
import math
from typing import Literal

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator, as JAX counts devices."""

    platform: Literal["tpu", "cuda", "cpu"]
    flops: float
    """Dense bfloat16 operations per second."""
    memory: float
    """Bytes."""
    usable: float
    """The share of `memory` that a program may use."""
    bandwidth: float
    """Bytes per second to and from its memory."""
    link: float
    """Bytes per second that it sends over all links of one axis of the torus (TPU, both ways round), or NVLink."""
    network: float
    """Bytes per second that it sends to other hosts, beyond the reach of `link`; 0: there are none."""
    per_host: int
    shapes: dict[int, str]
    """TPU: number in the name of a slice -> topology; empty: any number up to a host, then whole hosts."""
    wrap: int = 0
    """TPU: the length of an axis from whose multiples on it closes to a ring; a shorter one has half the `link`."""

    @property
    def limit(self) -> float:
        """Bytes that a program may use."""
        return self.memory * self.usable


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBIC = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8",
          1024: "8x8x8", 2048: "8x8x16"}  # fmt: skip

CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 32 * GIB, 0.984, 1.23e12, 9e10, 0.0, 4, _CUBIC, 4),
    "v5e": Chip("tpu", 197e12, 16 * GIB, 0.984, 8.1e11, 9e10, 0.0, 4, _FLAT, 16),
    "v5p": Chip("tpu", 459e12, 95 * GIB, 0.984, 2.77e12, 1.8e11, 0.0, 4, _CUBIC, 4),
    "v6e": Chip("tpu", 918e12, 32 * GIB, 0.984, 1.64e12, 1.8e11, 0.0, 4, _FLAT, 16),
    "h100": Chip("cuda", 989e12, 80e9, 0.75, 3.35e12, 4.5e11, 5e10, 8, {}),
    # No measurement: a host whose emulated devices share its memory.
    "cpu": Chip("cpu", 5e11, math.inf, 1.0, 4e10, 4e10, 0.0, 1 << 30, {}),
}

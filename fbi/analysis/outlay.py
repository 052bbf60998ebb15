"""What a planned run takes before it is started: operations, memory of a device, hours; estimated from shapes."""

import dataclasses
import math
from pathlib import Path

from fbi.analysis.cost import cost
from fbi.errors import InputError, unknown
from fbi.model.config import PRESETS, ModelConfig, count_parameters
from fbi.policy import Policy
from fbi.train.run import Run

PASSES = 3  # forward, and two products of the same size for each in the backward pass


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator: dense bfloat16 operations per second and bytes of memory, by its maker's data sheet."""

    flops: float
    memory: float


# Google Cloud TPU documentation (v5e, v5p, v6e); NVIDIA H100 SXM data sheet, without sparsity
CHIPS = {
    "v5e": Chip(197e12, 16e9),
    "v5p": Chip(459e12, 95e9),
    "v6e": Chip(918e12, 32e9),
    "h100": Chip(989e12, 80e9),
}


@dataclasses.dataclass(frozen=True)
class Outlay:
    """A run on a mesh. Bit-widths save nothing here: training computes in floating point."""

    parameters: int
    tokens: float
    flops: float
    """Multiplications and additions of the whole run, the teacher's forward passes included; attention in full."""
    state: float
    """Bytes per device: parameters, gradients, optimizer, split over all devices; the frozen teacher as well."""
    activations: float
    """Bytes per device: one layer at a time (remat) for its sequences, and their logits."""
    hours: float
    """Of the whole mesh, at the given utilisation."""

    @property
    def memory(self) -> float:
        """Bytes per device."""
        return self.state + self.activations


def outlay(run: Run, mesh: dict[str, int], chip: str, utilisation: float, teacher: ModelConfig | None = None) -> Outlay:
    """The estimate for `run` on `mesh` (axes and sizes: data, model) of chips, at a share of their peak.

    `teacher` is the teacher's shape where the run has one; by default the preset that its directory is named after.
    `InputError` for an unknown chip, a utilisation outside (0, 1], or a batch that the data axis does not divide.
    """
    if chip not in CHIPS:
        raise unknown("chip", chip, CHIPS)
    if not 0 < utilisation <= 1:
        raise InputError(f"utilisation is {utilisation}; it is a share of the peak, above 0 and at most 1, such as 0.4")
    devices, rows = math.prod(mesh.values()), mesh.get("data", 1)
    if run.data.batch % rows:
        raise InputError(f"data.batch={run.data.batch} is not a multiple of the data axis of {rows}; use another mesh")
    found = cost(run.model, Policy.parse(run.policy), run.data.window, latent=run.optimizer.latent, remat=True)
    sequences, operations = run.data.batch * run.steps, 2 * PASSES * found.macs
    memory = found.memory
    state = memory.parameters + memory.gradients + memory.optimizer
    if run.teacher:
        shape = teacher or PRESETS.get(Path(run.teacher).name.removeprefix("@"), run.model)
        operations += 2 * cost(shape, Policy.parse("fp"), run.data.window).macs
        state += 2 * count_parameters(shape).total  # bfloat16
    flops = float(sequences * operations)
    return Outlay(
        parameters=count_parameters(run.model).total,
        tokens=float(sequences * run.data.window),
        flops=flops,
        state=state / devices,
        activations=(memory.activations + memory.logits) * run.data.batch / rows / mesh.get("model", 1),
        hours=flops / (CHIPS[chip].flops * utilisation * devices) / 3600,
    )

"""What planned runs would take: operations, memory of a device, hours; estimated from shapes alone."""

import dataclasses
import math
import sys
from pathlib import Path

from fbi.analysis.chips import CHIPS
from fbi.analysis.cost import cost
from fbi.errors import InputError, unknown
from fbi.launch.plan import REFERENCE, load_experiment, plan
from fbi.model.config import PRESETS, ModelConfig, count_parameters
from fbi.policy import Policy
from fbi.report.table import Cell, Column, Table
from fbi.train.mesh import parse
from fbi.train.run import Run

PASSES = 3  # forward, and two products of the same size for each in the backward pass


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


COLUMNS = (
    Column("run"), Column("parameters (M)", ",.1f"), Column("tokens (B)", ",.3g"), Column("batch (tokens)", ",d"),
    Column("steps", ",d"), Column("peak rate", ".3g"), Column("schedule"), Column("FLOPs", ".2e"),
    Column("GB a device", ",.2f"), Column("hours", ",.3g"), Column("chip-hours", ",.4g"),
)  # fmt: skip


def table(path: Path, scale: str, mesh: str, chip: str, utilisation: float) -> Table:
    """A row a run of an experiment at a scale, seeds left out; errors as of `outlay` and `plan`."""
    sizes = parse(mesh.strip() or "data=1", sys.maxsize)
    runs = {run.name: run for run in plan(path, scale=scale).runs.values()}
    shapes = {name: run.model for name, run in runs.items()}
    rows = [_row(run, sizes, chip, utilisation, shapes) for run in runs.values() if run.seed == 0]
    note = (
        f"estimated for {mesh} of {chip} at {utilisation:.0%} of the peak: forward and backward pass, attention in "
        "full, remat, everything split over the devices; communication is left out"
    )
    return Table(COLUMNS, rows, f"{(load_experiment(path).__doc__ or '').splitlines()[0]}", [note])


def _row(run: Run, sizes: dict[str, int], chip: str, utilisation: float, shapes: dict) -> list[Cell]:
    named = Path(run.teacher).name.rpartition("-")[0] or run.teacher.removeprefix(REFERENCE)
    found = outlay(run, sizes, chip, utilisation, shapes.get(named))
    o, share = run.optimizer, run.optimizer.warmup
    warm = f"{share:.0%}" if share < 1 else f"{share:,.0f} steps"
    return [
        run.name, found.parameters / 1e6, found.tokens / 1e9, run.data.batch * run.data.window, run.steps, o.lr,
        f"{o.schedule}, warm-up {warm}", found.flops, found.memory / 1e9, found.hours,
        found.hours * math.prod(sizes.values()),
    ]  # fmt: skip

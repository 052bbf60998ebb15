"""What the runs of an experiment would take, as a table."""

import math
from pathlib import Path

from fbi.analysis.outlay import outlay
from fbi.launch.plan import REFERENCE, load_experiment, plan
from fbi.report.table import Cell, Column, Table
from fbi.train.mesh import parse
from fbi.train.run import Run

COLUMNS = (
    Column("run"), Column("parameters (M)", ",.1f"), Column("tokens (B)", ",.3g"), Column("batch (tokens)", ",d"),
    Column("steps", ",d"), Column("peak rate", ".3g"), Column("schedule"), Column("FLOPs", ".2e"),
    Column("GB a device", ",.2f"), Column("hours", ",.3g"), Column("chip-hours", ",.4g"),
)  # fmt: skip


def table(path: Path, scale: str, mesh: str, chip: str, utilisation: float) -> Table:
    """A row a run of an experiment at a scale, seeds left out; errors as of `outlay` and `plan`."""
    sizes = parse(mesh, math.prod(int(part.partition("=")[2] or 1) for part in mesh.split(",")))
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

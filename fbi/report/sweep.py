"""The tables of a sweep: what was asked, what was found beside what was published, which claims hold."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fbi.errors import InputError
from fbi.report.archive import record_of
from fbi.report.measure import Found, interval, judged, measure, paired, sample, select, unfinished
from fbi.report.runs import RunRecord, find_runs, read_run
from fbi.report.spec import Planned, Sweep, TableSpec, find_sweeps, read_sweep
from fbi.report.table import Cell, Column, Table

PACKED = "runs"  # folder of packed runs beside a sweep's file


@dataclasses.dataclass(frozen=True)
class Results:
    """A sweep and those of its runs that could be read; `warnings` says what could not."""

    sweep: Sweep
    root: Path
    found: Sequence[Found]
    warnings: Sequence[str]


def read(place: Path) -> list[Results]:
    """The sweeps that a path names: a sweep's file, a folder of them, or any folder of run directories.

    Runs are looked for beside the sweep's file, as directories or packed (`runs/DIRECTORY.json`). `InputError` where
    there is nothing; a run that cannot be read is left out with a warning.
    """
    paths = find_sweeps(place)
    if paths:
        return [_results(read_sweep(path), path.parent) for path in paths]
    if not place.exists():
        raise InputError(f"{place} does not exist; name a folder of runs, or a NAME.sweep.json")
    folders = find_runs(place) if place.is_dir() else []
    if not folders:
        raise InputError(f"{place} holds no runs; `fbi sweep` and `fbi train` make them")
    runs, warnings = [], []
    for folder in folders:
        try:
            runs.append(Found(str(folder.relative_to(place)), read_run(folder)))
        except InputError as error:
            warnings.append(str(error))
    planned = [Planned(run.name, run.name) for run in runs]
    sweep = Sweep(place.resolve().name, f"Runs in {place}", "", "", planned, {})
    return [Results(sweep, place, runs, [*warnings, *(w for run in runs for w in run.record.warnings)])]


def _results(sweep: Sweep, root: Path) -> Results:
    found, warnings = [], []
    for planned in sweep.runs:
        try:
            record = _record(root, planned.directory)
        except InputError as error:
            warnings.append(str(error))
            continue
        if record is not None:
            found.append(Found(planned.name, record))
            warnings += record.warnings
    return Results(sweep, root, found, warnings)


def _record(root: Path, directory: str) -> RunRecord | None:
    packed = root / PACKED / f"{directory}.json"
    if (root / directory / "config.json").exists():
        record = read_run(root / directory)
        return record_of(packed) if record.done is None and packed.exists() else record
    return record_of(packed) if packed.exists() else None


def tables(results: Results) -> list[Table]:
    """Every table that the experiment asks for and that of its claims; of a folder of runs, one of all of them."""
    sweep, found = results.sweep, results.found
    made = [spec_table(spec, found) for spec in sweep.tables] or [overview(results)]
    if sweep.claims:
        made.append(claims_table(results))
    missing = unfinished(sweep, found)
    if missing:
        some = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        made[-1] = dataclasses.replace(made[-1], notes=[*made[-1].notes, f"not finished: {some}"])
    return made


def spec_table(spec: TableSpec, found: Sequence[Found]) -> Table:
    """A table as an experiment asks for it; a row that has no finished run yet shows `-`."""
    groups = {row.label: select(found, row.runs) for row in spec.rows}
    base = sample(groups[spec.baseline], spec.metric) if spec.baseline else None
    columns = [Column(""), Column(f"here, {spec.unit}")]
    columns += [Column(f"over {spec.baseline}")] if base else []
    columns += [Column(spec.published), Column("source"), Column("runs")]
    rows = []
    for row in spec.rows:
        values = sample(groups[row.label], spec.metric)
        over = [paired(base, values).text("+.3f")] if base else []
        published = None if row.published is None else f"{row.published:g}"
        directories = ", ".join(run.record.directory.name for run in groups[row.label])
        rows.append([row.label, values.text(), *over, published, row.source or None, directories or None])
    notes = ["mean ± standard deviation over seeds (number of seeds); differences are paired by seed"]
    return Table(columns, rows, spec.title, [*notes, *([spec.note] if spec.note else [])])


def claims_table(results: Results) -> Table:
    """Each claim with its source, what was measured here, and the verdict."""
    rows: list[list[Cell]] = []
    for claim in results.sweep.claims:
        differences, verdict = judged(claim, results.found)
        bounds = interval(differences)
        between = "-" if bounds is None else f"{bounds[0]:+.3f} ... {bounds[1]:+.3f}"
        here = differences.text("+.3f")
        rows.append([claim.text, claim.source, claim.published or None, here, between, verdict])
    columns = [Column(n) for n in ("claim", "source", "published", "difference here", "95% interval", "verdict")]
    note = "a verdict needs three seeds or more; differences are paired by seed, high - low as the claim has it"
    return Table(columns, rows, f"{results.sweep.title}: claims", [note])


def overview(results: Results) -> Table:
    """A row a configuration: final losses and goodput over its seeds, size, directories."""
    groups: dict[str, list[Found]] = {}
    for run in results.found:
        groups.setdefault(run.group, []).append(run)
    rows = []
    for name, runs in groups.items():
        losses = [sample(runs, metric).text(form) for metric, form in
                  (("loss", ".4f"), ("perplexity", ".2f"), ("bits_per_byte", ".4f"), ("goodput", ".3f"))]  # fmt: skip
        bits = measure(runs[0].record, "summary.stored_bits_per_weight")
        policy = str(runs[0].record.config.get("policy", "-"))
        rows.append([name, policy, bits, *losses, ", ".join(run.record.directory.name for run in runs)])
    columns = [Column("runs"), Column("policy"), Column("stored bits/weight", ".3f"), Column("nats/token"),
               Column("perplexity"), Column("bits/byte"), Column("goodput"), Column("directories")]  # fmt: skip
    notes = ["mean ± standard deviation over seeds (number of seeds); goodput is useful step time / wall time"]
    return Table(columns, rows, results.sweep.title, notes)

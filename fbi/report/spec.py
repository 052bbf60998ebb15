"""What an experiment wants to know, as data: tables, claims, figures over named runs. Stored beside the runs as JSON.

Runs whose names differ only in a last `-sN` are seeds of one configuration; runs are chosen by globs over the names of
configurations (`fbi-ad`, `quest-w*`), or several joined by `|`.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from fbi.errors import InputError
from fbi.files import read_json

FORMAT = 1
SUFFIX = ".sweep.json"
Kind = TypeVar("Kind")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: the runs that it sums up, and what was published for it."""

    label: str
    runs: str
    """The configuration: a glob over names without seeds."""
    published: float | None = None
    """The published value, in the unit of the paper; `source` says where."""
    source: str = ""


@dataclasses.dataclass(frozen=True)
class TableSpec:
    """A table: one measure over several groups of runs."""

    title: str
    rows: Sequence[Row]
    metric: str = "loss"
    """See `fbi.report.measure.measure`."""
    unit: str = "nats/token"
    published: str = "published"
    """Heading of the published values: what they are measured in where that is another unit."""
    baseline: str = ""
    """Label of a row; the others show their difference to it, paired by seed."""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published statement about two groups of runs, compared seed by seed."""

    text: str
    source: str
    low: str
    """The configuration whose measure should be the lower one."""
    high: str
    """The one whose measure should be the higher one."""
    metric: str = "loss"
    kind: Literal["less", "equal"] = "less"
    """less: low < high; equal: they differ by at most `margin`."""
    margin: float = 0.0
    published: str = ""
    """The published size of the effect, as text."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A series of a figure: a glob over configurations, and its name in the legend."""

    label: str
    runs: str


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture: curves of training, one measure against another, a point a configuration, or layers."""

    name: str
    title: str
    lines: Sequence[Line]
    kind: Literal["curves", "line", "scatter", "layers"] = "line"
    """line joins the points of a series; scatter writes the name of the run beside each; layers shows `y`, a KIND.FIELD
    of `metrics.jsonl`, at every layer at the end."""
    x: str = "summary.stored_bits_per_weight"
    y: str = "loss"
    x_label: str = ""
    y_label: str = "validation loss (nats/token)"
    log_x: bool = False


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run of a sweep: its name, its directory beside the sweep's file, and the directories it needs finished."""

    name: str
    directory: str
    needs: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A planned experiment, as `NAME.sweep.json` holds it."""

    name: str
    title: str
    text: str
    """The experiment's docstring: question, command, expected result, cost."""
    command: str
    runs: Sequence[Planned]
    execution: Mapping[str, Any]
    """How the runs are executed: flags of `fbi train`."""
    tables: Sequence[TableSpec] = ()
    claims: Sequence[Claim] = ()
    figures: Sequence[Figure] = ()


_PARTS: Sequence[Any] = (Row, TableSpec, Claim, Line, Figure, Planned)


def to_json(sweep: Sweep) -> dict[str, Any]:
    """A sweep as plain data."""
    return {"format": FORMAT, **dataclasses.asdict(sweep)}


def read_sweep(path: Path) -> Sweep:
    """The sweep in a file; an `InputError` where it is none."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path} is not the file of a sweep of format {FORMAT}, but {found!r}; plan the sweep again")
    try:
        return _from(Sweep, {name: value for name, value in data.items() if name != "format"})
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}; `fbi sweep` writes it anew") from error


def runs_of(place: Path) -> Path:
    """The folder that an experiment's file gets its runs in, `runs/NAME`; any other place is itself."""
    return Path("runs") / place.stem if place.suffix == ".py" else place


def find_sweeps(place: Path) -> list[Path]:
    """The files of sweeps that `place` names: itself, or those in a folder, sorted."""
    if place.is_dir():
        return sorted(place.glob(f"*{SUFFIX}"))
    return [place] if place.name.endswith(SUFFIX) and place.exists() else []


def _from(kind: type[Kind], data: Mapping[str, Any]) -> Kind:
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, value in data.items():
        inner: Any = next(iter(typing.get_args(hints.get(name))), None)
        fields[name] = tuple(_from(inner, part) for part in value) if inner in _PARTS else value
    return kind(**fields)

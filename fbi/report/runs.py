"""A run directory as a value."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fbi.errors import InputError
from fbi.files import read_json

FORMAT = 1
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run directory says: `rows` are the lines of `metrics.jsonl` by kind, `done` is None while it runs."""

    directory: Path
    config: Row
    env: Row
    rows: Mapping[str, Sequence[Row]]
    done: Row | None
    summary: Row
    warnings: Sequence[str] = ()
    """Lines of `metrics.jsonl` that were left out, and why."""

    @property
    def name(self) -> str:
        """Its name, or its directory's."""
        return str(self.config.get("name") or self.directory.resolve().name)

    @property
    def steps(self) -> int:
        """The steps it is to take; 0 where its config does not say."""
        return int(self.config.get("steps") or 0)

    @property
    def step(self) -> int:
        """The last step that a row speaks of."""
        return max((int(row.get("step", 0)) for rows in self.rows.values() for row in rows), default=0)

    @property
    def train(self) -> Sequence[Row]:
        """Rows of training steps."""
        return self.rows.get("train", ())

    def evaluations(self, split: str = "validation") -> list[Row]:
        """Rows of evaluations on a split."""
        return [row for row in self.rows.get("eval", ()) if row.get("split", "validation") == split]

    @property
    def goodput(self) -> float | None:
        """Useful step time / wall time of all attempts, see `goodput`; None where the record does not say."""
        return goodput(row for rows in self.rows.values() for row in rows)

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per token of the unigram model; None where the summary does not say."""
        return number(self.summary.get("unigram_entropy"))


def number(value: object) -> float | None:
    """`value` as a finite number; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def goodput(rows: Iterable[Row]) -> float | None:
    """Useful step time / wall time, 0 to 1, as of the last of these rows that has both; None where none has.

    `time_useful_s`: seconds of the steps that the run's present state is made of. `time_wall_s`: seconds of all
    attempts, with start-up, compiling, evaluation, waiting for checkpoints, and steps that were done again.
    """
    found = [(wall, useful) for row in rows if (wall := number(row.get("time_wall_s")))
             and (useful := number(row.get("time_useful_s"))) is not None]  # fmt: skip
    return max(found)[1] / max(found)[0] if found else None


def points(rows: Sequence[Row], field: str) -> tuple[list[int], list[float]]:
    """Steps and values of `field`, for the rows that have it as a finite number."""
    found = [
        (int(row["step"]), value) for row in rows if "step" in row and (value := number(row.get(field))) is not None
    ]
    return [step for step, _ in found], [value for _, value in found]


def read_run(directory: str | os.PathLike[str]) -> RunRecord:
    """The run in `directory`; an `InputError` where there is none or a file of it is broken.

    A damaged line of `metrics.jsonl` is left out, and named in `warnings`.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a directory; name a run directory, which holds config.json")
    if not (folder / "config.json").exists():
        inside = [path.name for path in find_runs(folder)][:3]
        hint = f"; name one of the runs inside it, such as {', '.join(inside)}" if inside else ""
        raise InputError(f"{folder} holds no run: it has no config.json{hint}")
    config = _mapping(folder / "config.json")
    if not isinstance(config.get("run"), dict):
        raise InputError(f"{folder / 'config.json'} is not the config of a run: it has no 'run'")
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / 'config.json'} has format {config.get('format')!r}, this version reads {FORMAT}; "
                         "use the version that wrote it")  # fmt: skip
    env, done, summary = (_mapping(path) if (path := folder / f"{name}.json").exists() else None
                          for name in ("env", "done", "summary"))  # fmt: skip
    rows, warnings = _metrics(folder / "metrics.jsonl")
    return RunRecord(folder, config["run"], env or {}, rows, done, summary or {}, warnings)


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of metrics under their kinds, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["kind"], []).append(row)
    return found


def find_runs(folder: str | os.PathLike[str]) -> list[Path]:
    """Run directories at or below `folder`, sorted; none within a run, none in hidden folders."""
    top = Path(folder)
    if not top.is_dir():
        raise InputError(f"{top} is not a directory; name the folder that holds the runs")
    found = []
    for path, folders, files in os.walk(top):
        if "config.json" in files and _is_run(Path(path)):
            found.append(Path(path))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return sorted(found)


def _is_run(folder: Path) -> bool:
    """Whether its config.json is a run's, or too broken to tell: reading that one says what is wrong."""
    try:
        config = read_json(folder / "config.json")
    except InputError:
        return True
    return isinstance(config, dict) and "run" in config


def _mapping(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object; is it the right file?")
    return value


def _metrics(path: Path) -> tuple[dict[str, list[Row]], list[str]]:
    """The rows by kind, and what was left out. A torn last line is no fault: it may still be being written."""
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    rows: list[Row] = []
    warnings = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            rows.append(row | {"kind": str(row["kind"])})
        except (ValueError, TypeError, KeyError):
            if index < len(lines) - 1:
                warnings.append(f"{path}: line {index + 1} is no row of metrics, left out")
    return by_kind(rows), warnings

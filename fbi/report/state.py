"""How far a run of a sweep is, from its files alone."""

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fbi.errors import InputError
from fbi.files import read_json
from fbi.report.runs import Row, goodput, number

Kind = Literal["queued", "waiting", "running", "stopped", "done", "failed"]
CLAIM, RUNNING, FAILED, STOP, LOG = ".claim", "running.json", "failed.json", "stop", "log.txt"
HEARTBEAT = 10.0  # seconds between signs of life of a running job
SILENT = 90.0  # seconds without one after which a job on another host counts as gone
_TAIL = 64 * 1024  # bytes of metrics.jsonl that are read for the last rows


@dataclasses.dataclass(frozen=True)
class State:
    """A run of a sweep at this moment."""

    kind: Kind
    step: int = 0
    steps: int = 0
    loss: float | None = None
    """Nats per token: the last training loss, of a finished run the validation loss."""
    rate: float | None = None
    """Tokens per second."""
    pace: float | None = None
    """Seconds a step, evaluations and checkpoints left out."""
    note: str = ""
    goodput: float | None = None
    """Useful step time / wall time, see `fbi.report.runs.goodput`."""

    @property
    def left(self) -> float | None:
        """Seconds to go, of a running one."""
        return None if self.pace is None or self.kind != "running" else (self.steps - self.step) * self.pace


def state_of(directory: Path, needs: tuple[Path, ...] = ()) -> State:
    """The state of the run in `directory`, which waits for the runs in `needs`."""
    last = _last_rows(directory / "metrics.jsonl")
    return dataclasses.replace(_state_of(directory, needs, last), goodput=goodput(last))


def _state_of(directory: Path, needs: tuple[Path, ...], found: Sequence[Row]) -> State:
    steps = _steps(directory)
    done = _quiet(directory / "done.json")
    rows = [row for row in found if row.get("kind") == "train"]
    rate, pace = _median(rows, "time_tokens_per_s"), _median(rows, "time_step_s")
    if done is not None:
        return State("done", int(done.get("steps", steps)), steps, number(done.get("loss")), rate, pace)
    last = rows[-1] if rows else {}
    step, loss = int(last.get("step", 0)), number(last.get("loss"))
    if (failed := _quiet(directory / FAILED)) is not None:
        return State("failed", step, steps, loss, rate, note=str(failed.get("what", "")))
    if alive(directory):
        host = str((_quiet(directory / RUNNING) or {}).get("host", ""))
        return State("running", step, steps, loss, rate, pace, note=host)
    if (directory / STOP).exists():
        return State("stopped", step, steps, loss, rate, note="on request; start the sweep again to go on")
    missing = [need for need in needs if not (need / "done.json").exists()]
    if missing:
        failed_need = next((need for need in missing if (need / FAILED).exists()), None)
        note = f"{failed_need.name} failed" if failed_need else f"for {missing[0].name}"
        return State("waiting", step, steps, loss, rate, note=note)
    return State("queued", step, steps, loss, rate)


def _median(rows: Sequence[Row], field: str) -> float | None:
    values = [value for row in rows if (value := number(row.get(field)))]
    return statistics.median(values) if values else None


def alive(directory: Path) -> bool:
    """Whether some process works on the run: on this host by the lock that it holds, elsewhere by its heartbeat."""
    running = _quiet(directory / RUNNING)
    if running is not None and running.get("host") not in (None, platform.node()):
        with contextlib.suppress(OSError):
            return time.time() - (directory / RUNNING).stat().st_mtime < SILENT
        return False
    try:
        with (directory / CLAIM).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a text file, without terminal control characters; empty where there is none."""
    data = _end(path).decode("utf-8", "replace")
    clean = "".join(c for c in data if c.isprintable() or c in "\n\t")
    return "\n".join(clean.splitlines()[-lines:])


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows near the end of metrics.jsonl."""
    rows = []
    for line in _end(path).split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _end(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read()
    except OSError:
        return b""


def _steps(directory: Path) -> int:
    run = (_quiet(directory / "config.json") or {}).get("run")
    return int(run.get("steps", 0)) if isinstance(run, dict) else 0


def _quiet(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none to read (yet)."""
    try:
        value = read_json(path)
    except InputError:
        return None
    return value if isinstance(value, dict) else None

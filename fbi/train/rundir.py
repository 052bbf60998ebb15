"""A run directory: config.json, env.json, metrics.jsonl, checkpoints/, tokenizer.json, summary.json, done.json."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from fbi.errors import InputError
from fbi.files import claimed, make_directory, read_json, write_json, write_text
from fbi.train.run import FORMAT, Execution, Run, differences, from_json, to_json
from fbi.train.sinks import Sink, numbers

PACKAGES = ("fbi", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds a run directory for this process. The system drops the lock with the process, however that ends.

    Where no run is begun in the meantime, nothing is left behind.
    """
    made = not directory.exists()
    make_directory(directory)
    with claimed(directory / ".lock") as lock:
        if lock is None:
            raise InputError(f"{directory} is in use by another process; wait for it or stop it")
        try:
            yield
        finally:
            if not (directory / "config.json").exists():
                (directory / ".lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    if made:
                        directory.rmdir()


def read_run(directory: Path) -> Run:
    """The Run that a directory was begun with; an `InputError` where it holds none, or one of another format."""
    path = directory / "config.json"
    if not path.exists():
        raise InputError(f"{directory} is not a run directory: it has no config.json; `fbi train` makes one")
    return parse_config(read_json(path), str(path))


def parse_config(data: Any, where: str) -> Run:
    """A Run from the content of a config file: `{"format": 1, "run": {...}}`."""
    if not isinstance(data, dict) or "run" not in data:
        raise InputError(f"{where} is not a run config: it needs the fields 'format' and 'run'")
    if data.get("format") != FORMAT:
        raise InputError(
            f"{where} has format {data.get('format')!r}, this version of fbi reads format {FORMAT}; "
            "start a new run directory, or use the version of fbi that its env.json names"
        )
    try:
        return from_json(Run, data["run"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def located(run: Run, directory: Path) -> Run:
    """The run with a teacher or start given as `../NAME`, beside its own directory, as a path from here."""
    here = {name: getattr(run, name) for name in ("teacher", "start")}
    there = {name: str(directory.absolute().parent / text[3:]) for name, text in here.items() if text.startswith("../")}
    return dataclasses.replace(run, **there)


def begin(directory: Path, run: Run) -> bool:
    """Writes config.json and returns True, or checks that it is this Run's: another is refused, naming what differs."""
    path = directory / "config.json"
    if path.exists():
        changed = differences(to_json(read_run(directory)), to_json(run))
        if changed:
            raise InputError(
                f"{directory} was begun with another run; it differs in {'; '.join(changed)}. "
                "Use another directory, or give the same settings"
            )
        return False
    leftovers = [p.name for p in directory.iterdir() if p.name != ".lock"]
    if leftovers:
        raise InputError(
            f"{directory} is neither empty nor a run directory: it holds {', '.join(sorted(leftovers)[:5])}"
        )
    write_json(path, {"format": FORMAT, "run": to_json(run)})
    return True


def take_back(directory: Path) -> None:
    """Undoes `begin` where the run took no step, so that the corrected command may use the directory."""
    checkpoints = directory / "checkpoints"
    if (directory / "metrics.jsonl").exists() or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        return
    for name in ("tokenizer.json", "summary.json", "env.json", "teacher.json", "config.json"):
        (directory / name).unlink(missing_ok=True)
    if checkpoints.is_dir():
        checkpoints.rmdir()


def environment(execution: Execution) -> dict[str, Any]:
    """What surrounds the numbers: command, versions, commit, devices, how the run is executed."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "argv": sys.argv,
        "execution": to_json(execution),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
    }


class Metrics:
    """metrics.jsonl, the record of a run: one JSON object a line, appended."""

    def __init__(self, path: Path, sinks: Sequence[Sink] = ()):
        self.path, self.sinks = path, sinks

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row and flushes it; an `InputError` where the disk refuses."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; free some space and start again") from error
        for sink in self.sinks:
            sink.add(row["step"], numbers(row))

    def rewind(self, step: int, keep_events: bool = False) -> None:
        """Cuts what lies past a restored step: later rows, a torn last line, and the events since that checkpoint.

        `keep_events` keeps these, as history, where the process itself goes back.
        """
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        rows = [self._row(line, place) for place, line in enumerate(lines, 1) if line.endswith(b"\n")]
        kept = [
            row
            for row in rows
            if row["step"] < step or (keep_events if row["kind"] == "event" else row["step"] == step)
        ]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def _row(self, line: bytes, place: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            return row | {"kind": row["kind"], "step": int(row["step"])}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{self.path} is damaged: line {place} is no row of metrics; restore the file or cut that line"
            ) from error


class NoMetrics(Metrics):
    """The record as the processes have it that do not keep it."""

    def append(self, row: dict[str, Any]) -> None:
        """Does nothing."""

    def rewind(self, step: int, keep_events: bool = False) -> None:
        """Does nothing."""

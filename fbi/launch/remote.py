"""What the launchers share that hand runs to other machines."""

import contextlib
import dataclasses
import importlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fbi.errors import InputError
from fbi.files import write_json, write_text
from fbi.launch.job import Job, Outcome, execute
from fbi.report.state import FAILED, LOG, STOP, alive, tail


def optional(module: str, extra: str) -> Any:
    """An optional package, imported; an `InputError` with the remedy where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(f"{module} is not installed, which this launcher needs: pip install 'fbi[{extra}]'") from error


def pairs(text: str, option: str) -> dict[str, str]:
    """`a=1;b=2` as a mapping; a name alone has an empty value."""
    found = {}
    for part in filter(None, text.split(";")):
        name, _, value = part.partition("=")
        if not name.strip():
            raise InputError(f"{option} is {text!r}; it must be NAME=VALUE, several joined by ;")
        found[name.strip()] = value.strip()
    return found


def carry_out(
    job: Job,
    folder: str,
    variables: Mapping[str, str],
    beside: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008
) -> Outcome:
    """A job, in the same working directory and with the same settings as on the machine that launched it.

    `busy` where a process still has it: one that lost its node saves its checkpoint first, or is silent for a while.
    `beside` is entered around the process.
    """
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return "busy" if alive(job.directory) else execute(job, environment=variables, beside=beside)


def levels(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs in groups, each needing only what earlier groups or none of these jobs carry out."""
    left, found = list(jobs), []
    while left:
        unfinished = {job.directory for job in left}
        group = [job for job in left if not unfinished.intersection(job.needs)]
        if not group:
            raise InputError(f"runs need each other in a circle: {', '.join(job.name for job in left)}")
        found.append(group)
        left = [job for job in left if job not in group]
    return found


def absolute(job: Job) -> Job:
    """The job as a process in another working directory finds it."""
    needs = tuple(need.resolve() for need in job.needs)
    return dataclasses.replace(job, directory=job.directory.resolve(), needs=needs)


def give_up(job: Job, what: str, log: str = "") -> None:
    """Records that a run could not be carried out, for `fbi status` and `fbi retry`; without `log`, the run's own."""
    failure = {"what": what, "code": None, "time": time.time(), "log": log or tail(job.directory / LOG)}
    write_json(job.directory / FAILED, failure)


class Stops:
    """The requests to stop that a launcher made itself; those of `fbi stop` are not touched."""

    def __init__(self):
        self.files: list[Path] = []

    def ask(self, jobs: Iterable[Job]) -> None:
        """Asks each job, wherever it is carried out, to stop with a checkpoint."""
        for job in jobs:
            if not (file := job.directory / STOP).exists():
                write_text(file, "")
                self.files.append(file)

    def clear(self) -> None:
        """Takes the requests back, so that the runs can go on another time."""
        for file in self.files:
            file.unlink(missing_ok=True)
        self.files.clear()

"""Runs as job arrays of a Slurm cluster, submitted by submitit; all nodes see the folder of the runs.

A run that Slurm preempts, requeues or takes off its node at its time limit is queued again and continues from its last
checkpoint. How far the runs are is read from their own files, so the cluster needs no accounting.
"""

import contextlib
import dataclasses
import pickle
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fbi.errors import InputError
from fbi.files import make_directory, read_json, write_json
from fbi.launch.job import GRACE, Job, Outcome
from fbi.launch.remote import Stops, absolute, give_up, levels, optional, pairs
from fbi.launch.schedule import Schedule
from fbi.launch.slurm_task import CarryOut
from fbi.report.state import FAILED, alive, tail

QUEUE = "queue.json"  # which Slurm job has which run
LOOK = 5.0  # seconds between questions to Slurm
RESTARTS = 10_000  # time limits after which a run is not queued again


@dataclasses.dataclass(frozen=True)
class Slurm:
    """Job arrays: one of the runs that need no other, one of those that need these, and so on."""

    partition: str = ""
    """Where the runs are queued; empty: the cluster's default, as for all that follows."""
    account: str = ""
    """Who pays."""
    time: int = 1440
    """Minutes a run has on a node; one that needs more is queued again and continues."""
    cpus: int = 1
    """Cores of a run."""
    gpus: int = 0
    """GPUs of a run."""
    memory: float = 0.0
    """Gigabytes of a run."""
    at_once: int = 256
    """Most runs of an array at a time."""
    extra: str = ""
    """Further parameters of sbatch, such as constraint=h100;qos=high;exclusive."""
    wait: bool = True
    """Stay until the runs have ended; false: submit them and return."""

    def launch(self, jobs: Sequence[Job], watch: Callable[[], None], cancelled: threading.Event) -> Schedule:
        """Submits the jobs and returns how they ended; after `cancelled` is set the running ones stop cleanly.

        Jobs that an earlier launch left in the queue are waited for, not submitted again.
        """
        schedule = Schedule(jobs, cancelled.is_set)
        schedule.waiting.clear()  # Slurm decides what is next
        lost: set[Path] = set()
        for job in jobs:  # needed ones come first
            if outcome := "failed" if lost.intersection(job.needs) else _settled(job):
                schedule.end(job, outcome)
                lost |= {job.directory} if outcome == "failed" else set()
            else:
                schedule.taken.add(job)
        folder = jobs[0].directory.parent.resolve() / "slurm"
        queue = self._submit([job for job in jobs if job in schedule.taken], folder)
        if queue:
            numbers = ", ".join(sorted({_array(number) for number in queue.values()}))
            print(f"{len(queue)} runs are with Slurm as {numbers}; logs in {folder}", flush=True)
        if self.wait:
            _watch(schedule, queue, folder, watch, cancelled)
        return schedule

    def _submit(self, jobs: Sequence[Job], folder: Path) -> dict[Job, str]:
        """The Slurm job of each job, submitted now or still in the queue."""
        queued = (_in_queue() if (folder / QUEUE).exists() else None) or []
        known = read_json(folder / QUEUE) if queued else {}
        queue = {job: known[job.name] for job in jobs if known.get(job.name) in queued}
        by_directory = {job.directory: job for job in jobs}
        for level in levels(jobs):
            if level := [job for job in level if job not in queue]:
                needed = [queue[by_directory[n]] for job in level for n in job.needs if n in by_directory]
                submitted = self._executor(folder, needed).map_array(CarryOut(), [absolute(job) for job in level])
                queue |= {job: handle.job_id for job, handle in zip(level, submitted, strict=True)}
                write_json(folder / QUEUE, known | {job.name: number for job, number in queue.items()})
        return queue

    def _executor(self, folder: Path, needed: Sequence[str]) -> "_Executor":
        submitit = optional("submitit", "slurm")
        make_directory(folder)
        parameters: dict[str, Any] = {
            "job_name": "fbi",
            "time": self.time,
            "cpus_per_task": self.cpus,
            "srun_args": [f"--cpus-per-task={self.cpus}"],  # which srun no longer takes over from sbatch
            "array_parallelism": self.at_once,
            # so long before the limit Slurm sends the signal after which a run saves its checkpoint
            "signal_delay_s": int(min(GRACE + 60, self.time * 60 / 4)),
            "additional_parameters": {"requeue": True, **{k: v or True for k, v in pairs(self.extra, "extra").items()}},
            "partition": self.partition or None,
            "account": self.account or None,
            "gpus_per_node": self.gpus or None,
            "mem": f"{int(self.memory * 1024)}MB" if self.memory else None,
            "dependency": f"afterany:{':'.join(dict.fromkeys(map(_array, needed)))}" if needed else None,
        }
        return _Executor(submitit, folder, {name: value for name, value in parameters.items() if value is not None})


class _Executor:
    """submitit's executor, with errors that say what to do."""

    def __init__(self, submitit: Any, folder: Path, parameters: dict[str, Any]):
        try:
            self.inner = submitit.SlurmExecutor(folder, max_num_timeout=RESTARTS)
        except RuntimeError as error:
            raise InputError(
                "Slurm's commands (sbatch, srun, squeue) are not here; run this on a login node"
            ) from error
        self.inner.update_parameters(**parameters)
        self.failed = submitit.core.utils.FailedJobError

    def map_array(self, what: CarryOut, jobs: Sequence[Job]) -> Sequence[Any]:
        """One Slurm job for each job, as one array."""
        try:
            return self.inner.map_array(what, jobs)
        except (self.failed, subprocess.CalledProcessError) as error:
            said = " ".join(str(getattr(error, "stderr", None) or error).split())
            raise InputError(f"sbatch refused the runs: {said[-400:]}") from error


def _watch(
    schedule: Schedule, queue: dict[Job, str], folder: Path, watch: Callable[[], None], cancelled: threading.Event
) -> None:
    """Until every job has ended: by its files, and by Slurm where it left none."""
    stops, asked, looked, queued, absent = Stops(), False, time.monotonic(), None, {}
    while schedule.taken:
        if cancelled.is_set() and not asked:
            asked = True
            stops.ask(schedule.taken)
            subprocess.run(["scancel", "--state=PENDING", *queue.values()], capture_output=True, check=False)
        if time.monotonic() - looked > LOOK:
            looked, queued = time.monotonic(), _in_queue()
        for job in list(schedule.taken):
            if alive(job.directory):
                continue
            outcome = _settled(job)
            if outcome is None and queued is not None and queue[job] not in queued:
                since = absent.setdefault(job, time.monotonic())
                patient = time.monotonic() - since < 3 * LOOK
                outcome = "stopped" if asked else _left(job, queue[job], folder, patient)
            if outcome is not None:
                schedule.end(job, outcome)
        watch()
        time.sleep(0.2)
    watch()
    stops.clear()


def _settled(job: Job) -> Outcome | None:
    """How a job ended, by its files."""
    if (job.directory / "done.json").exists():
        return "done"
    return "failed" if (job.directory / FAILED).exists() else None


def _left(job: Job, number: str, folder: Path, patient: bool) -> Outcome | None:
    """How a job ended that Slurm no longer has, by what submitit wrote; None while that may still come."""
    result = folder / f"{number}_0_result.pkl"
    if not result.exists():
        if patient:  # a shared file system shows a file late
            return None
        give_up(job, f"Slurm job {number} ended before the run did, as after scancel or for want of memory; "
                     f"see {folder}/{number}_0_log.err", tail(folder / f"{number}_0_log.err"))  # fmt: skip
        return "failed"
    kind, value = pickle.loads(result.read_bytes())
    if kind == "error":
        give_up(job, f"Slurm job {number}: {str(value).strip().splitlines()[-1]}", str(value))
        return "failed"
    return value


def _in_queue() -> list[str] | None:
    """The Slurm jobs of this user that wait or run, as `12` or `12_3`; None where Slurm does not answer."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return None


def _array(number: str) -> str:
    return number.partition("_")[0]

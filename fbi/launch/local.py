"""Runs on this machine: N slots, each pinned to its share of the cores or to its own accelerator."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from fbi.errors import InputError
from fbi.launch.job import POLL, Job, execute
from fbi.launch.schedule import Schedule

Place = tuple[set[int], dict[str, str]]  # the cores of a slot (empty: all) and its environment


@dataclasses.dataclass(frozen=True)
class Local:
    """Processes on this machine."""

    slots: int = 1
    """Runs at a time."""
    pin: Literal["auto", "cores", "gpu", "tpu", "none"] = "auto"
    """What a slot gets to itself: a share of the cores, a GPU, a TPU chip; auto: GPUs where there are some."""

    def launch(self, jobs: Sequence[Job], watch: Callable[[], None], cancelled: threading.Event) -> Schedule:
        """Carries out the jobs and returns how they ended; after `cancelled` is set the running ones stop cleanly."""
        schedule, errors = Schedule(jobs, cancelled.is_set), []
        threads = [  # daemons, so that the main thread may leave at once: that ends the processes, with a checkpoint
            threading.Thread(target=_work, args=(schedule, cancelled, place, errors), name=f"slot-{i}", daemon=True)
            for i, place in enumerate(places(self.slots, self.pin))
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watch()
            time.sleep(POLL)
        watch()
        if errors:
            raise errors[0]
        return schedule


def _work(schedule: Schedule, cancelled: threading.Event, place: Place, errors: list[Exception]) -> None:
    """One slot: takes jobs until there are none. The process of a job inherits the cores of this thread.

    A job that could not even be started holds up no other; why goes to `errors`.
    """
    cores, environment = place
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    while not schedule.over:
        job = schedule.take()
        if job is None:
            time.sleep(POLL)
            continue
        outcome = "failed"
        try:
            outcome = execute(job, environment=environment, stopping=cancelled.is_set)
        except (InputError, OSError) as error:
            errors.append(error)
        finally:
            schedule.end(job, outcome)


def places(slots: int, pin: str) -> list[Place]:
    """A place for each slot; an `InputError` where the machine has too few."""
    if slots < 1:
        raise InputError(f"slots is {slots}; it must be at least 1")
    if pin == "auto":
        pin = "gpu" if _gpus() else "cores"
    if pin == "none":
        return [(set(), {})] * slots
    if pin in ("gpu", "tpu"):
        devices = _gpus() if pin == "gpu" else _chips()
        if slots > len(devices):
            raise InputError(f"slots is {slots}, but this machine has {len(devices)} of {pin}; use fewer, or pin=none")
        variable = "CUDA_VISIBLE_DEVICES" if pin == "gpu" else "TPU_VISIBLE_CHIPS"
        shares = [devices[index::slots] for index in range(slots)]
        extra = {} if pin == "gpu" else {"TPU_PROCESS_BOUNDS": "1,1,1"}
        return [(set(), {variable: ",".join(share), **extra}) for share in shares]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if slots > len(cores):
        return [(set(), {})] * slots  # more runs than cores: the system shares them out
    shares = [cores[len(cores) * i // slots : len(cores) * (i + 1) // slots] for i in range(slots)]
    return [(set(share), {"OMP_NUM_THREADS": str(len(share))}) for share in shares]


def _gpus() -> list[str]:
    """Identifiers of the GPUs that this process may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part for part in visible.split(",") if part]
    if shutil.which("nvidia-smi") is None:
        return []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
        return found.stdout.split() if found.returncode == 0 else []
    return []


def _chips() -> list[str]:
    """Identifiers of the TPU chips of this host."""
    return [str(i) for i, _ in enumerate(sorted(name for name in os.listdir("/dev") if name.startswith("accel")))]

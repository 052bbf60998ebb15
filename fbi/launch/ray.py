"""Runs as tasks of a Ray cluster, or of one started on this machine; all nodes see the folder of the runs.

A run that loses its node is carried out again on another one and continues from its last checkpoint.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fbi.errors import InputError
from fbi.launch.job import Job, Outcome
from fbi.launch.ray_hosts import beginner
from fbi.launch.remote import Stops, absolute, carry_out, give_up, optional, pairs
from fbi.launch.schedule import Schedule
from fbi.report.state import alive

PASSED_ON = ("FBI_", "JAX_", "XLA_")  # variables of this process that count in the runs too
STORE = 100 * 2**20  # bytes of shared memory of a cluster of our own: a task returns a word


@dataclasses.dataclass(frozen=True)
class Ray:
    """Tasks on a Ray cluster whose nodes have fbi installed and share the folder of the runs."""

    address: str = ""
    """HOST:PORT of a running cluster, or auto for the one of this machine; empty: one for this sweep alone."""
    cpus: float = 1.0
    """Cores of a process."""
    gpus: float = 0.0
    """GPUs of a process."""
    resources: str = ""
    """Other resources of a process, such as TPU=4, or TPU=4;large=1."""
    at_once: int = 0
    """Most runs at a time; 0: as many as the cluster has room for."""
    retries: int = -1
    """How often a run may lose its node or its process and continue elsewhere; -1: always."""
    hosts: int = 1
    """Processes of a run, on as many nodes where there are; each gets the cores, GPUs and resources."""

    def launch(self, jobs: Sequence[Job], watch: Callable[[], None], cancelled: threading.Event) -> Schedule:
        """Carries out the jobs and returns how they ended; after `cancelled` is set the running ones stop cleanly."""
        asked = self._resources()
        ray = optional("ray", "ray")
        schedule, stops = Schedule(jobs, cancelled.is_set), Stops()
        running: dict[Any, Job] = {}
        release: dict[Any, Callable[[], None]] = {}
        variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        with _connected(ray, self.address):
            _check_room(ray, {"CPU": self.cpus, "GPU": self.gpus, **asked}, own=not self.address)
            needs = {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": asked, "max_retries": self.retries}
            begin = beginner(ray, self.hosts, needs) if self.hosts > 1 else _alone(ray, needs)
            while not schedule.over:
                while (not self.at_once or len(running) < self.at_once) and (job := schedule.take()) is not None:
                    ref, give_back = begin(absolute(job), os.getcwd(), variables)
                    running[ref], release[ref] = job, give_back
                if cancelled.is_set():
                    schedule.take()  # which forgets what nobody has begun
                    stops.ask(running.values())
                    for ref, job in running.items():  # those that wait for room need no room to end
                        if not alive(job.directory):
                            ray.cancel(ref)
                for ref in _ended(ray, list(running)):
                    job = running.pop(ref)
                    schedule.end(job, _outcome(ray, ref, job))
                    release.pop(ref)()
                watch()
        stops.clear()  # not after an error: then the processes may still be reading them
        watch()
        return schedule

    def _resources(self) -> dict[str, float]:
        if self.at_once < 0 or self.retries < -1 or self.hosts < 1:
            raise InputError(
                f"at_once is {self.at_once}, retries is {self.retries}, hosts is {self.hosts}; use 0 or more (retries "
                "-1: always), and 1 host or more"
            )
        try:
            return {name: float(value) for name, value in pairs(self.resources, "resources").items()}
        except ValueError as error:
            raise InputError(f"resources is {self.resources!r}; give numbers, as in TPU=4;large=1") from error


def _alone(ray: Any, needs: Mapping[str, Any]) -> Callable[..., tuple[Any, Callable[[], None]]]:
    """What begins a job as one task."""

    def begin(job: Job, *where: Any) -> tuple[Any, Callable[[], None]]:
        return ray.remote(carry_out).options(name=job.name, **needs).remote(job, *where), lambda: None

    return begin


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Connected to a cluster; one that this process is connected to already, as in a notebook, stays so."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    own: dict[str, Any] = {} if address else {"include_dashboard": False, "object_store_memory": STORE}
    try:
        with _handlers_kept():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.WARNING, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"no Ray cluster at {address or 'this machine'!r}: {first} Start one by `ray start --head`, "
                         "or leave the address out") from error  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM, by which a sweep is asked to stop: this puts it back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _check_room(ray: Any, asked: Mapping[str, float], own: bool) -> None:
    """An `InputError` where a run can never fit on this machine; a word where a cluster has to grow for it."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes):
        return
    text = ", ".join(f"{amount:g} {name}" for name, amount in asked.items() if amount)
    if own:
        raise InputError(f"a run needs {text}, which this machine does not have; ask for less, or give an address")
    print(f"no node of the cluster has {text}: the runs wait until one joins it", flush=True)


def _ended(ray: Any, refs: list[Any]) -> list[Any]:
    """The tasks that have ended, after a moment."""
    if not refs:
        time.sleep(0.2)
        return []
    first, _ = ray.wait(refs, num_returns=1, timeout=0.2, fetch_local=False)
    return ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0] if first else []


def _outcome(ray: Any, ref: Any, job: Job) -> Outcome:
    try:
        return ray.get(ref)
    except ray.exceptions.TaskCancelledError:
        return "stopped"
    except ray.exceptions.RayError as error:
        lines = [line for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
        give_up(job, f"Ray could not carry it out: {lines[-1] if lines else type(error).__name__}", "\n".join(lines))
        return "failed"

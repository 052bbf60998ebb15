"""A run on several nodes of a Ray cluster: a task for each of its processes, all begun together.

Process 0 is the task that the launcher knows. It tells the others where to meet, and they end with it: on every node as
if `fbi train --coordinator` had been said there by hand.
"""

import contextlib
import dataclasses
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fbi.launch.job import Job, Outcome
from fbi.launch.leash import EXECUTOR
from fbi.launch.remote import carry_out, optional

LAST = 30.0  # seconds for the other processes to end after process 0 has
ALWAYS = 1000  # restarts where a run may lose nodes without end


def beginner(ray: Any, hosts: int, needs: Mapping[str, Any]) -> Callable[..., tuple[Any, Callable[[], None]]]:
    """What begins a job on so many nodes at once, each process with its `needs`, on different nodes where there are.

    (job, working directory, variables) -> the reference of process 0's task, and what gives the nodes back.
    """
    bundle = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], **needs["resources"]}
    bundle = {name: amount for name, amount in bundle.items() if amount}

    def begin(job: Job, folder: str, variables: Mapping[str, str]) -> tuple[Any, Callable[[], None]]:
        group = ray.util.placement_group([bundle] * hosts, strategy="SPREAD", name=job.name)
        task = ray.remote(lead).options(name=job.name, scheduling_strategy=_place(group, 0), **needs)
        return task.remote(job, folder, variables, hosts, needs), lambda: ray.util.remove_placement_group(group)

    return begin


def lead(job: Job, folder: str, variables: Mapping[str, str], hosts: int, needs: Mapping[str, Any]) -> Outcome:
    """The task of process 0: begins the others on the other places of its group, and carries the job out with them.

    A process that is lost is begun again by Ray where there is room; until then the others wait for it.
    """
    ray = optional("ray", "ray")
    restarts = ALWAYS if needs["max_retries"] < 0 else needs["max_retries"]
    job = dataclasses.replace(job, flags=(*job.flags, "--restarts", str(restarts)))
    place = {"FBI_COORDINATOR": f"{ray.util.get_node_ip_address()}:{_free_port()}", "FBI_PROCESSES": str(hosts)}
    variables = {**variables, **place}
    others = _others(ray, job, folder, variables, hosts, needs)
    return carry_out(job, folder, {**variables, "FBI_PROCESS": "0"}, others)


@contextlib.contextmanager
def _others(
    ray: Any, job: Job, folder: str, variables: Mapping[str, str], hosts: int, needs: Mapping[str, Any]
) -> Iterator[None]:
    """Around process 0: the others run; after it they have `LAST` seconds."""
    group: Any = ray.util.get_current_placement_group()
    others = [
        ray.remote(follow)
        .options(name=f"{job.name}-{number}", scheduling_strategy=_place(group, number), **needs)
        .remote(job, folder, {**variables, "FBI_PROCESS": str(number)})
        for number in range(1, hosts)
    ]
    try:
        yield
        ray.wait(others, num_returns=len(others), timeout=LAST)
    finally:
        for other in others:
            ray.cancel(other, force=True)


def _place(group: Any, number: int) -> Any:
    strategies = optional("ray.util.scheduling_strategies", "ray")
    return strategies.PlacementGroupSchedulingStrategy(group, number)


def follow(job: Job, folder: str, variables: Mapping[str, str]) -> int:
    """The task of another process: the run's command, whose words go to log-PROCESS.txt; its exit code."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    with (job.directory / f"log-{variables['FBI_PROCESS']}.txt").open("ab") as log:
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables, EXECUTOR: str(os.getpid())},
            start_new_session=True,
        )
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]

"""Where this process stands among those of a run on several hosts: by flags, or by what started them all."""

import contextlib
import dataclasses
import glob
import os
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from fbi.errors import InputError

_METADATA = "computeMetadata/v1/instance/attributes"  # of a Google Cloud machine
_PATIENCE = 2.0  # seconds for its answer


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The other processes of a run that is started by one command on every host."""

    coordinator: str = ""
    """HOST:PORT of process 0, where all meet, or FBI_COORDINATOR; empty on a TPU pod and in a Slurm step, which tell
    JAX themselves."""
    processes: int = 0
    """How many processes carry out the run, or FBI_PROCESSES."""
    process: int = -1
    """Which of them this one is, from 0, or FBI_PROCESS."""
    heartbeat: float = 20.0
    """Seconds of silence after which a process is taken for dead, and the others end."""
    restarts: int = 0
    """How often the run goes on by itself, from its last checkpoint, after a process was lost."""


class Place(NamedTuple):
    """Where this process stands."""

    coordinator: str
    """HOST:PORT of process 0; empty where JAX finds it."""
    processes: int
    process: int
    heartbeat: float


def find(hosts: Hosts, environment: Mapping[str, str] | None = None) -> Place | None:
    """The place of this process, None where it is the whole run; an `InputError` where the flags do not say it."""
    known = os.environ if environment is None else environment
    coordinator = hosts.coordinator or known.get("FBI_COORDINATOR", "")
    processes = hosts.processes or _number(known, "FBI_PROCESSES", 0)
    process = hosts.process if hosts.process >= 0 else _number(known, "FBI_PROCESS", -1)
    if hosts.heartbeat < 1 or hosts.restarts < 0:
        raise InputError(f"heartbeat={hosts.heartbeat:g} must be at least 1, restarts={hosts.restarts} at least 0")
    if not (coordinator or processes or process >= 0):
        found = _slurm(known) or _tpu(known)
        return found and Place("", *found, hosts.heartbeat)
    if processes == 1 and process <= 0:
        return None
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise InputError(f"coordinator={coordinator!r} is not HOST:PORT of process 0; use --coordinator host0:8476")
    if not 0 <= process < processes:
        raise InputError(
            f"process={process} of processes={processes} does not exist; with --coordinator give --processes N, the "
            "same on every host, and --process I, from 0 to N - 1"
        )
    return Place(coordinator, processes, process, hosts.heartbeat)


def _number(known: Mapping[str, str], name: str, otherwise: int) -> int:
    text = known.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name}={text!r} is not a whole number")
    return int(text) if text else otherwise


def _slurm(known: Mapping[str, str]) -> tuple[int, int] | None:
    """(tasks, this one) of a step of `srun` with several tasks; a shell of salloc is none."""
    tasks = _number(known, "SLURM_STEP_NUM_TASKS", 1)
    return (tasks, _number(known, "SLURM_PROCID", 0)) if tasks > 1 and "SLURM_PROCID" in known else None


def _tpu(known: Mapping[str, str]) -> tuple[int, int] | None:
    """(hosts, this one) of a slice of several TPU hosts: GKE says it in the environment, a TPU VM in its metadata."""
    names, number = known.get("TPU_WORKER_HOSTNAMES", ""), known.get("TPU_WORKER_ID", "")
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    if not names and chips and "TPU_SKIP_MDS_QUERY" not in known:
        names, number = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    hosts, slices = len(names.split(",")), _number(known, "MEGASCALE_NUM_SLICES", 1)
    if not (chips and names and number.isdecimal() and hosts * slices > 1):
        return None
    return hosts * slices, int(number) + hosts * _number(known, "MEGASCALE_SLICE_ID", 0)


def _metadata(key: str) -> str:
    where = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    asked = urllib.request.Request(f"http://{where}/{_METADATA}/{key}", headers={"Metadata-Flavor": "Google"})
    with contextlib.suppress(OSError), urllib.request.urlopen(asked, timeout=_PATIENCE) as answer:
        return answer.read().decode().strip()
    return ""

"""The launchers by name, and what they have in common."""

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from fbi.errors import unknown
from fbi.experiment import overlay
from fbi.launch.job import Job
from fbi.launch.schedule import Schedule

# name: where its class is; imported when it is wanted, so that what it needs need not be installed
LAUNCHERS = {
    "local": ("fbi.launch.local", "Local"),
    "ray": ("fbi.launch.ray", "Ray"),
    "slurm": ("fbi.launch.slurm", "Slurm"),
    "sky": ("fbi.launch.sky", "Sky"),
}


@runtime_checkable
class Launcher(Protocol):
    """Carries jobs out somewhere. Its fields are its options."""

    def launch(self, jobs: Sequence[Job], watch: Callable[[], None], cancelled: threading.Event) -> Schedule:
        """Starts the jobs, those that others need first, and returns when all have ended, or `cancelled` is set.

        `watch` is called about once a second meanwhile. What is done is never done again.
        """
        ...


def parse(text: str) -> Launcher:
    """A launcher from text such as `local:slots=2,pin=cores`; unknown names and options list the valid ones."""
    name, _, options = text.partition(":")
    if name not in LAUNCHERS:
        raise unknown("launcher", name, LAUNCHERS)
    module, kind = LAUNCHERS[name]
    return overlay(getattr(importlib.import_module(module), kind)(), [part for part in options.split(",") if part])

"""A sweep in the foreground: shown while it runs, stopped by a signal."""

import signal
import threading
from collections.abc import Sequence

from fbi.launch.job import Job
from fbi.launch.launchers import Launcher
from fbi.launch.schedule import Schedule
from fbi.launch.watch import Watch
from fbi.report.state import STOP


def conduct(jobs: Sequence[Job], launcher: Launcher) -> Schedule:
    """Has jobs carried out, and returns how they ended; those that were asked to stop before are taken up again.

    SIGINT or SIGTERM stops the running ones with a checkpoint; a second one raises `KeyboardInterrupt` at once.
    """
    for job in jobs:
        (job.directory / STOP).unlink(missing_ok=True)
    cancelled = threading.Event()

    def ask(number: int, frame: object) -> None:
        del number, frame
        if cancelled.is_set():
            raise KeyboardInterrupt  # the processes save a checkpoint when their parent dies
        cancelled.set()
        print("stopping: each running run saves a checkpoint; once more to leave at once", flush=True)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Watch(jobs) as watch:
            return launcher.launch(jobs, watch, cancelled)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)

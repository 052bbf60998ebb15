"""The tie of a run's process to whoever executes it, taken up by the process itself as it starts."""

import ctypes
import os
import signal
import sys

EXECUTOR = "FBI_EXECUTOR"  # in the environment of the process: the executor's process number
_PR_SET_PDEATHSIG = 1


def follow() -> None:
    """Where an executor started this process: SIGTERM, which saves a checkpoint, comes when that is killed.

    SIGUSR1 and SIGUSR2 are for the executor: queueing systems announce with them, to every process of a job, that its
    time is up, and training would die of them. Does nothing in a process that a user started.
    """
    executor = os.environ.pop(EXECUTOR, "")
    if not executor:
        return
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(executor):
            sys.exit(f"fbi: whoever started this run (process {executor}) is gone; start the sweep again")

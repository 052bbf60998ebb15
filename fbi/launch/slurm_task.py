"""What a Slurm job carries out on its node: one run, or the rest of it."""

import os
import threading
import time
from typing import Any

from fbi.launch.job import GRACE, Job, Outcome, execute
from fbi.report.state import STOP, alive, state_of

UNTIL_KILLED = 60.0  # seconds after its SIGTERM by which Slurm has ended a job that it takes off a node


class CarryOut:
    """A callable that submitit stores; `checkpoint` is its protocol for a job that is to be queued again."""

    asked, working = False, False  # to stop; whether a process of the run may be there

    def __call__(self, job: Job) -> Outcome:
        """Carries a job out; one whose needs are not done ends at once and says so."""
        print(f"{job.name}: SLURM_RESTART_COUNT={os.environ.get('SLURM_RESTART_COUNT', 0)}", flush=True)
        if (missing := _missing(job)) is not None:
            print(f"{job.name} is not started: {missing}", flush=True)
            return "failed"
        while True:
            outcome = self._execute(job)
            if outcome == "busy":  # another process has it: the one that Slurm takes down, or another launcher's
                time.sleep(2)
            elif outcome != "stopped" or self.asked or (job.directory / STOP).exists():
                return outcome
            else:
                # Slurm signalled all processes of the job, to end it (and to queue it again): wait for that. One that
                # is still here afterwards goes on.
                time.sleep(UNTIL_KILLED)

    def checkpoint(self, job: Job) -> Any:
        """Called in the signal's handler some time before Slurm ends the job: has the run save, and asks for more."""
        from fbi.launch.remote import optional

        self.asked = True
        deadline = time.monotonic() + GRACE + 10
        while self.working and time.monotonic() < deadline:
            time.sleep(0.1)
        return optional("submitit", "slurm").helpers.DelayedSubmission(CarryOut(), job)

    def _execute(self, job: Job) -> Outcome:
        """In a thread of its own, so that it goes on while this one handles a signal."""
        ended: list[Outcome | BaseException] = []

        def work() -> None:
            try:
                ended.append(execute(job, stopping=lambda: self.asked))
            except BaseException as error:
                ended.append(error)
            self.working = False

        self.working = True
        threading.Thread(target=work, daemon=True).start()
        while self.working:
            time.sleep(0.2)
        if isinstance(ended[0], BaseException):
            raise ended[0]
        return ended[0]


def _missing(job: Job) -> str | None:
    """Which needed run is not done, once nobody works on it any more."""
    for need in job.needs:
        while not (need / "done.json").exists():
            if not alive(need):
                return f"{need.name}, which it needs, is {state_of(need).kind}"
            time.sleep(2)
    return None

"""Which job is next: one after the other, those that others need first, each once, whoever else works on the sweep."""

import dataclasses
import threading
from collections.abc import Callable, Sequence

from fbi.launch.job import Job, Outcome
from fbi.report.state import FAILED, STOP, alive


@dataclasses.dataclass
class Schedule:
    """The jobs of one launcher. Thread-safe; `take` and `end` are called by whatever carries jobs out."""

    jobs: Sequence[Job]
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self):
        self.waiting = list(self.jobs)
        self.taken: set[Job] = set()
        self.outcomes: dict[Job, Outcome] = {}
        self._lock = threading.Lock()

    def take(self) -> Job | None:
        """A job whose needs are done and which nobody else has; None while there is none (see `over`)."""
        with self._lock:
            if self.cancelled():
                self.waiting.clear()
            for job in list(self.waiting):
                if (settled := self._settled(job)) is not None:
                    self.waiting.remove(job)
                    self.outcomes[job] = settled
                elif all((need / "done.json").exists() for need in job.needs) and not alive(job.directory):
                    self.waiting.remove(job)
                    self.taken.add(job)
                    return job
        return None

    def end(self, job: Job, outcome: Outcome) -> None:
        """Says how a taken job ended; a busy one goes back, to be looked at again."""
        with self._lock:
            self.taken.discard(job)
            if outcome == "busy":
                self.waiting.append(job)
            else:
                self.outcomes[job] = outcome

    @property
    def over(self) -> bool:
        """Whether nothing is left to take or to wait for."""
        with self._lock:
            return not self.waiting and not self.taken

    def _settled(self, job: Job) -> Outcome | None:
        """How a job stands that needs no carrying out: done, failed, or without hope because a needed one is."""
        if (job.directory / "done.json").exists():
            return "done"
        if (job.directory / FAILED).exists() or any((need / FAILED).exists() for need in job.needs):
            return "failed"
        lost = {j.directory for j, outcome in self.outcomes.items() if outcome != "done"}
        if any(need in lost for need in job.needs):
            return "failed"
        if (job.directory / STOP).exists() and not alive(job.directory):
            return "stopped"
        return None

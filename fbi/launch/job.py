"""One run of a sweep, carried out as a process: `fbi train RUN_DIR`. Every launcher does this, only in other places.

Beside the files of the run itself a directory gets `log.txt` (what the process printed), `running.json` (who runs it,
touched as a sign of life), `failed.json` (how it failed, with the end of the log) and `.claim`, a lock held by the
executor and by the process together: while either lives, nobody else starts the run.
"""

import contextlib
import dataclasses
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fbi.errors import EXIT_STOPPED
from fbi.files import cache_root, claimed, write_json
from fbi.launch.leash import EXECUTOR
from fbi.report.state import CLAIM, FAILED, HEARTBEAT, LOG, RUNNING, STOP, tail

Outcome = Literal["done", "failed", "stopped", "busy"]
POLL = 0.2  # seconds between looks at the process
GRACE = 120.0  # seconds that a process has for its checkpoint after it was asked to stop


@dataclasses.dataclass(frozen=True)
class Job:
    """A run directory with its config, the flags to execute it with, and the directories that must be done before."""

    directory: Path
    flags: tuple[str, ...] = ()
    needs: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """Its directory's name."""
        return self.directory.name

    @property
    def command(self) -> list[str]:
        """The one contract of all launchers."""
        return [sys.executable, "-m", "fbi", "train", str(self.directory), *self.flags]


def execute(
    job: Job,
    *,
    environment: Mapping[str, str] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    beside: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008
) -> Outcome:
    """Carries a job out, or continues it, and waits for its end; `busy` where another process has it.

    It is asked to stop, with a checkpoint, as soon as `stopping()` or a file `stop` in its directory says so, and when
    the process that called this dies. Safe to call again at any time: what is done stays done. `beside` is entered
    around the process, where there is one to begin.
    """
    with claimed(job.directory / CLAIM) as claim:
        if claim is None:
            return "busy"
        if (job.directory / "done.json").exists():
            return "done"
        if (job.directory / FAILED).exists():
            return "failed"
        stop = lambda: stopping() or (job.directory / STOP).exists()  # noqa: E731
        if stop():
            return "stopped"
        variables = {**_compiled(), **os.environ, **(environment or {}), EXECUTOR: str(os.getpid())}
        with beside:
            code = _run(job, claim.fileno(), variables, stop)
        (job.directory / RUNNING).unlink(missing_ok=True)
        if (job.directory / "done.json").exists():  # whatever befell the process after it
            return "done"
        if code == EXIT_STOPPED or stop():
            return "stopped"
        write_json(job.directory / FAILED, _failure(job, code))
        return "failed"


def _run(job: Job, claim: int, environment: Mapping[str, str], stop: Callable[[], bool]) -> int:
    with (job.directory / LOG).open("ab") as log:
        log.write(f"== {time.strftime('%F %T')} {platform.node()}: {' '.join(job.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(claim,),
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which asks each process once
        )
    running = {"host": platform.node(), "pid": process.pid, "executor": os.getpid(), "since": time.time()}
    write_json(job.directory / RUNNING, running)
    asked, beat = 0.0, time.monotonic()
    try:
        while process.poll() is None:
            now = time.monotonic()
            if not asked and stop():
                asked = now
                process.terminate()
            if asked and now - asked > GRACE:
                process.kill()
            if now - beat > HEARTBEAT:
                beat = now
                with contextlib.suppress(OSError):
                    os.utime(job.directory / RUNNING)
            time.sleep(POLL)
    finally:
        if process.poll() is None:  # the executor itself is being torn down
            process.kill()
            process.wait()
    return process.returncode


def _compiled() -> dict[str, str]:
    """Settings that let runs share compiled programs: the seeds of one configuration compile once."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache_root() / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _failure(job: Job, code: int) -> dict[str, Any]:
    if code < 0:
        what = f"killed by {signal.Signals(-code).name}"
        what += ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    else:
        what = f"exit code {code}"
    log = tail(job.directory / LOG)
    said = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    return {"what": f"{what}: {said}" if code > 0 and said else what, "code": code, "time": time.time(), "log": log}

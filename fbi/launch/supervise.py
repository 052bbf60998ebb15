"""The parent of one process of a run on several hosts.

Where a process of such a run dies, JAX's runtime aborts all others from within, without a Python exception. So each is
the child of a small process that touches no device: it passes signals on, and says in one line how its child ended.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fbi.errors import EXIT_INPUT, EXIT_LOST, EXIT_STOPPED
from fbi.launch.hosts import Hosts, Place, find
from fbi.launch.leash import EXECUTOR

CHILD = "FBI_CHILD"  # in the environment of the child
ENDS = (0, EXIT_INPUT, EXIT_STOPPED, 128 + signal.SIGINT)  # of a child that has itself said how it ended
MARGIN = 5.0  # seconds beyond the silence of a dead process within which the others have ended


def enter(hosts: Hosts, arguments: Sequence[str]) -> Place | None:
    """Takes this process's place among those of a run; None where it is the whole run.

    The first process on a host becomes the parent, which ends with its child; the child meets the others.
    """
    place = find(hosts)
    if place is not None:
        if CHILD not in os.environ:
            sys.exit(supervise(place, arguments, hosts.restarts))
        from fbi.train.hosts import join

        join(place.coordinator, place.processes, place.process, place.heartbeat)
    return place


def end(run: Callable[[], int]) -> None:
    """Ends this process with the code that `run` returns; a child also where others wait for it in vain."""
    if CHILD not in os.environ:
        sys.exit(run())
    from fbi.train.hosts import leave

    leave(run)


def supervise(place: Place, arguments: Sequence[str], restarts: int = 0) -> int:
    """Runs `fbi` with these arguments as a child, again where a process of the run was lost, and returns its code.

    SIGTERM and SIGINT go to the child, which then saves a checkpoint together with the others. A lost process, here or
    elsewhere, is `EXIT_LOST` and one line on standard error.
    """
    left, asked, here = restarts, [], f"fbi: process {place.process} of {place.processes}"
    child: subprocess.Popen | None = None

    def pass_on(number: int, frame: Any) -> None:
        del frame
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            environment = os.environ | {CHILD: "1", EXECUTOR: str(os.getpid())}
            child = subprocess.Popen(
                [sys.executable, "-m", "fbi", *arguments],
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the parent alone, which asks the child once
            )
            peers = _Peers(child.stderr, place.process)
            code = child.wait()
            peers.join(MARGIN)
            if code in ENDS:
                return code
            again = bool(left) and not asked
            then = "starting again from the last checkpoint" if again else "the same command on every host continues"
            print(f"{here} {_how(code, peers.lost, place.heartbeat)}; {then}", file=sys.stderr, flush=True)
            if not again:
                return code if code > 0 else EXIT_LOST
            left -= 1
            time.sleep(place.heartbeat + MARGIN)  # by now the others have ended too, and nobody meets a dying process
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _how(code: int, lost: Sequence[int], heartbeat: float) -> str:
    """What became of the child, whose runtime named the processes that were `lost`."""
    if code > 0:
        return f"failed with exit code {code}, as said above; the others end within {heartbeat:g} s"
    name = signal.Signals(-code).name
    if -code == signal.SIGABRT:
        who = f"process {', '.join(map(str, lost))}" if lost else "another process of the run"
        return f"was ended by the runtime ({name}): {who} died or hangs"
    memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
    return f"was killed by {name}{memory}; the others end within {heartbeat:g} s"


class _Peers(threading.Thread):
    """Passes on what the child says on standard error, and reads there which other processes its runtime lost.

    The runtime's own stack, of no use to anyone who trains, is left out.
    """

    def __init__(self, stream: Any, own: int):
        super().__init__(daemon=True)
        self._stream, self._own, self._found = stream, own, set()
        self.start()

    @property
    def lost(self) -> list[int]:
        """Their numbers, as far as they are known."""
        return sorted(self._found - {self._own})

    def run(self) -> None:
        listing = False
        for line in self._stream or ():
            if not re.match(rb"\s+@\s+0x|\*\*\* Check failure stack trace", line):
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            if listing := b"tasks are unhealthy" in line or (listing and line.strip().replace(b",", b"").isdigit()):
                self._found |= {int(number) for number in re.findall(rb"(?:^|,|task:)(\d+)", line)}

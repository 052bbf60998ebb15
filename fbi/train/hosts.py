"""One run on several processes: how they meet and part, what one does for all, what all agree on.

Every function here also serves a run of one process, for which it costs nothing. Words between the processes travel
through JAX's coordination service, which lives in process 0, and need no device: while one prepares data for an hour,
the others wait without a collective that could time out.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fbi.errors import EXIT_STOPPED, InputError
from fbi.train.run import differences

Value = TypeVar("Value")
CONNECT = 300  # seconds in which all processes of a run must have been started
LONGEST = 7 * 86_400_000  # milliseconds that the others wait for what process 0 does, such as preparing a corpus
_calls = itertools.count()  # of these functions: the same on all processes, since all run the same program
_heartbeat = 0.0  # seconds, of the run that was joined


def join(coordinator: str, processes: int, process: int, heartbeat: float) -> None:
    """Meets the other processes at `coordinator` (HOST:PORT, of process 0); '' has JAX find all three by itself.

    A process that is silent for `heartbeat` seconds is taken for dead, and JAX's runtime then aborts all others. An
    `InputError` where they cannot meet.
    """
    global _heartbeat
    _heartbeat = heartbeat
    try:
        jax.distributed.initialize(
            coordinator or None,
            processes if coordinator else None,
            process if coordinator else None,
            heartbeat_timeout_seconds=max(1, round(heartbeat)),
            initialization_timeout=CONNECT,
        )
    except (RuntimeError, ValueError) as error:  # JAX's own are RuntimeErrors
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"process {process} did not meet the other {processes - 1} at {coordinator or 'the address JAX found'}: "
            f"{reason}; start the same command on every host, each with its own process number"
        ) from error


def alone() -> bool:
    """Whether this process is the whole run."""
    return jax.process_count() == 1


def leads() -> bool:
    """Whether this is process 0, which keeps the lock, the record and the other files of the run."""
    return jax.process_index() == 0


def _service() -> Any:
    from jax._src import distributed  # JAX has no public name for it; Orbax and Flax take it from here as well

    return distributed.global_state.client


def led(work: Callable[[], Value]) -> Value:
    """What `work` gives on process 0, as plain data, on every process; its `InputError` is raised on every one."""
    if alone():
        return work()
    key = f"fbi/led/{next(_calls)}"
    if leads():
        try:
            said: dict[str, Any] = {"value": work()}
        except InputError as error:
            said = {"error": str(error)}
        _service().key_value_set(key, json.dumps(said))
    else:
        said = json.loads(_service().blocking_key_value_get(key, LONGEST))
    if "error" in said:
        raise InputError(said["error"])
    return said["value"]


def first(work: Callable[[], Value]) -> Value:
    """`work`, done by process 0 and then by each of the others, which find in the cache what it left there."""
    found: list[Value] = []
    led(lambda: found.append(work()))
    return found[0] if found else work()


def told(value: Any) -> list[Any]:
    """The `value`, plain data, of every process, by its number; returns when all have told theirs."""
    if alone():
        return [value]
    key, service = f"fbi/told/{next(_calls)}", _service()
    service.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    service.wait_at_barrier(key, LONGEST)
    by_process = {int(name.rsplit("/", 1)[1]): json.loads(text) for name, text in service.key_value_dir_get(key)}
    return [by_process[process] for process in range(jax.process_count())]


def same(what: str, value: Mapping[str, Any]) -> None:
    """An `InputError` on every process where the plain data `value` is not the same on all, naming what differs."""
    for process, theirs in enumerate(found := told(value)):
        if other := differences(found[0], theirs):
            raise InputError(
                f"process {process} has another {what} than process 0: {'; '.join(other[:5])}; "
                "start the same command on every host, with the same files"
            )


class Votes:
    """Whether any process was asked to stop, as all of them know it at the same step; and whether they see one loss.

    Each casts its vote before a step is dispatched, in a collective of two integers a device, and reads the result at
    the next, when it has waited for the metrics of that step anyway: no wait of its own.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names, None))
        self._shape = (mesh.size, 2)
        self._count = jax.jit(lambda votes: (jnp.max(votes, 0), jnp.min(votes, 0)))
        self._cast: Any = None

    def stopping(self, asked: bool, loss: float = 0.0) -> bool:
        """Whether one of the processes was `asked` to stop before the step that was dispatched last.

        `loss` is the one that this process read last. All decide by it whether to go back to a checkpoint, so it must
        be the same to the last bit; a `RuntimeError` where it is not.
        """
        if alone():
            return asked
        before, row = self._cast, np.array([[asked, np.float32(loss).view(np.int32)]], np.int32)
        votes = jax.make_array_from_callback(self._shape, self._sharding, lambda at: row)
        self._cast = self._count(votes)
        if before is None:
            return False
        most, least = (np.asarray(found) for found in before)
        if most[1] != least[1]:
            one, other = (float(np.int32(bits).view(np.float32)) for bits in (most[1], least[1]))
            raise RuntimeError(f"the processes read different losses of the same step: {one!r} and {other!r}")
        return bool(most[0])


def leave(run: Callable[[], int]) -> None:
    """Ends this process with the code that `run` returns, also where others of a joined run wait for it in vain.

    On its own JAX would wait for them as it leaves: minutes in which they take this process for alive.
    """
    try:
        code = run()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException as error:
        if not _heartbeat:
            raise
        # A collective fails where a process of another host died: if that is it, the runtime soon ends this one
        print(f"fbi: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
        time.sleep(_heartbeat + 5)
        traceback.print_exception(error)
        code = 1
    if not _heartbeat or code in (0, EXIT_STOPPED):
        sys.exit(code)
    if _service() is not None and code != 128 + signal.SIGINT:
        # All may be ending for one reason: process 0, where the service lives, goes with the last
        with contextlib.suppress(Exception):
            _service().wait_at_barrier("fbi/leave", round(1000 * _heartbeat))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

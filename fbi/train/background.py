"""One piece of work at a time in a thread of its own; and a copy of arrays for it, made while the devices go on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Background:
    """Runs what it is given, one after the other, each behind the caller's back. What fails, fails in `wait`."""

    def __init__(self):
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._task: Future[None] | None = None
        self.took: float | None = None
        """Seconds that the last piece of work took, until it was whole; None before the first."""

    def start(self, work: Callable[[], Any]) -> None:
        """Begins `work` when the piece before is done: at most one is ever under way."""
        self.wait()
        began = time.perf_counter()

        def task() -> None:
            work()
            self.took = time.perf_counter() - began

        self._task = self._thread.submit(task)

    def wait(self) -> None:
        """Returns when nothing is under way; raises what the last piece of work raised, once."""
        task, self._task = self._task, None
        if task:
            task.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def snapshot(tree: Any) -> Any:
    """A copy of arrays in the memory of their hosts, each device's part apart, with the same types and shardings.

    Returns at once: the devices copy after what they were given before and before what they are given next, which may
    be a step that takes the originals over (`donate_argnums`). Devices without such memory copy within their own.
    """
    return jax.tree.map(_copied, tree)


def _copied(leaf: jax.Array) -> jax.Array:
    kinds = {memory.kind for device in leaf.sharding.addressable_devices for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        return leaf.copy()
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"), may_alias=False)

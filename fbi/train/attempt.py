"""Reads that may fail: one error for the many that Orbax and TensorStore raise, and nothing left behind by them."""

import asyncio
import gc
import logging
import sys
import time
from collections.abc import Callable
from typing import TypeVar, cast

import jax

Result = TypeVar("Result")
_PATIENCE = 60  # seconds for reads that nobody waits for any more


class Damaged(Exception):
    """A checkpoint that cannot be read, or whose content is not what was written."""


def attempt(read: Callable[[], Result]) -> Result:
    """What `read` gives, or `Damaged` for what Orbax and TensorStore raise.

    All else that they say about it, also when what they leave behind is collected, is kept off standard error.
    """
    disabled, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable()
    sys.unraisablehook = lambda _: None
    try:
        try:
            return read()
        except (MemoryError, jax.errors.JaxRuntimeError):  # of this machine, not of the files
            raise
        except Exception as error:
            problem = _innermost(error)
        _outwait()
    finally:
        logging.disable(disabled)
        sys.unraisablehook = hook
    raise Damaged(problem)


def _outwait() -> None:
    """Returns when TensorStore has answered every read that Orbax gave up.

    Orbax closes its event loop at the first error and leaves the other reads under way; their answers find the loop
    closed, which Python reports as errors that nobody can catch, at whatever moment they come.
    """
    until = time.monotonic() + _PATIENCE
    while _abandoned() and time.monotonic() < until:
        time.sleep(0.05)


def _abandoned() -> list[asyncio.Task]:
    """Tasks that wait for an answer to a closed loop; those that have it are collected."""
    gc.collect()
    # The type is asked for, as isinstance would wake what only stands in for another object.
    tasks = [cast(asyncio.Task, found) for found in gc.get_objects() if issubclass(type(found), asyncio.Task)]
    return [task for task in tasks if not task.done() and task.get_loop().is_closed()]


def _innermost(error: BaseException) -> str:
    while inner := error.__cause__ or error.__context__:
        error = inner
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__

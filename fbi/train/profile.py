"""A profiler trace of some steps of a run."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from fbi.errors import InputError


def parse(text: str, steps: int) -> range | None:
    """The steps that `10:15` names, both ends among them, counted from 1; None of ''.

    An `InputError` for other text, and for steps that a run of so many `steps` does not take.
    """
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text.strip())
    if not match:
        raise InputError(f"profile={text!r} is not FIRST:LAST; for steps 10 to 15 write 10:15")
    first, last = int(match[1]), int(match[2])
    if not 1 <= first <= last <= steps:
        raise InputError(f"profile={text!r} must name steps from 1 to {steps}, the first not after the last")
    return range(first, last + 1)


class Profile:
    """Traces `wanted` steps into `folder`, once; `say` gets the line that tells where it lies and how to open it."""

    def __init__(self, wanted: range | None, folder: Path, say: Callable[[str], None] = print):
        self.wanted, self.folder, self.say = wanted, folder, say
        self._first = 0  # step that the trace began with; 0: none is under way

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the call that starts step `number`. The trace begins with the first of the wanted steps to come."""
        if not self.wanted:
            yield
            return
        if number > self.wanted[-1] and not self._first:
            self.say(f"nothing traced: step {number} is past profile={self.wanted[0]}:{self.wanted[-1]}")
            self.wanted = None
        elif number in self.wanted and not self._first:
            jax.profiler.start_trace(str(self.folder))
            self._first = number
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield

    def after(self, number: int, result: Any) -> None:
        """Ends the trace behind the last step, when its `result` is there."""
        if self._first and self.wanted and number == self.wanted[-1]:
            jax.block_until_ready(result)
            self.close(number)

    def close(self, last: int) -> None:
        """Writes what was traced up to step `last`, where a trace is under way."""
        if not self._first:
            return
        first, self._first, self.wanted = self._first, 0, None
        jax.profiler.stop_trace()
        self.say(f"steps {first} to {last} traced into {self.folder}; open with `tensorboard --logdir {self.folder}` "
                 "(pip install tensorboard xprof), or its *.trace.json.gz with ui.perfetto.dev")  # fmt: skip

"""Whether a checkpoint fits between the notice of a preemption and the end of it."""

import time
from collections.abc import Callable


class Grace:
    """Watches what a signal has to wait for: a turn of the loop, then the writing of a checkpoint.

    A signal is looked at between steps, so what a notice must allow for is the longest turn so far (a step, or steps
    and an evaluation) and the time that the last checkpoint took until it was whole on disk.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.perf_counter):
        """`seconds` from the notice to the kill; 0: nothing is watched."""
        self.seconds, self._now = seconds, now
        self._turns = 0
        self._last = 0.0
        self.longest = 0.0
        """Seconds of the longest turn, the first left out, which compiles."""

    def turn(self, took: float | None) -> str | None:
        """Call between steps with the seconds of the last checkpoint; gives the line to say, once, where it is late."""
        now = self._now()
        if self._turns > 1:
            self.longest = max(self.longest, now - self._last)
        self._turns, self._last = self._turns + 1, now
        if took is None or not self.seconds or self.longest + took <= self.seconds:
            return None
        line = (
            f"a checkpoint may come too late for a preemption: a turn takes up to {self.longest:.3g} s and writing "
            f"{took:.3g} s, more than grace={self.seconds:g}; killed earlier, the run goes on from the checkpoint "
            "before. Ask for a longer notice and give it as --grace, or set checkpoint_every to what may be lost"
        )
        self.seconds = 0.0
        return line

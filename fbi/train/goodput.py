"""The share of a run's time that went into steps that count, over all its attempts.

goodput = useful / wall. `wall` sums the attempts, each from the call of `fbi.train` to its end, however that came;
between attempts nothing is counted. `useful` is the time of the steps that the present state is made of: from the end
of one step to the end of the next, without what stands between (compiling, evaluation, diagnostics, waiting for a
checkpoint), and without steps that were done again after a crash or a return to a checkpoint. (The term and its parts:
Google's ML Goodput.) Rows of metrics.jsonl carry both sums as of their writing, `time_useful_s` and `time_wall_s`, so
the last row tells; for an attempt that is killed a thread keeps the wall time in a file, until the run is done.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

BEAT = 1.0  # seconds between signs of life in the file
_WIDTH = 24  # bytes of the file: written over in place, so that it is never empty


class Clock:
    """Seconds of a run. As a context manager it keeps `path` (if any) up to date from `mark` on, until the run is done.

    What fails before the first step leaves no trace, and a finished run needs none.
    """

    def __init__(self, path: Path | None = None, now: Callable[[], float] = time.perf_counter):
        self.path, self._now = path, now
        self._began = self._mark = now()
        self._before = _read(path) if path else 0.0
        self._compiled = False
        self._open, self._done = False, threading.Event()
        self._thread: threading.Thread | None = None
        self.useful = 0.0
        """Of the steps that the present state is made of."""

    @property
    def wall(self) -> float:
        """Of all attempts, this one up to now."""
        return self._before + self._now() - self._began

    @property
    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return [self.useful, self.wall]

    @property
    def row(self) -> dict[str, float]:
        """What a row of metrics.jsonl gets."""
        return {"time_useful_s": self.useful, "time_wall_s": self.wall}

    def resume(self, useful: float, wall: float) -> None:
        """Goes on from a checkpoint's `state`: the steps since then are lost, their time is not."""
        self.useful = useful
        self._before += max(0.0, wall - self.wall)  # where the file is lost

    def mark(self) -> None:
        """Here steps begin."""
        self._mark = self._now()
        if self.path and self._open and not self._thread:
            self._thread = threading.Thread(target=self._beat, args=(self.path,), daemon=True)
            self._thread.start()

    def step(self) -> None:
        """A step is over, and sound: the time since the one before, or `mark`, was useful."""
        now = self._now()
        self.useful, self._mark = self.useful + now - self._mark, now

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within is no part of a step."""
        began = self._now()
        try:
            yield
        finally:
            self._mark += self._now() - began

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around the call that starts a step: the first one traces and compiles, which is no part of it."""
        with contextlib.nullcontext() if self._compiled else self.aside():
            yield
        self._compiled = True

    def __enter__(self) -> "Clock":
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self.path and self._thread:
            self._done.set()
            self._thread.join()
            self._write(self.path)
        if self.path and kind is None:
            self.path.unlink(missing_ok=True)

    def _beat(self, path: Path) -> None:
        while not self._done.is_set():
            self._write(path)
            self._done.wait(BEAT)

    def _write(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # a run does not end for that
            file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(file, f"{self.wall:0{_WIDTH - 1}.3f}\n".encode(), 0)
            finally:
                os.close(file)


def _read(path: Path) -> float:
    try:
        return max(0.0, float(path.read_text()))
    except (OSError, ValueError):
        return 0.0

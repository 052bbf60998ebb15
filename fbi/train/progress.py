"""What a person sees of a long run: a bar with rate and time left on a terminal, else a plain line now and then."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """Progress of one task. Use as a context manager; `update` may be called at every step."""

    def __init__(self, name: str, total: int, start: int = 0, *, unit: str = "step", line_every: float = 10.0):
        self.name, self.total, self.start, self.unit, self.line_every = name, total, start, unit, line_every
        self._began = self._said = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = [
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"), TimeRemainingColumn(),
            ]  # fmt: skip
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task(name, total=total, completed=start, text="")

    def __enter__(self) -> "Reporter":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def restart(self, done: int) -> None:
        """Counts on from `done`, after a resume or a return to a checkpoint."""
        self.start, self._began = done, time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the start, or the last `restart`."""
        return time.monotonic() - self._began

    def update(self, done: int, text: str = "") -> None:
        """Shows how much is done, with `text` beside it."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=self.total, text=text)
            return
        now = time.monotonic()
        if now - self._said >= self.line_every and done < self.total:
            self._said = now
            rate = (done - self.start) / max(now - self._began, 1e-9)
            left = f", {clock((self.total - done) / rate)} left" if rate > 0 else ""
            self.say(f"{self.name}: {self.unit} {done}/{self.total}{', ' + text if text else ''}{left}")

    def say(self, line: str) -> None:
        """Prints a line of its own."""
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)


class Quiet(Reporter):
    """Shows nothing: of the processes of a run one speaks."""

    def __enter__(self) -> Reporter:
        return self

    def update(self, done: int, text: str = "") -> None:
        """Does nothing."""

    def say(self, line: str) -> None:
        """Does nothing."""


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

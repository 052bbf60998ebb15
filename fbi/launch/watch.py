"""The table of a sweep while it runs: live on a terminal, a line for what changed elsewhere."""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fbi.launch.job import Job
from fbi.report.state import LOG, State, state_of, tail
from fbi.train.progress import clock

STYLES = {"running": "cyan", "done": "green", "failed": "red", "stopped": "yellow"}
HEADINGS = ("run", "state", "step", "loss", "tokens/s", "goodput", "left", "")
_ORDER = ("running", "failed", "stopped", "queued", "waiting", "done")


def states(jobs: Sequence[Job]) -> dict[Job, State]:
    """How far each job is."""
    return {job: state_of(job.directory, job.needs) for job in jobs}


def table(found: dict[Job, State], rows: int = 0) -> Table:
    """A line a run and a sum of all; of many, the `rows` that matter most now (0: all)."""
    grid = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        grid.add_column(
            heading, justify="right" if heading in ("step", "loss", "tokens/s", "goodput", "left") else "left"
        )
    shown = sorted(found.items(), key=lambda item: _ORDER.index(item[1].kind)) if rows else list(found.items())
    for job, state in shown[: rows or None]:
        grid.add_row(job.name, Text(state.kind, STYLES.get(state.kind, "")), *_numbers(state), Text(state.note))
    if rows and len(shown) > rows:
        grid.add_row(f"... {len(shown) - rows} more")
    grid.caption = summary(found)
    grid.caption_justify = "left"
    return grid


def summary(found: dict[Job, State]) -> str:
    """`7 done, 2 running, 3 queued; 0:12:00 left` - the last where the rates so far tell."""
    count = Counter(state.kind for state in found.values())
    text = ", ".join(f"{count[kind]} {kind}" for kind in reversed(_ORDER) if count[kind])
    paces = [state.pace for state in found.values() if state.pace is not None]
    if count["running"] and paces:
        open_steps = sum(s.steps - s.step for s in found.values() if s.kind in ("running", "queued", "waiting"))
        last = max(state.left or 0.0 for state in found.values())
        text += f"; about {clock(max(last, open_steps * statistics.fmean(paces) / count['running']))} left"
    return text


def _numbers(state: State) -> list[str]:
    return [
        f"{state.step}/{state.steps}" if state.steps else "",
        "" if state.loss is None else f"{state.loss:.4f}",
        "" if state.rate is None else f"{state.rate:,.0f}",
        "" if state.goodput is None else f"{state.goodput:.2f}",
        "" if state.left is None else clock(state.left),
    ]


class Watch:
    """Shows a sweep. A context manager; calling it looks at the files again, at most once a second."""

    def __init__(self, jobs: Sequence[Job], console: Console | None = None):
        self.jobs, self.console = list(jobs), console or Console()
        self.live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self.seen = {job: state.kind for job, state in states(self.jobs).items()}
        self.looked = 0.0

    def __enter__(self) -> "Watch":
        if self.live:
            self.live.start()
        else:
            self._say(summary(states(self.jobs)))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.looked = 0.0
        self()
        if self.live:
            self.live.stop()

    def __call__(self) -> None:
        """Refreshes what is shown; a failure is shown with the end of its log, once."""
        if time.monotonic() - self.looked < 1.0:
            return
        found = states(self.jobs)
        self.looked = time.monotonic()
        for job, state in found.items():
            if self.seen[job] != state.kind:
                self._changed(job, state, found)
            self.seen[job] = state.kind
        if self.live:
            self.live.update(table(found, max(4, self.console.height - 6)), refresh=True)

    def _changed(self, job: Job, state: State, found: dict[Job, State]) -> None:
        if state.kind == "failed":
            lines = "\n".join(f"  | {line}" for line in tail(job.directory / LOG, 12).splitlines())
            self._say(f"{job.name} failed: {state.note}; the end of {job.directory / LOG}:\n{lines}")
        elif not self.live and state.kind not in ("waiting", "queued"):
            loss = "" if state.loss is None else f", loss {state.loss:.4f}"
            self._say(f"{job.name} {state.kind}{loss} ({summary(found)})")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        if not self.live:
            sys.stdout.flush()

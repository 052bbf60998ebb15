"""The commands of a sweep: `fbi sweep`, `status`, `stop`, `retry`. Only `sweep` and `retry` start anything."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fbi.errors import EXIT_STOPPED, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from fbi.launch.job import Job

Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="EXPERIMENT")]
Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FIELD=VALUE")]


def sweep(
    experiment: Place,
    only: str = "*",
    assignments: Set = (),
    scale: str = "mini",
    launcher: str = "local",
    root: Path | None = None,
) -> None:
    """Train every run of an experiment that is not done yet; what was interrupted goes on where it was.

    For example: fbi sweep experiments/quest.py --only "*-s0" --launcher local:slots=2
    An experiment is a Python file with a docstring and a function runs() that returns a list of fbi.Run:
    grid(fbi.Run(steps=300), {"policy": ["fp", "fbi"]}) from fbi.experiment makes one; see CONTRIBUTING.

    Args:
        experiment: The experiment's file.
        only: Glob over the names of runs; those that the chosen ones need (teachers) come along.
        assignments: Replaces a field of every run, such as steps=10; that makes them other runs.
        scale: mini (this machine), paper (the published sizes), smoke (seconds a run).
        launcher: Where the runs are executed, with its options: local:slots=2, ray:address=auto, slurm:time=60,
            sky:bucket=NAME (writes files and starts nothing), or none, which only plans and shows the runs.
        root: The folder that gets the run directories; by default runs/NAME.
    """
    from fbi.launch import plan as planning

    planned = planning.plan(
        experiment, root, scale=scale, assignments=assignments, command=f"fbi {shlex.join(sys.argv[1:])}"
    )
    jobs = planning.jobs(planned.sweep, planned.root, only)
    planned.write()
    _launch(planned.path, jobs, launcher)


def retry(place: Place, only: str = "*", launcher: str = "local") -> None:
    """Run again what failed, from its last checkpoint.

    For example: fbi retry runs/quest --only "quest-w1*"

    Args:
        place: The folder of a sweep, its NAME.sweep.json, or the experiment's file.
        only: Glob over the names of runs.
        launcher: Where the runs are executed, as for `fbi sweep`.
    """
    from fbi.launch import plan as planning
    from fbi.report.spec import read_sweep
    from fbi.report.state import FAILED

    for path in _sweeps(place):
        jobs = planning.jobs(read_sweep(path), path.parent, only)
        failed = [job for job in jobs if (job.directory / FAILED).exists()]
        for job in failed:
            (job.directory / FAILED).unlink()
        print(f"{path}: {len(failed)} failed {'run' if len(failed) == 1 else 'runs'} of {len(jobs)} to run again")
        if failed:
            _launch(path, jobs, launcher)


def stop(place: Place, only: str = "*") -> None:
    """Ask every unfinished run of a sweep to stop with a checkpoint, wherever it is executed.

    For example: fbi stop runs/quest --only "*-s2"

    Args:
        place: The folder of a sweep, its NAME.sweep.json, or the experiment's file.
        only: Glob over the names of runs; `fbi sweep` takes them up again.
    """
    from fbi.files import write_text
    from fbi.launch import plan as planning
    from fbi.report.spec import read_sweep
    from fbi.report.state import STOP, alive

    for path in _sweeps(place):
        jobs = planning.jobs(read_sweep(path), path.parent, only, needed=False)
        asked = [job for job in jobs if not (job.directory / "done.json").exists()]
        running = sum(alive(job.directory) for job in asked)
        for job in asked:
            write_text(job.directory / STOP, "")
        print(f"{path}: {running} running asked to stop with a checkpoint, {len(asked) - running} will not be started")


def status(place: Place, only: str = "*", every: float = 0.0) -> None:
    """How far the runs of a sweep are: state, step, loss, tokens/s, time left.

    For example: fbi status runs/quest --every 2

    Args:
        place: The folder of a sweep, its NAME.sweep.json, or the experiment's file.
        only: Glob over the names of runs.
        every: Seconds between looks, live until nothing is running or Ctrl-C; 0: one look.
    """
    import time

    from fbi.launch import plan as planning
    from fbi.launch.watch import Watch, states, table
    from fbi.report.spec import read_sweep

    console = _console()
    for path in _sweeps(place):
        jobs = planning.jobs(read_sweep(path), path.parent, only)
        if every > 0:
            with Watch(jobs, console) as look:
                while any(state.kind == "running" for state in states(jobs).values()):
                    time.sleep(every)
                    look()
        console.print(f"{path}", markup=False, highlight=False)
        console.print(table(states(jobs)))


def _console() -> "Console":
    """As wide as the terminal; where the output goes elsewhere, wide enough for a table."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _sweeps(place: Path) -> list[Path]:
    """The files of the planned sweeps that a command's argument names."""
    from fbi.report.spec import find_sweeps, runs_of

    found = find_sweeps(runs_of(place))
    if not found:
        raise InputError(f"{place} holds no sweep; `fbi sweep experiments/NAME.py` plans one in runs/NAME")
    return found


def _launch(path: Path, jobs: "Sequence[Job]", launcher: str) -> None:
    """Carries jobs out, showing them; ends the command with 1 where some failed, 75 where it was stopped."""
    from fbi.launch import launchers
    from fbi.launch.conduct import conduct
    from fbi.launch.watch import states, table
    from fbi.report.state import FAILED

    if launcher == "none":
        _console().print(table(states(jobs)))
        return
    schedule = conduct(jobs, launchers.parse(launcher))
    if not schedule.over:
        return  # with a queue that outlives this process, or only written down, as the launcher has said
    found = states(jobs)
    failed = [job for job in jobs if (job.directory / FAILED).exists()]
    if failed:
        print(f"failed: {', '.join(job.name for job in failed)}; see their {failed[0].directory.parent}/*/log.txt, "
              f"then `fbi retry {path}`", file=sys.stderr)  # fmt: skip
        sys.exit(1)
    if any(state.kind != "done" for state in found.values()):
        sys.exit(EXIT_STOPPED)
    print(f"all {len(jobs)} runs are done; `fbi report {path}` shows them")

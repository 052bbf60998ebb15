"""From an experiment's module to run directories: names resolved, directories named by content, configs written."""

import dataclasses
import fnmatch
import importlib
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fbi.errors import InputError, unknown
from fbi.experiment import overlay, slug, smoke
from fbi.files import make_directory, write_json
from fbi.launch.job import Job
from fbi.report import spec
from fbi.report.spec import SUFFIX, Planned, Sweep
from fbi.train.run import FORMAT, Execution, Run
from fbi.train.run import to_json as plain

SCALES = ("mini", "paper", "smoke")
REFERENCE = "@"  # teacher="@NAME": the run of this name in the same sweep


@dataclasses.dataclass(frozen=True)
class Plan:
    """A sweep in a folder: what `NAME.sweep.json` says, and the runs by directory name."""

    root: Path
    sweep: Sweep
    runs: dict[str, Run]

    @property
    def path(self) -> Path:
        """The sweep's file."""
        return self.root / f"{self.sweep.name}{SUFFIX}"

    def write(self) -> None:
        """Writes the sweep's file and the config of every run that has none; a run's config never changes."""
        make_directory(self.root)
        for directory, run in self.runs.items():
            if not (self.root / directory / "config.json").exists():
                write_json(self.root / directory / "config.json", {"format": FORMAT, "run": plain(run)})
        write_json(self.path, spec.to_json(self.sweep))


def load_experiment(path: str | Path) -> ModuleType:
    """The module of an experiment, `experiments/x.py`; an `InputError` where it is none."""
    path = Path(path)
    if path.suffix != ".py" or not path.is_file():
        raise InputError(
            f"{path} is not an experiment: give a Python file that has runs(), such as experiments/quest.py"
        )
    folder = path.resolve().parent
    if str(folder.parent) not in sys.path:  # so that experiments may share code, as `from experiments.mini import ...`
        sys.path.insert(0, str(folder.parent))
    module = importlib.import_module(f"{folder.name}.{path.stem}")
    if Path(module.__file__ or "").resolve() != path.resolve():
        raise InputError(f"{path} is hidden by {module.__file__}, which has the same name; rename one of them")
    if not callable(getattr(module, "runs", None)):
        raise InputError(f"{path} is not an experiment: it has no function runs()")
    if not (module.__doc__ or "").strip():
        raise InputError(f"{path} needs a docstring: question, command, expected result, cost")
    return module


def plan(
    path: str | Path,
    root: Path | None = None,
    *,
    scale: str = "mini",
    assignments: Sequence[str] = (),
    command: str = "",
) -> Plan:
    """The plan of an experiment: `runs()` at its small scale, `paper()` at the paper's, `smoke` in seconds each.

    `assignments` replace fields of every run (`steps=10`), which makes them other runs. Nothing is written.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    module = load_experiment(path)
    if scale == "paper" and not hasattr(module, "paper"):
        raise InputError(f"{path} has no runs at paper scale: it has no function paper()")
    runs: list[Run] = module.paper() if scale == "paper" else module.runs()
    linked = link(runs, lambda run: overlay(smoke(run) if scale == "smoke" else run, assignments))
    directory_of = {run_name: directory for directory, (run_name, _) in linked.items()}
    needs = {run.name: tuple(directory_of[need] for need in _references(run)) for run in runs}
    name = Path(path).stem + ("" if scale == "mini" else f"-{scale}")
    text = (module.__doc__ or "").strip()
    asked: dict[str, Any] = {
        part: tuple(getattr(module, part)()) for part in ("tables", "claims", "figures") if hasattr(module, part)
    }
    sweep = Sweep(
        name=name,
        title=text.splitlines()[0].rstrip("."),
        text=text,
        command=command or f"fbi sweep {shlex.quote(str(path))}" + ("" if scale == "mini" else f" --scale {scale}"),
        runs=[Planned(n, directory, needs[n]) for n, directory in directory_of.items()],
        execution=_flags(getattr(module, "EXECUTION", Execution())),
        **asked,
    )
    return Plan(root or Path("runs") / name, sweep, {directory: run for directory, (_, run) in linked.items()})


def link(runs: Iterable[Run], change: Callable[[Run], Run] = lambda run: run) -> dict[str, tuple[str, Run]]:
    """Directory name -> (name in the experiment, run as it is trained), those that others need first.

    A directory is named by the run's name and hash, so that a changed config is another run. `teacher="@NAME"` and
    `start="@NAME"` become `../DIRECTORY` of the run of that name. `InputError` for a name that is unknown, used for two
    unlike runs, or that leads back to itself.
    """
    given: dict[str, Run] = {}
    for run in runs:
        if given.setdefault(run.name, run) != run:
            raise InputError(f"two unlike runs are named {run.name!r}; give each configuration a name of its own")
    placed: dict[str, str] = {}
    linked: dict[str, tuple[str, Run]] = {}

    def place(name: str, above: tuple[str, ...]) -> str:
        if name not in given:
            raise unknown(f"run named in {above[-1]}" if above else "run", name, given)
        if name in above:
            raise InputError(f"runs need each other in a circle: {' -> '.join([*above, name])}")
        if name not in placed:
            run = given[name]
            there = {
                field: f"../{place(value.removeprefix(REFERENCE), (*above, name))}"
                for field in ("teacher", "start")
                if (value := getattr(run, field)).startswith(REFERENCE)
            }
            run = change(dataclasses.replace(run, **there))
            placed[name] = f"{slug(run.name)}-{run.hash[:8]}"
            linked[placed[name]] = (name, run)
        return placed[name]

    for name in given:
        place(name, ())
    return linked


def _references(run: Run) -> list[str]:
    """Names of the runs that a run needs finished."""
    held = (run.teacher, run.start)
    return [value.removeprefix(REFERENCE) for value in dict.fromkeys(held) if value.startswith(REFERENCE)]


def _flags(execution: Execution) -> dict[str, Any]:
    """What differs from the default execution."""
    default = plain(Execution())
    return {name: value for name, value in plain(execution).items() if value != default[name]}


def jobs(sweep: Sweep, root: Path, only: str = "*", *, needed: bool = True) -> list[Job]:
    """The jobs of the runs whose names match a glob, and (where `needed`) of those that they need, needed ones first.

    `InputError` where none matches.
    """
    by_directory = {run.directory: run for run in sweep.runs}
    chosen: dict[str, Planned] = {}

    def choose(run: Planned) -> None:
        for need in run.needs if needed else ():
            choose(by_directory[need])
        chosen.setdefault(run.directory, run)

    for run in sweep.runs:
        if fnmatch.fnmatchcase(run.name, only):
            choose(run)
    if not chosen:
        raise InputError(f"no run of {sweep.name} matches {only!r}; it has {_some([r.name for r in sweep.runs])}")
    flags = tuple(
        text for name, value in sweep.execution.items() for text in (f"--{name.replace('_', '-')}", str(value))
    )
    return [Job(root / r.directory, flags, tuple(root / need for need in r.needs)) for r in chosen.values()]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")

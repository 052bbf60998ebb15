"""Which run is meant: a run directory, a config file, or a row of an experiment."""

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from fbi.errors import InputError, unknown
from fbi.experiment import overlay
from fbi.files import read_json
from fbi.launch.plan import SCALES, load_experiment
from fbi.train.run import Run
from fbi.train.rundir import located, parse_config, read_run


def run_of(place: Path, only: str = "*", scale: str = "paper", assignments: Sequence[str] = ()) -> Run:
    """The run of a directory, of a .json config, or the one run of an experiment (.py) at `scale` that `only` names.

    `assignments` replace fields (`data.batch=8`). `InputError` where there is none, or `only` does not name one alone.
    """
    if place.suffix == ".json":
        return overlay(parse_config(read_json(place), str(place)), assignments)
    if place.suffix != ".py":
        return overlay(located(read_run(place), place), assignments)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    module = load_experiment(place)
    if scale == "paper" and not hasattr(module, "paper"):
        raise InputError(f"{place} has no runs at paper scale: it has no function paper(); use --scale mini")
    runs: dict[str, Run] = {run.name: run for run in (module.paper() if scale == "paper" else module.runs())}
    found = [run for name, run in runs.items() if fnmatch.fnmatchcase(name, only)]
    if len(found) != 1:
        rest = f" and {len(runs) - 12} more" if len(runs) > 12 else ""
        raise InputError(
            f"--only {only!r} names {len(found)} runs of {place}; name one of {', '.join(list(runs)[:12])}{rest}"
        )
    return overlay(found[0], assignments)

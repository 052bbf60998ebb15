"""The command `fbi preflight`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fbi.errors import InputError

Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FIELD=VALUE")]
Json = Annotated[str, tyro.conf.arg(name="json", metavar="FILE")]


def run_of(place: Path, only: str, scale: str, assignments: Sequence[str]):
    """The one run that a run directory, a config file, or a row of an experiment gives, with fields replaced."""
    import fnmatch

    from fbi.experiment import overlay
    from fbi.files import read_json
    from fbi.train.rundir import located, parse_config, read_run

    if place.suffix == ".json":
        return overlay(parse_config(read_json(place), str(place)), assignments)
    if place.suffix != ".py":
        return overlay(located(read_run(place), place), assignments)
    from fbi.errors import unknown
    from fbi.launch.plan import SCALES, load_experiment

    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    module = load_experiment(place)
    if scale == "paper" and not hasattr(module, "paper"):
        raise InputError(f"{place} has no runs at paper scale: it has no function paper(); use --scale mini")
    runs = {run.name: run for run in (module.paper() if scale == "paper" else module.runs())}
    found = [run for name, run in runs.items() if fnmatch.fnmatchcase(name, only)]
    if len(found) != 1:
        raise InputError(
            f"--only {only!r} names {len(found)} runs of {place}; name one of {', '.join(list(runs)[:12])}"
            + (f" and {len(runs) - 12} more" if len(runs) > 12 else "")
        )
    return overlay(found[0], assignments)


def preflight(
    place: Place,
    target: str,
    mesh: str = "",
    accumulate: int = 0,
    remat: Literal["", "none", "products", "full"] = "",
    unroll: int = 1,
    compiler: str = "auto",
    only: str = "*",
    scale: str = "paper",
    assignments: Set = (),
    file: Json = "",
) -> None:
    """Compile a run's training step for machines that are not here: memory, collectives, time of a step, hours.

    For example: fbi preflight experiments/fbi_llm.py --only 7b --set model.dtype=bfloat16 --target v5e-64
    Nothing is loaded and no parameter is made. What is not given (mesh, accumulate, remat) is chosen by an analytic
    model, whose best layout is compiled.

    Args:
        place: A run directory, a config.json, or an experiment's file.
        target: Chips: v5e-64, v6e-256, v5p-128, v4-64 (names of TPU slices), h100x8, or cpu:8 (emulated devices).
        mesh: Axes and sizes, such as data=32,model=2; empty: suggested.
        accumulate: Parts in which a batch is computed; 0: suggested.
        remat: What the backward pass recomputes: none, products (all but matrix products), full; empty: suggested.
        unroll: Layers unrolled in one turn of the scan; more take longer to compile.
        compiler: auto (the target's own where it is installed, else the CPU's), tpu, cuda, cpu.
        only: Of an experiment: glob that names one run.
        scale: Of an experiment: paper, mini or smoke.
        assignments: Replaces a field of the run, such as data.batch=256.
        file: Where the result goes as JSON instead of tables; - is standard output.
    """
    from fbi.errors import unknown
    from fbi.files import write_text
    from fbi.preflight.targets import COMPILERS, compiler_for, parse

    if compiler not in COMPILERS:
        raise unknown("compiler", compiler, COMPILERS)
    chosen = parse(target)
    compiler_for(chosen, compiler)
    if unroll < 1:
        raise InputError(f"unroll={unroll} must be at least 1")
    run = run_of(place, only, scale, assignments)

    from fbi.preflight import report

    found = report.preflight(
        run, chosen, mesh=mesh, accumulate=accumulate, remat=remat, unroll=unroll, compiler=compiler
    )
    if file:
        text = json.dumps(found, indent=1) + "\n"
        print(text, end="") if file == "-" else write_text(Path(file), text)
        return
    if compiler == "auto" and found["compiler"] != chosen.chip.platform:
        print(f"fbi: warning: no compiler for {target} is installed; {found['compiler_said']}", file=sys.stderr)
    for table in report.tables(found):
        print(table.terminal())
    if not mesh:
        print(report.suggestion(run, chosen).terminal())

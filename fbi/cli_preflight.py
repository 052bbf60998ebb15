"""The command `fbi preflight`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fbi.errors import InputError, unknown

Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Set = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="FIELD=VALUE")]
Json = Annotated[str, tyro.conf.arg(name="json", metavar="FILE")]


def preflight(
    place: Place,
    target: str,
    mesh: str = "",
    accumulate: int = 0,
    remat: Literal["", "none", "products", "full"] = "",
    sequence: bool = False,
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
        sequence: Split the residual stream by position over the model axis.
        unroll: Layers unrolled in one turn of the scan; more take longer to compile.
        compiler: auto (the target's own where it is installed, else the CPU's), tpu, cuda, cpu.
        only: Of an experiment: glob that names one run.
        scale: Of an experiment: paper, mini or smoke.
        assignments: Replaces a field of the run, such as data.batch=256.
        file: Where the result goes as JSON instead of tables; - is standard output.
    """
    from fbi.files import write_text
    from fbi.preflight.source import run_of
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
        run, chosen, mesh=mesh, accumulate=accumulate, remat=remat, sequence=sequence, unroll=unroll, compiler=compiler,
        say=lambda text: print(f"fbi: {text}", file=sys.stderr, flush=True),
    )  # fmt: skip
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

"""The published claims in miniature: every experiment's small scale, its tables and verdicts kept under docs/results.

Question: which claims of FBI-LLM, QuEST and BitNet hold at half a million parameters, with three paired seeds?
Command: `make repro`. Runs lie in one folder, so that experiments share them; a finished run is packed into
docs/results/runs and counts as done from then on, also on another machine. Interrupted, it continues. Of LTE:
`python -m experiments.repro lte`.
Cost: at most 120 runs of about a minute on one core.

Cut to stay within 120 runs: QuEST at 3 bits, QuaRot at 2 and 4, PACT, weights alone at 2 to 4 bits, FP4 and 2:4 (the
losses; their error on Gaussian data is a test), the clip at 2.0 with Hadamard; BitNet's norm inside each layer and its
sizes beyond one. The ladder of sizes has one seed. Every method of the library at equal steps, one seed, is
`make methods-table`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fbi.errors import InputError, unknown
from fbi.files import write_json, write_text
from fbi.launch import launchers, plan
from fbi.launch.conduct import conduct
from fbi.launch.job import Job
from fbi.report import spec
from fbi.report.archive import pack, unpack
from fbi.report.page import page
from fbi.report.sweep import PACKED, claims_table, read, tables
from fbi.report.sweep_plot import plot

HERE = Path(__file__).parent
EXPERIMENTS = ("fbi_llm", "quest", "bitnet", "survey")
OTHERS = ("lte", "lte_20m")  # named on the command line, by themselves
MOST_RUNS = 120


def plans(names: Sequence[str], root: Path, scale: str = "mini") -> list[plan.Plan]:
    """The plans of these experiments in one folder; an `InputError` where one is unknown, or they are too many runs."""
    if wrong := sorted({*names} - {*EXPERIMENTS, *OTHERS}):
        raise unknown("experiment", wrong[0], [*EXPERIMENTS, *OTHERS])
    command = "make repro" if tuple(names) == EXPERIMENTS else f"python -m experiments.repro {' '.join(names)}"
    made = [plan.plan(HERE / f"{name}.py", root, scale=scale, command=command) for name in names]
    if len(runs := {directory for p in made for directory in p.runs}) > MOST_RUNS:
        raise InputError(f"{len(runs)} runs are more than the {MOST_RUNS} of `make repro`; cut claims")
    return made


def jobs(made: list[plan.Plan]) -> list[Job]:
    """Every run of all plans, each once."""
    return list({job.directory: job for p in made for job in plan.jobs(p.sweep, p.root)}.values())


def restore(wanted: list[Job], packed: Path) -> int:
    """Puts packed runs back where they are not done; those that an open run learns from are trained again."""
    closed = {job.directory for job in wanted if (job.directory / "done.json").exists()}
    kept = {job.directory: file for job in wanted if (file := packed / f"{job.name}.json").exists()}
    needed = {need for job in wanted if job.directory not in closed | kept.keys() for need in job.needs}
    back = [directory for directory in kept if directory not in closed | needed]
    for directory in back:
        unpack(kept[directory], directory)
    return len(back)


def keep(made: list[plan.Plan], out: Path) -> None:
    """Packs what is finished, and writes every experiment's sweep, tables, pictures and page."""
    for job in jobs(made):
        file = out / PACKED / f"{job.name}.json"
        if (job.directory / "done.json").exists() and not file.exists():
            pack(job.directory, file)
    for p in made:
        write_json(out / p.path.name, spec.to_json(p.sweep))
        (results,) = read(out / p.path.name)
        files, warnings = plot(results, out, [".png"])
        pictures = [f"![{path.stem}]({path.name})\n" for path in files]
        text = [f"# {p.sweep.title}\n", f"```\n{p.sweep.text}\n```\n", *(t.markdown() for t in tables(results))]
        write_text(out / f"{p.sweep.name}.md", "\n".join([*text, *pictures, *(f"{w}\n" for w in warnings)]))
        write_text(p.root / f"{p.sweep.name}.html", page(results))
    index = ["# Published claims in miniature", "", *(__doc__ or "").splitlines()[2:], ""]
    for path in sorted(out.glob("*.sweep.json")):
        (results,) = read(path)
        index += [f"[{results.sweep.title}]({results.sweep.name}.md)", "", claims_table(results).markdown()]
    write_text(out / "README.md", "\n".join(index))


def main(arguments: list[str] | None = None) -> int:
    """Trains what is not finished, then keeps what is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=f"or {', '.join(OTHERS)}")
    parser.add_argument("--root", type=Path, default=Path("runs/repro"), help="where the run directories lie")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="where finished runs are kept")
    parser.add_argument("--launcher", default="local:slots=2", help="as for `fbi sweep`")
    parser.add_argument("--scale", default="mini", choices=("mini", "smoke"), help="smoke: seconds a run")
    options = parser.parse_args(arguments)
    made = plans(options.experiments, options.root, options.scale)
    for p in made:
        p.write()
    wanted = jobs(made)
    print(f"{len(wanted)} runs, {restore(wanted, options.out / PACKED)} brought back from {options.out / PACKED}")
    schedule = conduct(wanted, launchers.parse(options.launcher))
    keep(made, options.out)
    print(f"tables, pictures and verdicts in {options.out}")
    return 0 if set(schedule.outcomes.values()) <= {"done"} else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"repro: error: {error}")

"""QuEST's scaling law (arXiv 2502.05003, section 4.3) fitted to an own ladder of sizes.

Question: does the order of the published efficiencies eff(P), of 1, 2 and 4 bits against full precision, show in three
sizes of a model that trains in a minute? The ladder keeps the tokens per parameter, so that A, alpha, B, beta and E
cannot be told apart; eff is given with E held at several shares of the least loss, and with bootstrap intervals.
Command: python -m experiments.quest_ladder docs/results/quest.sweep.json --out docs/results
Expected: eff(4) > eff(2) > eff(1); the values themselves do not carry over from models a hundred times as large.
Cost: seconds, after the runs of experiments/quest.py.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.quest_law import PUBLISHED
from fbi.analysis.scaling import Law, Observation, fit
from fbi.analysis.scaling_report import Resampled, bootstrap
from fbi.errors import InputError
from fbi.files import write_text
from fbi.model.config import ModelConfig, count_parameters
from fbi.report.measure import Found, measure
from fbi.report.sweep import read
from fbi.report.table import Column, Table

REFERENCE = "fp"
PRECISIONS = {"quest-w4a4": "QuEST 4", "quest-w2a2": "QuEST 2", "quest-w1a1": "QuEST 1"}
FLOORS = (0.0, 0.3, 0.6, 0.9)  # E, as shares of the least loss
_RUNG = re.compile(r"-l\d+$")


def observation(run: Found) -> Observation | None:
    """A finished run of the ladder; None for any other."""
    precision, loss = _RUNG.sub("", run.group), measure(run.record, "loss")
    if loss is None or precision not in (REFERENCE, *PRECISIONS):
        return None
    config = run.record.config
    tokens = config["steps"] * config["data"]["batch"] * config["data"]["window"]
    return Observation(count_parameters(ModelConfig(**config["model"])).non_embedding, tokens, precision, loss)


def table(runs: Sequence[Observation], resamples: int = 200) -> Table:
    """A row a precision: eff with E at each floor, its interval at the first, the published one of 30M to 800M."""
    least = min(run.loss for run in runs)
    laws = [fit(runs, reference=REFERENCE, fixed_E=share * least) for share in FLOORS]
    resampled = bootstrap(runs, laws[0], resamples=resamples)
    rows = [_row(precision, laws, resampled) for precision in PRECISIONS]
    columns = [Column("activations and weights"), *(Column(f"eff, E = {law.E:.2f}", ".3f") for law in laws),
               Column("95% interval, E = 0"), Column("published")]  # fmt: skip
    sizes = sorted({round(run.parameters) for run in runs})
    note = (
        f"{len(runs)} runs of {', '.join(f'{n:,}' for n in sizes)} parameters in the blocks, "
        f"{runs[0].tokens / runs[0].parameters:.2f} tokens per parameter; root mean square of the log residuals "
        f"{', '.join(f'{law.rmse:.4f}' for law in laws)}; alpha {', '.join(f'{law.alpha:.3g}' for law in laws)} "
        "(near 0, parameters hardly count in the law, and an efficiency, which multiplies them, is not identified)"
    )
    return Table(columns, rows, "QuEST: efficiency of a bit-width on an own ladder of sizes", [note])


def _row(precision: str, laws: Sequence[Law], resampled: Resampled) -> list[str | int | float | None]:
    low, high = resampled.eff(precision)
    published = f"{PUBLISHED.eff[PRECISIONS[precision]]:.3f}"
    return [precision, *(law.eff[precision] for law in laws), f"{low:.3f} ... {high:.3f}", published]


def main(arguments: list[str] | None = None) -> int:
    """Fits, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, help="folder or file of the sweep, as for `fbi table`")
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap refits behind the intervals")
    parser.add_argument("--out", type=Path, help="directory for quest_ladder.md")
    options = parser.parse_args(arguments)
    found = [run for results in read(options.sweep) for run in results.found]
    made = table([one for run in found if (one := observation(run))], options.resamples)
    print(made.terminal())
    if options.out:
        write_text(options.out / "quest_ladder.md", made.markdown())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"quest_ladder: error: {error}")

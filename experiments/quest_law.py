"""QuEST's scaling law, refitted to the authors' own 104 runs, with the intervals that the paper does not give.

Question: which of the law's numbers do the runs fix, and does 4 bits win? (arXiv 2502.05003; runs in `data/`.)
Command: `python experiments/quest_law.py [--out DIR]` (Markdown, PNG and PDF). Cost: half a minute on one core.
Expected: eff 0.020, 0.156, 0.430, 0.690, 1.002 at 1, 2, 3, 4, 8 bits, within 4 % of the published; least squares in
place of the Huber loss gives the published numbers themselves (the notebook scales its residuals by 1e-3 and leaves
scipy's Huber threshold at 1, so that none reaches it). With E held at 0 to 1.9, alpha triples, while eff at 2 to 8 bits
moves by at most 9 % (by 43 % at 1 bit), and 4 bits hold most per bit of memory throughout.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fbi.analysis.scaling import STARTS, Law, Observation, Start, fit
from fbi.analysis.scaling_report import Interval, Resampled, bootstrap, optimum, profile, threshold
from fbi.errors import InputError
from fbi.files import make_directory, write_text
from fbi.report.figure import COLOURS, GREY, MARKERS, SUFFIXES
from fbi.report.table import Column, Table

RUNS = Path(__file__).parent / "data" / "quest_runs.json"
REFERENCE = "BF16"
QUEST, PLAIN, WEIGHTS = ([f"{name} {b}" for b in bits] for name, bits in (
    ("QuEST", (1, 2, 3, 4, 8)), ("no Hadamard", (1, 2, 3, 4, 8)), ("weight only", (1, 2, 3, 4))
))  # fmt: skip
# Weights and activations alike, whose products are as cheap as their bits say: what the paper compares.
FAMILY = [*QUEST, "FP4", "2:4 INT4", REFERENCE]
BITS = {name: float(name.split()[-1]) for name in (*QUEST, *PLAIN, *WEIGHTS)} | {
    "FP4": 4.0, "2:4 INT4": 2.5, REFERENCE: 16.0,
}  # fmt: skip
PUBLISHED = Law(  # the authors' notebook, notebooks/plots.ipynb
    A=8.1340, alpha=0.062727, B=86.412, beta=0.241288, E=0.0014233, reference=REFERENCE,
    eff={
        "QuEST 1": 0.0205, "QuEST 2": 0.1519, "QuEST 3": 0.4331, "QuEST 4": 0.6918, "QuEST 8": 1.0162, "FP4": 0.6296,
        "2:4 INT4": 0.3812, "no Hadamard 1": 0.0156, "no Hadamard 2": 0.0784, "no Hadamard 3": 0.3221,
        "no Hadamard 4": 0.6033, "no Hadamard 8": 0.9376, "weight only 1": 0.1384, "weight only 2": 0.4137,
        "weight only 3": 0.6531, "weight only 4": 0.8404, REFERENCE: 1.0,
    },
)  # fmt: skip
SIZES = (1.6e9, 14e9, 112e9)  # bits of memory; the paper's figure is at 14 Gb


def scheme(run: dict[str, Any]) -> str:
    """How a run was quantized. Classes called Half... stay in the rotated basis: the same values, one scheme."""
    weights, activations = run["w_quant"], run["a_quant"]
    if weights == activations == "NoQuantizer":
        return REFERENCE
    if "FP4" in weights:
        return "FP4"
    if "FourEight" in weights:  # two of four in the paper, four of eight in pairs in the code
        return "2:4 INT4"
    if activations == "NoQuantizer":
        return f"weight only {run['w_bits']}"
    return f"{'QuEST' if 'Hadamard' in weights else 'no Hadamard'} {run['w_bits']}"


def observations() -> list[Observation]:
    """The 104 runs, precision = scheme."""
    return [
        Observation(run["non_embedding_parameters"], run["tokens"], scheme(run), run["loss"])
        for run in json.loads(RUNS.read_text())
    ]


def efficiencies(runs: Sequence[Observation], law: Law, squares: Law, resampled: Resampled) -> Table:
    """eff of every scheme, beside the published."""
    counts = Counter(run.precision for run in runs)
    rows = []
    for name in PUBLISHED.eff:
        low, high = resampled.eff(name) if name != REFERENCE else (None, None)
        eff = law.eff[name]
        rows.append([name, BITS[name], counts[name], eff, low, high, squares.eff[name], PUBLISHED.eff[name],
                     100 * (eff / PUBLISHED.eff[name] - 1)])  # fmt: skip
    columns = [Column("scheme"), Column("bits", "g"), Column("runs", "d"), Column("eff", ".4f"), Column("from", ".4f"),
               Column("to", ".4f"), Column("least squares", ".4f"), Column("published", ".4f"),
               Column("off by %", "+.1f")]  # fmt: skip
    notes = [f"from, to: 95 % of {len(resampled.laws)} bootstrap refits; eff and 'off by' are the Huber fit's."]
    return Table(columns, rows, "Efficiencies: parameters of the reference that one parameter is worth", notes)


def laws(runs: Sequence[Observation], law: Law, squares: Law, floors: Sequence[Law], alone: Law) -> Table:
    """The constants of each fit, of the law with E held, and of the reference runs alone."""
    rmse = float(np.sqrt(np.mean(PUBLISHED.residuals(runs) ** 2)))
    named = [("Huber", law, law.rmse), ("least squares", squares, squares.rmse), ("published", PUBLISHED, rmse),
             *((f"E held at {each.E:g}", each, each.rmse) for each in floors),
             (f"{REFERENCE} runs alone", alone, alone.rmse)]  # fmt: skip
    rows = [
        [name, each.A, each.alpha, each.B, each.beta, each.E, error, *(each.eff.get(scheme) for scheme in QUEST)]
        for name, each, error in named
    ]
    columns = [Column("fit"), Column("A", ".3f"), Column("alpha", ".4f"), Column("B", ".2f"), Column("beta", ".4f"),
               Column("E", ".4f"), Column("RMSE of log loss", ".4f"),
               *(Column(name.replace("QuEST", "eff"), ".3f") for name in QUEST)]  # fmt: skip
    notes = [
        "E is not identified: all runs together put it at its bound, 0, and fit worse the higher it is held; "
        f"the {REFERENCE} runs alone, of one D/N, put it at {alone.E:.1f}. With it A, alpha and every extrapolation "
        "are left open; eff moves little."
    ]
    return Table(columns, rows, "The law, and what is left of it when E is held", notes)


def densities(law: Law, resampled: Resampled, floors: Sequence[Law]) -> Table:
    """Which precision holds most model per bit."""
    rows = [
        [row.precision, row.bits, 16 * row.per_bit, *(16 * end for end in row.interval or (0.0, 0.0)), row.wins]
        for row in optimum(law, resampled, among=FAMILY, bits=BITS)
    ]
    columns = [Column("scheme"), Column("bits", "g"), Column("16 eff/bits", ".2f"), Column("from", ".2f"),
               Column("to", ".2f"), Column("best in", ".0%")]  # fmt: skip
    best = [f"{optimum(each, among=FAMILY, bits=BITS)[0].precision} at E = {each.E:g}" for each in floors]
    notes = ["best in: share of the bootstrap refits in which the scheme is the first.", f"First: {', '.join(best)}."]
    return Table(columns, rows, "Model per bit of memory, in units of 16-bit weights", notes)


def overtaking(law: Law, resampled: Resampled, floors: Sequence[Law]) -> Table:
    """From which D/N on 4 bits beat 8 bits of the same size and cost, by each fit."""

    def least(each: Law, memory: float) -> float:
        try:
            return threshold(each, "QuEST 4", "QuEST 8", memory, bits=BITS)
        except InputError:  # no crossing: 8 bits hold more per bit in this law
            return float("inf")

    rows = []
    for memory in SIZES:
        low, high = resampled.interval(lambda each, memory=memory: least(each, memory))
        held = [least(each, memory) for each in floors]
        rows.append([memory / 1e9, memory / 8e9, least(law, memory), low, high, least(PUBLISHED, memory), min(held),
                     max(held)])  # fmt: skip
    columns = [Column("weights, Gb", "g"), Column("8-bit parameters, B", "g"), Column("D/N", ".1f"),
               Column("from", ".1f"), Column("to", ".1f"), Column("by the published law", ".1f"),
               Column("least, E held", ".1f"), Column("most, E held", ".1f")]  # fmt: skip
    notes = [
        "D/N of the 8-bit model; the 4-bit one has twice its parameters, half its tokens. The paper: about 30 at 14 Gb."
    ]
    return Table(columns, rows, "Tokens per parameter above which 4 bits beat 8 at equal size and training cost", notes)


def picture(runs: Sequence[Observation], law: Law, resampled: Resampled) -> Figure:
    """Losses against size with the law through them; efficiencies against bits with their intervals."""
    figure = Figure(figsize=(11.0, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, runs, law)
    families = [("weights only", WEIGHTS, -0.1), ("QuEST", QUEST, 0.0), ("no Hadamard", PLAIN, 0.1),
                ("FP4", ["FP4"], 0.2), ("2:4 INT4", ["2:4 INT4"], 0.0)]  # fmt: skip
    for index, (label, names, shift) in enumerate(families):
        _draw_eff(right, law, resampled, label, names, index, shift)
    right.plot([], [], color="black", marker="_", markersize=9, linestyle="none", label="published")
    right.axhline(1.0, color=GREY, linestyle=":", linewidth=1.0)
    right.set_xlabel("bits")
    right.set_ylabel("eff: worth of a parameter, in BF16 parameters")
    right.set_yscale("log")
    right.set_yticks([0.01, 0.03, 0.1, 0.3, 1.0], ["0.01", "0.03", "0.1", "0.3", "1"])
    right.set_xticks([1, 2, 3, 4, 8])
    right.set_title("Efficiency, with 95 % intervals", loc="left", fontsize="medium")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_losses(axes: Axes, runs: Sequence[Observation], law: Law) -> None:
    """Runs near 100 tokens per parameter, on which the line is; those of 25 and 50 off it, hollow, without a line."""
    for index, name in enumerate([*QUEST, REFERENCE]):
        size = 9 if name == "QuEST 8" else 6  # the reference lies on it
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        mine = sorted((r.parameters, r.tokens / r.parameters, r.loss) for r in runs if r.precision == name)
        full = [(n, loss) for n, ratio, loss in mine if ratio > 90]
        less = [(n, loss) for n, ratio, loss in mine if ratio <= 90]
        axes.plot(*zip(*full, strict=True), color=colour, marker=marker, markersize=size, linestyle="none", label=name)
        if less:
            axes.plot(*zip(*less, strict=True), color=colour, marker=marker, linestyle="none", markerfacecolor="none",
                      markersize=4, alpha=0.7)  # fmt: skip
        sizes = np.geomspace(min(full)[0], max(full)[0], 50)
        axes.plot(sizes, law.predict(sizes, 98 * sizes, name), color=colour, linewidth=1.2)
    axes.set_xscale("log")
    ticks = {3e7: "30M", 5e7: "50M", 1e8: "100M", 2e8: "200M", 4e8: "400M", 8e8: "800M"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("parameters without embeddings and head")
    axes.set_ylabel("C4 loss (nats per token)")
    axes.set_title("Runs at 98 tokens per parameter and the law (hollow: 25 and 50)", loc="left", fontsize="medium")
    axes.legend(frameon=False, ncols=2)


def _draw_eff(
    axes: Axes, law: Law, resampled: Resampled, label: str, names: Sequence[str], index: int, shift: float
) -> None:
    """One family's efficiencies, a little apart from the others' at the same bits."""
    intervals: list[Interval] = [resampled.eff(name) for name in names]
    eff = [law.eff[name] for name in names]
    bars = [[max(e - i.low, 0.0) for e, i in zip(eff, intervals, strict=True)],
            [max(i.high - e, 0.0) for e, i in zip(eff, intervals, strict=True)]]  # fmt: skip
    places = [BITS[name] + shift for name in names]
    axes.errorbar(places, eff, yerr=bars, color=COLOURS[index], marker=MARKERS[index], markersize=5, linewidth=1.0,
                  capsize=3, label=label)  # fmt: skip
    axes.plot(places, [PUBLISHED.eff[name] for name in names], color="black", marker="_", markersize=9,
              linestyle="none", zorder=5)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Fits, prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap refits behind the intervals")
    parser.add_argument("--starts", type=int, default=len(STARTS), help="starts of each fit, the first of the grid")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--out", type=Path, help="directory for quest_law.md, .png and .pdf")
    options = parser.parse_args(arguments)
    starts: Sequence[Start] = STARTS[: options.starts]
    runs = observations()
    law, squares = (fit(runs, reference=REFERENCE, starts=starts, delta=delta) for delta in (1e-3, 1.0))
    alone = fit([run for run in runs if run.precision == REFERENCE], reference=REFERENCE, starts=starts)
    resampled = bootstrap(runs, law, resamples=options.resamples, seed=options.seed)
    floors = profile(runs, law, starts=starts)
    tables = [efficiencies(runs, law, squares, resampled), laws(runs, law, squares, floors, alone),
              densities(law, resampled, floors), overtaking(law, resampled, floors)]  # fmt: skip
    print("\n".join(table.terminal() for table in tables))
    if options.out:
        make_directory(options.out)
        write_text(options.out / "quest_law.md", "\n".join(table.markdown() for table in tables))
        figure = picture(runs, law, resampled)
        for suffix in (".png", ".pdf"):
            figure.savefig(options.out / f"quest_law{suffix}", dpi=160, metadata=SUFFIXES[suffix])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pictures of runs, as PNG, PDF or SVG by the suffix of the path. Each function also returns its figure."""

import itertools
import math
import os
import re
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D

from fbi.errors import InputError
from fbi.report.figure import GREY, MARKERS, new_figure, save, short, style
from fbi.report.runs import Row, RunRecord, number, points


def curves(records: Sequence[RunRecord], path: str | os.PathLike[str]) -> Figure:
    """Training loss (raw faint, smoothed strong) and validation of each run, above its teacher's entropy."""
    figure = new_figure(7.2, 4.6)
    axes = figure.add_subplot()
    _draw_losses(axes, records)
    handles = _legend(records)
    figure.legend(handles=handles, loc="outside lower center", ncols=_columns(handles, 7.2), frameon=False)
    return save(figure, path)


def scales(records: Sequence[RunRecord], path: str | os.PathLike[str]) -> Figure:
    """Learned alpha and beta of every layer and site, mean and standard deviation, of each run that has them."""
    found = _with_scales(records)
    figure = new_figure(9.6, 0.6 + 3.2 * len(found))
    for index, record in enumerate(found):
        alpha, beta = (figure.add_subplot(len(found), 2, 2 * index + i) for i in (1, 2))
        _draw_scales(alpha, record, "alpha")
        _draw_scales(beta, record, "beta")
        alpha.set_title(f"{short(record.name, 28)}: alpha", loc="left")
        beta.set_title(f"{short(record.name, 28)}: beta", loc="left")
    _site_legend(figure, found, 7)
    return save(figure, path)


def demo_figure(records: Sequence[RunRecord], path: str | os.PathLike[str]) -> Figure:
    """Losses of all runs beside the scales of the first that learned some; the titles say what to see."""
    record = _with_scales(records)[0]
    figure = new_figure(12.0, 5.8)
    grid = GridSpec(1, 2, figure, width_ratios=(7, 5))
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    losses = left.add_subplot()
    _draw_losses(losses, records)
    losses.set_title(_headline(records), loc="left", fontsize="medium")
    handles = _legend(records)
    left.legend(handles=handles, loc="outside lower center", ncols=_columns(handles, 7.0), frameon=False)
    alpha, beta = right.add_subplot(2, 1, 1), right.add_subplot(2, 1, 2)
    relative = _draw_scales(alpha, record, "alpha")
    _draw_scales(beta, record, "beta")
    says = "ends at {low:.2f} to {high:.2f} times its start" if relative else "ends at {low:.2g} to {high:.2g}"
    alpha.set_title(f"Learned scale of {short(record.name, 24)}: alpha\n{_range(alpha, says)}", loc="left",
                    fontsize="medium")  # fmt: skip
    beta.set_title(f"Learned shift: beta {_range(beta, 'ends at {low:.2g} to {high:.2g}')}", loc="left",
                   fontsize="medium")  # fmt: skip
    _site_legend(right, [record], 4)
    return save(figure, path)


def smooth(values: Sequence[float]) -> list[float]:
    """The centred moving average over about a fifteenth of the values; towards the ends over fewer, so never late."""
    reach, last = len(values) // 30, len(values) - 1
    spans = [(index, min(reach, index, last - index)) for index in range(len(values))]
    return [statistics.fmean(values[index - span : index + span + 1]) for index, span in spans]


def _draw_losses(axes: Axes, records: Sequence[RunRecord]) -> None:
    """Lines have the gid `NAME:raw`, `:train`, `:validation`, `:floor`."""
    drawn: list[float] = []
    for index, record in enumerate(records):
        colour, marker = style(index)
        steps, losses = points(record.train, "loss")
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8, gid=f"{record.name}:raw")
        axes.plot(steps, smooth(losses), color=colour, linewidth=1.8, gid=f"{record.name}:train")
        floor_steps, floor = points(record.train, "floor")
        if floor:
            axes.plot(floor_steps, smooth(floor), color=colour, linestyle="--", linewidth=1.2,
                      gid=f"{record.name}:floor")  # fmt: skip
        at, validation = points(record.evaluations(), "loss")
        axes.plot(at, validation, color=colour, marker=marker, linestyle="none", markersize=6,
                  markeredgecolor="white", gid=f"{record.name}:validation")  # fmt: skip
        drawn += losses + validation + floor
    if not drawn:
        raise InputError(f"no losses to draw in {', '.join(str(r.directory) for r in records) or 'no runs'}; "
                         "wait for the first rows of metrics")  # fmt: skip
    entropies = _entropies(records)
    for entropy in entropies:
        axes.axhline(entropy, color=GREY, linestyle=":", linewidth=1.4, gid="unigram")
    if entropies and max(drawn) > 2 * max(entropies):  # a burst must not flatten all else
        axes.set_ylim(top=1.3 * max(entropies))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _entropies(records: Sequence[RunRecord]) -> list[float]:
    return sorted({round(r.unigram_entropy, 6) for r in records if r.unigram_entropy is not None})


def _legend(records: Sequence[RunRecord]) -> list[Line2D]:
    """Colours say which run, strokes say what of it."""
    handles = []
    for index, record in enumerate(records):
        colour, marker = style(index)
        handles.append(Line2D([], [], color=colour, marker=marker, markeredgecolor="white", linewidth=1.8,
                              label=short(record.name, 32)))  # fmt: skip
    if any(points(r.train, "loss")[0] for r in records):
        handles.append(Line2D([], [], color=GREY, linewidth=1.8, label="training loss"))
    if any(points(r.evaluations(), "loss")[0] for r in records):
        handles.append(Line2D([], [], color=GREY, marker="o", linestyle="none", label="validation loss"))
    if any(points(r.train, "floor")[0] for r in records):
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1.2, label="floor: the teacher's entropy"))
    if entropies := _entropies(records):
        values = ", ".join(f"{entropy:.2f}" for entropy in entropies)
        handles.append(Line2D([], [], color=GREY, linestyle=":", linewidth=1.4, label=f"unigram entropy, {values}"))
    return handles


def _columns(handles: Sequence[Line2D], inches: float) -> int:
    """As many columns of the legend as the figure's width has room for."""
    widest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(len(handles), int(inches / (0.7 + 0.085 * widest))))


def _headline(records: Sequence[RunRecord]) -> str:
    """Where the runs end on held-out text, in words."""
    ends = sorted((losses[-1], r.name) for r in records if (losses := points(r.evaluations(), "loss")[1]))
    if not ends:
        return "Training loss"
    (low, best), (high, worst) = ends[0], ends[-1]
    text = f"Held-out text: {short(best, 32)} ends at {low:.3f} nats/token"
    if len(ends) > 1:
        text += f",\n{short(worst, 32)} at {high:.3f}"
    if entropies := _entropies(records):
        gap = min(entropies) - high
        text += (", " if len(ends) > 1 else ",\n") + ("all at least " if len(ends) > 1 and gap >= 0 else "")
        text += f"{abs(gap):.2f} {'below' if gap >= 0 else 'above'} the unigram entropy"
    return text


def _with_scales(records: Sequence[RunRecord]) -> list[RunRecord]:
    found = [record for record in records if record.rows.get("scales")]
    if not found:
        raise InputError(f"no learned scales in {', '.join(str(r.directory) for r in records) or 'no runs'}; a run has "
                         "them where its policy learns scales, as fbi does")  # fmt: skip
    return found


def _first_and_last(record: RunRecord) -> tuple[dict[str, Row], dict[str, Row]]:
    """The scales of each site at step 0 and at the last step that has any."""
    rows = record.rows["scales"]
    last = max(row["step"] for row in rows)
    return tuple({row["site"]: row for row in rows if row["step"] == step} for step in (0, last))  # type: ignore[return-value]


def _place(site: str) -> tuple[int | None, str]:
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", site)
    return (int(found[1]), found[2]) if found else (None, site)


def _kinds(records: Sequence[RunRecord]) -> list[str]:
    """Names of sites within a layer, in the order of the rows."""
    return list(dict.fromkeys(_place(row["site"])[1] for record in records for row in record.rows["scales"]))


def _draw_scales(axes: Axes, record: RunRecord, field: str) -> bool:
    """Mean and deviation by layer, a line a site (gid: the site within its layer); whether in units of its start."""
    start, last = _first_and_last(record)
    unit: dict[str, float] = {}
    if field == "alpha":
        unit = {site: mean for site, row in start.items() if (mean := _value(row, field, "mean"))}
    relative = bool(last) and last.keys() <= unit.keys() and start is not last
    kinds = _kinds([record])
    layers = 1 + max((layer for site in last if (layer := _place(site)[0]) is not None), default=-1)
    single = [site for site in last if _place(site)[0] is None]  # such as the head: after the layers
    for index, kind in enumerate(kinds):
        sites = [site for site in last if _place(site)[1] == kind and _value(last[site], field, "mean") is not None]
        by = {site: unit[site] if relative else 1.0 for site in sites}
        shift = 0.5 * ((index + 0.5) / len(kinds) - 0.5)  # side by side, so that no bar hides another
        place = [layer if (layer := _place(site)[0]) is not None else layers + single.index(site) for site in sites]
        colour, marker = style(index)
        axes.errorbar(
            [x + shift for x in place],
            [(_value(last[site], field, "mean") or 0.0) / by[site] for site in sites],
            yerr=[(_value(last[site], field, "std") or 0.0) / abs(by[site]) for site in sites],
            color=colour, marker=marker, markersize=4, linewidth=1.0, elinewidth=0.8, gid=kind,
        )  # fmt: skip
    count = layers + len(single)
    shown = range(0, layers, max(1, math.ceil(layers / 12)))
    axes.set_xticks([*shown, *range(layers, count)], [*map(str, shown), *single])
    axes.set_xlim(-0.5, max(count, 1) - 0.5)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{field} / {field} at step 0" if relative else f"{field} (units of the weight)")
    axes.axhline(1.0 if relative else 0.0, color=GREY, linewidth=0.8, linestyle=":")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return relative


def _value(row: Row, field: str, statistic: str) -> float | None:
    found = row.get(field)
    return number(found.get(statistic)) if isinstance(found, dict) else None


def _range(axes: Axes, text: str) -> str:
    """`text` with the least and greatest mean drawn."""
    drawn = [line.get_ydata() for line in axes.get_lines() if line.get_marker() in MARKERS]
    values = [float(value) for value in itertools.chain.from_iterable(drawn)]  # type: ignore[arg-type]
    return text.format(low=min(values), high=max(values)) if values else "not learned"


def _site_legend(figure: Figure | SubFigure, records: Sequence[RunRecord], columns: int) -> None:
    handles = []
    for index, kind in enumerate(_kinds(records)):
        colour, marker = style(index)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1.0, label=kind))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), columns), frameon=False,
                  fontsize="small", handletextpad=0.4, columnspacing=1.0)  # fmt: skip

"""The pictures that an experiment asks for: one measure against another, or curves of training, with seed spreads."""

import os
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from fbi.errors import InputError
from fbi.report import spec
from fbi.report.figure import new_figure, save, short, style
from fbi.report.measure import Found, sample, select
from fbi.report.plot import smooth
from fbi.report.runs import number, points
from fbi.report.sweep import Results

MOST_LINES = 14  # of a picture that nobody asked for
_ROOM = (70, 9)  # pixels that a name takes up, at matplotlib's 100 to the inch


def draw(figure: spec.Figure, found: Sequence[Found], path: str | os.PathLike[str] | None = None) -> Canvas:
    """The figure, saved to `path` where that is given; an `InputError` where none of its runs has anything to draw."""
    canvas = new_figure(7.2, 4.8)
    axes = canvas.add_subplot()
    axes.set_xscale("log" if figure.log_x else "linear")
    drawn = KINDS.get(figure.kind, _measures)(axes, figure, found)
    if not drawn:
        raise InputError(f"figure {figure.name!r}: none of its runs has {figure.y!r} yet; wait for the first to finish")
    axes.set_xlabel(figure.x_label or {"curves": "training step", "layers": "layer"}.get(figure.kind, figure.x))
    axes.set_ylabel(figure.y_label)
    axes.set_title(figure.title, loc="left", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if drawn > 1 or figure.kind != "scatter":
        canvas.legend(loc="outside lower center", ncols=min(4, drawn), frameon=False, fontsize="small")
    return canvas if path is None else save(canvas, path)


def _measures(axes, figure: spec.Figure, found: Sequence[Found]) -> int:
    """Points with error bars: a configuration each, mean and standard deviation over its seeds."""
    drawn, named = 0, []
    for index, line in enumerate(figure.lines):
        colour, marker = style(index)
        groups: dict[str, list[Found]] = {}
        for run in select(found, line.runs):
            groups.setdefault(run.group, []).append(run)
        at = []
        for name, runs in groups.items():
            x, y = sample(runs, figure.x), sample(runs, figure.y)
            if x.mean is not None and y.mean is not None:
                at.append((x.mean, y.mean, y.spread or 0.0, name))
        if not at:
            continue
        at.sort()
        xs, ys, spreads, names = zip(*at, strict=True)
        joined = "-" if figure.kind == "line" else "none"
        axes.errorbar(xs, ys, yerr=spreads, color=colour, marker=marker, linestyle=joined, markersize=5, capsize=2,
                      label=line.label, gid=line.label)  # fmt: skip
        if figure.kind == "scatter":
            named += zip(xs, ys, names, strict=True)
        drawn += 1
    _label(axes, named)
    return drawn


def _label(axes, named: Sequence[tuple[float, float, str]]) -> None:
    """Writes names beside points, where no name stands yet: in a crowd the first of each spot speaks for it."""
    placed: list[tuple[float, float]] = []
    for x, y, name in named:
        across, down = axes.transData.transform((x, y))
        if all(abs(across - a) > _ROOM[0] or abs(down - d) > _ROOM[1] for a, d in placed):
            axes.annotate(short(name, 24), (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6)
            placed.append((across, down))


def _curves(axes, figure: spec.Figure, found: Sequence[Found]) -> int:
    """Training curves, smoothed; a line a run, a colour a series."""
    kind, _, field = figure.y.partition(".") if "." in figure.y else ("train", "", figure.y)
    drawn = 0
    for index, line in enumerate(figure.lines):
        colour, _ = style(index)
        label = line.label
        for run in select(found, line.runs):
            rows = [row for row in run.record.rows.get(kind, ()) if row.get("site", "all") == "all"]
            steps, values = points(rows, field)
            if values:
                axes.plot(steps, smooth(values), color=colour, linewidth=1.2, alpha=0.85, label=label)
                label = None
        drawn += label is None
    return drawn


def _layers(axes, figure: spec.Figure, found: Sequence[Found]) -> int:
    """A field by layer at the last step that has it: the mean over seeds, and their standard deviation."""
    kind, _, field = figure.y.partition(".")
    drawn = 0
    for index, line in enumerate(figure.lines):
        by_layer: dict[int, list[float]] = {}
        for run in select(found, line.runs):
            rows = run.record.rows.get(kind, ())
            for row in rows:
                layer, value = re.match(r"layers\.(\d+)\.", str(row.get("site"))), number(row.get(field))
                if layer and value is not None and row["step"] == rows[-1]["step"]:
                    by_layer.setdefault(int(layer[1]), []).append(value)
        if not by_layer:
            continue
        colour, marker = style(index)
        layers = sorted(by_layer)
        means = [statistics.fmean(by_layer[layer]) for layer in layers]
        spreads = [statistics.stdev(v) if len(v := by_layer[layer]) > 1 else 0.0 for layer in layers]
        axes.errorbar(layers, means, yerr=spreads, color=colour, marker=marker, markersize=5, capsize=2,
                      label=line.label, gid=line.label)  # fmt: skip
        axes.xaxis.get_major_locator().set_params(integer=True)
        drawn += 1
    return drawn


KINDS = {"curves": _curves, "layers": _layers}


def figures(results: Results) -> list[spec.Figure]:
    """What the experiment asks for; of a sweep that asks for none, the curves of its configurations."""
    if results.sweep.figures:
        return list(results.sweep.figures)
    groups = list(dict.fromkeys(run.group for run in results.found))[:MOST_LINES]
    lines = [spec.Line(short(group, 40), group) for group in groups]
    return [spec.Figure("curves", results.sweep.title, lines, kind="curves", y="loss", y_label="loss (nats/token)")]


def plot(results: Results, folder: Path, suffixes: Sequence[str] = (".png", ".pdf")) -> tuple[list[Path], list[str]]:
    """Draws every figure into `folder`, one file a suffix; returns the files, and why some could not be drawn."""
    files, warnings = [], []
    for figure in figures(results):
        try:
            canvas = draw(figure, results.found)
        except InputError as error:
            warnings.append(str(error))
            continue
        for suffix in suffixes:
            save(canvas, folder / f"{results.sweep.name}-{figure.name}{suffix}")
            files.append(folder / f"{results.sweep.name}-{figure.name}{suffix}")
    return files, warnings

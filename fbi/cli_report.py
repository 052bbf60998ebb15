"""The commands that read runs: `fbi table`, `plot`, `report`, `show`. Reading runs never loads jax."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

Place = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP")]


def table(place: Place, form: Literal["terminal", "markdown", "latex", "csv"] = "terminal") -> None:
    """The tables of a sweep: own values and spread over seeds, published values, claims with verdicts.

    For example: fbi table runs/quest --form latex

    Args:
        place: A folder with a NAME.sweep.json, that file, an experiment's file, or any folder of run directories.
        form: How they are written.
    """
    import shutil

    from fbi.report.sweep import tables

    for results in _read(place):
        for made in tables(results):
            if form == "terminal":
                width = shutil.get_terminal_size((160, 40)).columns if sys.stdout.isatty() else 0
                print(made.terminal(width))
            else:
                print({"markdown": made.markdown, "latex": made.latex, "csv": made.csv}[form]())


def plot(place: Place, out: Path | None = None) -> None:
    """The pictures of a sweep, as PNG and PDF.

    For example: fbi plot runs/quest --out pictures

    Args:
        place: As for `fbi table`.
        out: The folder for them; by default `figures` beside the runs.
    """
    from fbi.report.sweep_plot import plot

    for results in _read(place):
        files, warnings = plot(results, out or results.root / "figures")
        print("\n".join(map(str, files)))
        for warning in warnings:
            print(f"fbi: warning: {warning}", file=sys.stderr)


def report(place: Place, out: Path | None = None) -> None:
    """One self-contained HTML page of a sweep: claims, tables, pictures, every run's curve and config.

    For example: fbi report runs/quest --out quest.html

    Args:
        place: As for `fbi table`.
        out: The file; by default NAME.html beside the runs.
    """
    from fbi.files import write_text
    from fbi.report.page import page

    for results in _read(place):
        path = out or results.root / f"{results.sweep.name}.html"
        write_text(path, page(results))
        print(path)


def show(
    place: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
    picture: str = "curves.png",
    scale: str = "paper",
    mesh: str = "data=128",
    chip: str = "v5p",
    utilisation: float = 0.4,
) -> None:
    """A run's configuration, progress and losses, with its curves; or what an experiment's planned runs would take.

    For example: fbi show runs/first; fbi show experiments/quest.py --mesh data=64 --chip h100

    Args:
        place: A run directory, or an experiment's file.
        picture: Of a run: file name of the picture in its directory; empty for none.
        scale: Of an experiment: paper, mini or smoke.
        mesh: Of an experiment: axes and sizes of the devices that it would run on.
        chip: Of an experiment: v5e, v5p, v6e or h100.
        utilisation: Of an experiment: the share of the chips' peak that its steps would reach.
    """
    if place.suffix != ".py":
        from fbi.report.show import show

        show(place, picture=picture or None)
        return
    from fbi.launch.outlay import table

    print(table(place, scale, mesh, chip, utilisation).terminal())


def _read(place: Path):
    from fbi.report.spec import runs_of
    from fbi.report.sweep import read

    found = read(runs_of(place))
    for results in found:
        for warning in results.warnings:
            print(f"fbi: warning: {warning}", file=sys.stderr)
    return found

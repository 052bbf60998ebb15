"""Tables: the numbers formatted once, then shown in a terminal, as Markdown, CSV or LaTeX."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from fbi.report.runs import RunRecord, number

Cell = str | float | int | None

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip


class Column(NamedTuple):
    """A heading, and the format of its numbers (`.3f`); empty for a column of text."""

    name: str
    form: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under columns; None is shown as `-`. `notes` are lines below it."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    notes: Sequence[str] = ()

    def cells(self) -> list[list[str]]:
        """Every cell as every renderer shows it."""
        return [[_text(cell, c.form) for cell, c in zip(row, self.columns, strict=True)] for row in self.rows]

    def terminal(self, width: int = 0, *, unicode: bool = True) -> str:
        """For a terminal of `width` columns; 0 for as wide as it needs.

        Text and headings are folded to fit; where that is not enough, each row is shown as a list of its cells.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table as Grid
        from rich.text import Text

        cells = self.cells()
        least = [_least(column, [row[i] for row in cells]) for i, column in enumerate(self.columns)]
        if width and sum(least) + 3 * len(least) > width:
            return self._listed(cells)
        grid = Grid(box=box.SIMPLE_HEAD if unicode else box.ASCII2, title=Text(self.title) if self.title else None,
                    title_justify="left", pad_edge=False)  # fmt: skip
        for column, room in zip(self.columns, least, strict=True):
            justify = "right" if column.form else "left"
            grid.add_column(Text(column.name), justify=justify, min_width=room, overflow="fold")
        for row in cells:
            grid.add_row(*map(Text, row))
        out = io.StringIO()
        Console(file=out, width=width or 10_000, color_system=None).print(grid)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        return "\n".join([*filter(None, lines), *self.notes]) + "\n"

    def _listed(self, cells: list[list[str]]) -> str:
        """A line a cell, an empty line between rows."""
        room = max(len(column.name) for column in self.columns)
        lines = [self.title] if self.title else []
        for row in cells:
            lines += [*(f"{c.name:<{room}}  {cell}" for c, cell in zip(self.columns, row, strict=True)), ""]
        return "\n".join([*lines, *self.notes]).rstrip("\n") + "\n"

    def markdown(self) -> str:
        """A Markdown table; the title as bold text, the notes below."""
        clean = lambda text: text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")  # noqa: E731
        lines = [[column.name for column in self.columns], *self.cells()]
        body = ["| " + " | ".join(map(clean, line)) + " |" for line in lines]
        body.insert(1, "| " + " | ".join("---:" if column.form else "---" for column in self.columns) + " |")
        head, tail = ([f"**{self.title}**", ""] if self.title else []), (["", *self.notes] if self.notes else [])
        return "\n".join([*head, *body, *tail]) + "\n"

    def csv(self) -> str:
        """Comma-separated values under the column names, without title and notes."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([[column.name for column in self.columns], *self.cells()])
        return out.getvalue()

    def latex(self) -> str:
        """A LaTeX table (with `booktabs`), the title as its caption and the notes as a last paragraph."""
        line = lambda cells: " & ".join(map(_latex, cells)) + r" \\"  # noqa: E731
        kinds = "".join("r" if column.form else "l" for column in self.columns)
        return "\n".join([
            r"\begin{table}",
            r"\centering",
            *([rf"\caption{{{_latex(self.title)}}}"] if self.title else []),
            rf"\begin{{tabular}}{{{kinds}}}",
            r"\toprule",
            line(column.name for column in self.columns),
            r"\midrule",
            *map(line, self.cells()),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\small {_latex(note)}" for note in self.notes),
            r"\end{table}",
        ]) + "\n"  # fmt: skip


def _text(cell: Cell, form: str) -> str:
    if cell is None:
        return "-"
    return format(cell, form) if isinstance(cell, int | float) else cell


def _least(column: Column, cells: Sequence[str]) -> int:
    """The least legible width: whole numbers, whole words of the heading, 12 characters of text."""
    longest = max(map(len, cells), default=0)
    return max([longest if column.form else min(longest, 12), *map(len, column.name.split())])


def _latex(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)


RUN_COLUMNS = (
    Column("run"),
    Column("policy"),
    Column("loss"),
    Column("parameters (M)", ".2f"),
    Column("stored bits/weight", ".3f"),
    Column("MB", ".3f"),
    Column("validation nats/token", ".4f"),
    Column("perplexity", ".2f"),
    Column("bits/byte", ".4f"),
    Column("train tokens/s", ".0f"),
    Column("goodput", ".3f"),
    Column("directory"),
)


def run_table(records: Sequence[RunRecord], title: str = "") -> Table:
    """A row a run: what it is, what it costs, its last validation, median speed, goodput, and where it lies."""
    notes = [f"unigram entropy: {_entropies(records)} nats/token"] if _entropies(records) else []
    if going := [f"{r.name} (step {r.step} of {r.steps})" for r in records if r.done is None]:
        notes.append(f"not finished: {', '.join(going)}")
    return Table(RUN_COLUMNS, [_run_row(record) for record in records], title, notes)


def _run_row(record: RunRecord) -> list[Cell]:
    validation = record.evaluations()
    last = validation[-1] if validation else {}
    speeds = [speed for row in record.train if (speed := number(row.get("time_tokens_per_s"))) is not None]
    parameters = number(record.summary.get("parameters"))
    loss = record.config.get("loss")
    return [
        record.name,
        str(record.config.get("policy", "-")),
        loss if isinstance(loss, str) else None,
        None if parameters is None else parameters / 1e6,
        number(record.summary.get("stored_bits_per_weight")),
        number(record.summary.get("stored_megabytes")),
        number(last.get("loss")),
        number(last.get("perplexity")),
        number(last.get("bits_per_byte")),
        statistics.median(speeds) if speeds else None,
        record.goodput,
        str(record.directory),
    ]


def _entropies(records: Sequence[RunRecord]) -> str:
    """The unigram entropy; where runs have unlike data, each with the names of its runs."""
    by_value: dict[str, list[str]] = {}
    for record in records:
        if record.unigram_entropy is not None:
            by_value.setdefault(f"{record.unigram_entropy:.4f}", []).append(record.name)
    if len(by_value) <= 1:
        return "".join(by_value)
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())

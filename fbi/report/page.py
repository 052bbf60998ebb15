"""A sweep as one self-contained HTML page: claims, tables, pictures, every run's curve and config."""

import base64
import io
import json
from collections.abc import Sequence
from html import escape

from fbi.errors import InputError
from fbi.report.measure import Found
from fbi.report.runs import RunRecord, points
from fbi.report.sweep import Results, tables
from fbi.report.sweep_plot import draw, figures
from fbi.report.table import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre, code { font: 13px/1.4 ui-monospace, monospace; background: #f4f4f4; } pre { padding: .7rem; overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; } caption { text-align: left; font-weight: 600; }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } img { max-width: 100%; } summary { cursor: pointer; }
.reproduced { color: #007a3d; } .not-reproduced { color: #c0392b; } .not-resolved, .pending { color: #8a6d00; }
.runs { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: .5rem 1.5rem; }
"""
_VERDICTS = ("reproduced", "not reproduced", "not resolved", "pending")
_WIDE, _HIGH = 300, 90  # of a run's curve, in pixels


def page(results: Results) -> str:
    """The page as HTML, with pictures inside; opens without a network."""
    sweep = results.sweep
    parts = [f"<h1>{escape(sweep.title)}</h1>"]
    if sweep.command:
        parts.append(f"<p>Made by</p><pre>{escape(sweep.command)}</pre>")
    if sweep.text:
        parts.append(f"<pre>{escape(sweep.text)}</pre>")
    made = tables(results)
    parts += [_table(table) for table in reversed(made)]  # the claims first
    parts += _figures(results)
    parts += [f"<p>Left out: {escape(warning)}</p>" for warning in results.warnings]
    parts += ["<h2>Runs</h2>", _versions(results.found), '<div class="runs">', *map(_run, results.found), "</div>"]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(sweep.title)}</title>'
    return "\n".join([head, f"<style>{_STYLE}</style>", *parts, "</html>"]) + "\n"


def _table(table: Table) -> str:
    heads = "".join(f"<th>{escape(column.name)}</th>" for column in table.columns)
    rows = ["".join(_cell(cell, bool(c.form)) for cell, c in zip(row, table.columns, strict=True))
            for row in table.cells()]  # fmt: skip
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    notes = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return f"<table><caption>{escape(table.title)}</caption><tr>{heads}</tr>\n{body}</table>{notes}"


def _cell(text: str, numeric: bool) -> str:
    kind = "n" if numeric else text.replace(" ", "-") if text in _VERDICTS else ""
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def _figures(results: Results) -> list[str]:
    parts = []
    for figure in figures(results):
        out = io.BytesIO()
        try:
            draw(figure, results.found).savefig(out, format="png", dpi=130, metadata={"Software": None})
        except InputError as error:
            parts.append(f"<p>{escape(str(error))}</p>")
            continue
        data = base64.b64encode(out.getvalue()).decode()
        parts.append(f'<p><img alt="{escape(figure.title)}" src="data:image/png;base64,{data}"></p>')
    return parts


def _run(run: Found) -> str:
    """A run: its name, its curve, and what it was, folded."""
    record = run.record
    done = record.done or {}
    state = f"{done['loss']:.4f} nats/token" if "loss" in done else f"step {record.step} of {record.steps or '?'}"
    config = escape(json.dumps(record.config, indent=1))
    return (
        f'<div id="{escape(run.name)}"><b>{escape(run.name)}</b> {escape(state)}<br>{_curve(record)}'
        f"<details><summary>{escape(str(record.directory))}</summary><pre>{config}</pre></details></div>"
    )


def _curve(record: RunRecord) -> str:
    """Training loss as a line of its own, axes labelled by their ends."""
    steps, losses = points(record.train, "loss")
    if len(losses) < 2:
        return ""
    low, high = min(losses), max(losses)
    across, down = _WIDE / max(1, steps[-1] - steps[0]), (_HIGH - 20) / (high - low or 1.0)
    at = " ".join(
        f"{(s - steps[0]) * across:.1f},{5 + (high - v) * down:.1f}" for s, v in zip(steps, losses, strict=True)
    )
    text = f'<text x="0" y="{_HIGH - 2}" font-size="10">{high:.3f} to {low:.3f} by step {steps[-1]}</text>'
    line = f'<polyline points="{at}" fill="none" stroke="#0072B2"/>'
    return f'<svg width="{_WIDE}" height="{_HIGH}" viewBox="0 0 {_WIDE} {_HIGH}">{line}{text}</svg>'


def _versions(found: Sequence[Found]) -> str:
    """The versions, commits and machines that the runs name."""
    lines: dict[str, set[str]] = {}
    for run in found:
        env = run.record.env
        for name, value in {**dict(env.get("versions") or {}), "commit": env.get("commit")}.items():
            lines.setdefault(name, set()).add(str(value))
        lines.setdefault("devices", set()).update(map(str, env.get("devices") or ()))
    text = "\n".join(f"{name}: {', '.join(sorted(values))}" for name, values in lines.items())
    return f"<details><summary>versions</summary><pre>{escape(text)}</pre></details>" if text else ""

"""One run in the terminal: what it is, how far it is, how it goes."""

import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fbi.report.runs import RunRecord, points, read_run

_BLOCKS = {True: " ▁▂▃▄▅▆▇█", False: " .:#"}
_EVENTS = 8  # the last ones


def show(directory: str | os.PathLike[str], *, picture: str | os.PathLike[str] | None = "curves.png") -> None:
    """Prints the run in `directory`, and draws its losses into `picture` (a name in the directory); None draws none."""
    record = read_run(directory)
    encoding = sys.stdout.encoding or "ascii"
    text = describe(record, unicode=_can("█…", encoding))
    for warning in record.warnings:
        print(f"fbi: warning: {warning}", file=sys.stderr)
    print(text if _can(text, encoding) else text.encode(encoding, "replace").decode(encoding))
    if picture is not None and (points(record.train, "loss")[0] or points(record.evaluations(), "loss")[0]):
        from fbi.report.plot import curves

        path = Path(directory) / picture
        curves([record], path)
        print(f"picture    {path}")


def describe(record: RunRecord, *, width: int = 72, unicode: bool = True) -> str:
    """The text of `show`, at most about `width` columns wide."""
    lines = [f"{record.name}  ({record.directory})", *_config(record, width), _progress(record)]
    lines += _losses("training", record.train)
    for split in dict.fromkeys(str(row.get("split", "validation")) for row in record.rows.get("eval", ())):
        lines += _losses(split, record.evaluations(split))
    if record.unigram_entropy is not None:
        lines.append(f"{'unigram':<10} {record.unigram_entropy:.4f} nats/token, the entropy of single tokens")
    events = record.rows.get("event", ())
    if len(events) > _EVENTS:
        lines.append(f"{len(events) - _EVENTS} earlier events")
    lines += [f"{'event':<10} step {e.get('step', '-')}: {e.get('what', '')} {e.get('text', '')}".rstrip()
              for e in events[-_EVENTS:]]  # fmt: skip
    steps, losses = points(record.train, "loss")
    if len(losses) > 1:
        lines += ["", *chart(steps, losses, width=width, unicode=unicode)]
    return "\n".join(lines)


def chart(steps: Sequence[int], values: Sequence[float], *, width: int, height: int = 8, unicode: bool) -> list[str]:
    """Columns of blocks, each as high as the mean of its stretch of steps; the axis begins below the least."""
    blocks = _BLOCKS[unicode]
    room = min(width - 9, len(values))
    first, last = steps[0], steps[-1]
    bins: list[list[float]] = [[] for _ in range(room)]
    for step, value in zip(steps, values, strict=True):
        bins[min(room - 1, (step - first) * room // max(1, last - first))].append(value)
    means: list[float] = []
    for held in bins:  # a stretch without rows keeps the height before it
        means.append(statistics.fmean(held) if held else means[-1])
    low, high = min(means), max(means)
    base = low - 0.1 * (high - low or 1.0)
    grain = len(blocks) - 1
    heights = [round((mean - base) / (high - base) * height * grain) if high > base else 1 for mean in means]
    lines = []
    for row in reversed(range(height)):
        mark = f"{base + (high - base) * (row + 1) / height:7.3f} " if row in (height - 1, height // 2) else " " * 8
        bar = "".join(blocks[max(0, min(grain, h - row * grain))] for h in heights)
        lines.append((mark + bar).rstrip())
    ends = f"{first}{f'step {last}':>{max(1, room - len(str(first)))}}"
    return [*lines, f"{base:7.3f} {ends}", "        training loss (nats/token) by step"]


def _can(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _config(record: RunRecord, width: int) -> list[str]:
    """Each field of the config on a line; of the nested ones what fits."""
    lines = []
    for field, value in record.config.items():
        if field in ("name", "steps") or value in (None, "", {}):
            continue
        text = _flat(value)
        lines.append(f"{field:<10} {text if len(text) <= width - 11 else text[: width - 14] + '...'}")
    return lines


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_flat(part)}" for key, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _progress(record: RunRecord) -> str:
    """Step of steps, speed, and the time that is left at this speed."""
    text = f"{'progress':<10} step {record.step} of {record.steps or '?'}"
    if record.steps:
        text += f" ({100 * record.step / record.steps:.0f}%)"
    if tokens := points(record.train, "tokens")[1]:
        text += f", {tokens[-1] / 1e6:.2f}M tokens"
    if speeds := points(record.train, "time_tokens_per_s")[1]:
        text += f", {statistics.median(speeds):.0f} tokens/s"
    times = points(record.train, "time_step_s")[1]
    if times:
        text += f", {statistics.median(times):.3g} s/step"
    if record.goodput is not None:
        text += f", goodput {record.goodput:.2f}"
    if record.done is not None:
        return text + ", finished"
    if times and record.steps:
        text += f", {_duration((record.steps - record.step) * statistics.median(times))} left"
    return text


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _losses(kind: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    steps, losses = points(rows, "loss")
    if not losses:
        return [f"{kind:<10} no loss yet"] if kind == "training" else []
    best = min(range(len(losses)), key=losses.__getitem__)
    line = f"{kind:<10} first {losses[0]:.4f}, last {losses[-1]:.4f}, best {losses[best]:.4f} (step {steps[best]})"
    shown = (("perplexity", "perplexity"), ("bits_per_byte", "bits/byte"))
    extra = [f"{name} {values[-1]:.4g}" for field, name in shown if (values := points(rows, field)[1])]
    return [f"{line}; last {', '.join(extra)}" if extra else line]

"""The demo: what one bit costs, on real text, in minutes.

A full-precision teacher, a binarized student by cross-entropy, a binarized student by distillation.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

from fbi.files import content_hash, read_json, write_json, write_text
from fbi.report.plot import demo_figure
from fbi.report.runs import read_run
from fbi.report.table import Table, run_table
from fbi.train.run import Execution, Run

PROMPT = "The people of the United States"
SAMPLE_TOKENS = 160


def runs(directory: Path, steps: int) -> list[Run]:
    """The three runs, at equal steps and data; the students start from the same weights."""
    teacher = Run(name="teacher", policy="fp", loss="ce", steps=steps)
    return [
        teacher,
        dataclasses.replace(teacher, name="fbi-ce", policy="fbi"),
        dataclasses.replace(teacher, name="fbi-ad", policy="fbi", loss="ad", teacher=str(directory / "teacher")),
    ]


def demo(directory: Path, steps: int, execution: Execution, say: Callable[[str], None] = print) -> list[Path]:
    """Carries out what is not done yet, prints table, text and paths; returns the files written."""
    began = time.monotonic()
    directory = directory.absolute()
    planned = runs(directory, steps)
    for run in planned:
        if not (directory / run.name / "done.json").exists():
            say(f"{run.name}: policy {run.policy}, loss {run.loss}, {steps} steps -> {directory / run.name}")
        from fbi.train import train  # a finished demo is shown without loading jax

        train(run, directory / run.name, execution)
    samples = _samples(directory, planned)
    records = [read_run(directory / run.name) for run in planned]
    table = run_table(records, title="What one bit costs: State of the Union speeches, validation 1997-2013")
    files = _write(directory, table, samples)
    demo_figure(records, directory / "demo.png")
    for name, text in samples.items():
        say(f"\n{name} continues {PROMPT!r}:\n{text}")
    say("\n" + table.terminal())
    say("\n" + "\n".join(["wrote:", *(f"  {path}" for path in [*files, directory / "demo.png"])]))
    say(f"{time.monotonic() - began:.0f} s")
    return [*files, directory / "demo.png"]


def _samples(directory: Path, planned: list[Run]) -> dict[str, str]:
    """A paragraph from each model, made once."""
    path, key = directory / "samples.json", content_hash([run.hash for run in planned])
    if path.exists() and (found := read_json(path)).get("runs") == key:
        return found["text"]
    from fbi.evaluate.generate import generate
    from fbi.train import load

    text = {}
    for run in planned:
        model, params, tokenizer = load(directory / run.name)
        text[run.name] = PROMPT + generate(
            model, params, tokenizer, PROMPT, tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.9, seed=0
        )
    write_json(path, {"runs": key, "text": text})
    return text


def _write(directory: Path, table: Table, samples: dict[str, str]) -> list[Path]:
    lines = ["# fbi demo", "", table.markdown(), "", "![curves](demo.png)", ""]
    for name, text in samples.items():
        lines += [f"**{name}**", "", "> " + text.replace("\n", "\n> "), ""]
    write_text(directory / "demo.md", "\n".join(lines))
    write_text(directory / "table.csv", table.csv())
    return [directory / "demo.md", directory / "table.csv", directory / "samples.json"]

"""The table of the paper-scale presets: `make preflight` compiles what is not there yet and writes docs/preflight.md.

Each entry is a file of its own, kept while its run, target and compilers stay what they are; so an interrupted table
goes on where it was. An entry is compiled by a process of its own, as the command that is printed beside it.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fbi.errors import EXIT_INPUT, InputError
from fbi.files import content_hash, make_directory, read_json, write_json, write_text
from fbi.preflight.source import run_of
from fbi.report.table import Column, Table

GIB = 2**30
LONGEST = 3600  # seconds of one entry


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run of an experiment at paper scale, in bfloat16, on targets."""

    name: str
    experiment: str
    only: str
    targets: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def arguments(self, target: str) -> list[str]:
        """Of `fbi preflight`."""
        settings = ["model.dtype=bfloat16", *self.settings]
        return [self.experiment, "--only", self.only, *(w for s in settings for w in ("--set", s)), "--target", target]


_ALONE = ("loss=ce", "teacher=")
ENTRIES = (
    Entry("FBI-LLM 130M", "experiments/fbi_llm.py", "130m", ("v5e-8", "v5e-16", "v6e-8", "h100x8"), _ALONE),
    Entry("FBI-LLM 1.3B", "experiments/fbi_llm.py", "1.3b", ("v5e-16", "v5e-64", "v6e-16", "h100x8"), _ALONE),
    Entry("FBI-LLM 7B", "experiments/fbi_llm.py", "7b", ("v5e-64", "v6e-64", "v5p-128", "h100x8"), _ALONE),
    Entry("FBI-LLM 7B, Llama-2-7B teacher", "experiments/fbi_llm.py", "7b", ("v5e-64", "v6e-64", "v5p-128", "h100x8")),
    Entry("BitNet b1.58 3B", "experiments/bitnet.py", "b158-3b", ("v5e-32", "v6e-32", "v5p-64", "h100x8")),
    Entry("QuEST 800M W4A4", "experiments/quest.py", "w4a4-800m", ("v5e-16", "v6e-16", "v5p-16", "h100x8")),
)


def key_of(entry: Entry, target: str) -> str:
    """What an entry's file is good for: run, target, compilers."""
    run = run_of(Path(entry.experiment), entry.only, "paper", ["model.dtype=bfloat16", *entry.settings])
    versions = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = ""
    return content_hash({"run": run.hash, "target": target, "versions": versions})


def file_of(folder: Path, entry: Entry, target: str) -> Path:
    """Where an entry is kept."""
    name = "-".join(entry.name.lower().replace(",", "").split())
    return folder / f"{name}-{target}.json"


def fill(folder: Path, entries: Sequence[Entry] = ENTRIES, only: str = "", most: int = 0) -> int:
    """Compiles the entries that are not there (of those whose name or target holds `only`, `most` at most: 0, all).

    Returns how many it compiled. One that is refused (too large, a compiler that is missing) is kept as its one line;
    one that fails is said, and left for the next time. `InputError` at the end where any failed.
    """
    make_directory(folder)
    done, failed = 0, 0
    for entry in entries:
        for target in entry.targets:
            path, key = file_of(folder, entry, target), key_of(entry, target)
            if only not in f"{entry.name} {target}" or (path.exists() and read_json(path).get("key") == key):
                continue
            if most and done == most:
                return done
            print(f"{entry.name} on {target} ...", flush=True)
            try:
                told = compiled(entry.arguments(target))
            except InputError as error:
                print(error, flush=True)
                failed += 1
                continue
            write_json(path, {"key": key, "entry": entry.name, "target": target, **told})
            done += 1
    if failed:
        raise InputError(f"{failed} entries failed, {done} compiled")
    return done


def compiled(arguments: Sequence[str]) -> dict[str, Any]:
    """What `fbi preflight` says with these arguments, in a process of its own: `found`, or `refused` in one line."""
    command = [sys.executable, "-m", "fbi", "preflight", *arguments, "--json", "-"]
    began = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LONGEST)
    told = {"arguments": list(arguments), "process_s": time.perf_counter() - began}
    if ended.returncode == EXIT_INPUT:
        return told | {"refused": ended.stderr.strip().splitlines()[-1].removeprefix("fbi: error: ")}
    if ended.returncode:
        last = ended.stderr[-500:]
        raise InputError(f"fbi preflight {' '.join(arguments)} ended with code {ended.returncode}: {last}")
    return told | {"found": json.loads(ended.stdout)}


COLUMNS = (
    Column("run"), Column("target"), Column("chips", "d"), Column("compiler"), Column("mesh"),
    Column("accumulate", "d"), Column("remat"), Column("peak GiB", ".2f"), Column("of", ".1f"),
    Column("estimated", ".2f"), Column("GiB sent", ",.1f"), Column("estimated", ",.1f"), Column("roofline s", ".3g"),
    Column("bound by"), Column("MFU at most", ".0%"), Column("tokens/s", ",.0f"), Column("chip-hours", ",.3g"),
    Column("compile s", ".0f"),
)  # fmt: skip


def page(folder: Path, entries: Sequence[Entry] = ENTRIES) -> str:
    """The table of what is there, as Markdown."""
    rows, refused, missing, warnings = [], [], [], []
    for entry in entries:
        for target in entry.targets:
            path = file_of(folder, entry, target)
            held = read_json(path) if path.exists() else {}
            if "found" in held:
                rows.append(_row(entry, held["found"]))
                warnings += [f"- {entry.name} on {target}: {text}" for text in held["found"]["warnings"]]
            elif "refused" in held:
                refused.append(f"- {entry.name} on {target}: {held['refused']}")
            else:
                missing.append(f"{entry.name} on {target}")
    notes = [
        "Peak: arguments, temporaries and code of one device, by the named compiler, against what a program may use. "
        "Sent: by one device in a step, read from the compiled program. The estimates beside them are those of the "
        "analytic model by which mesh, parts and remat were chosen. The roofline is the slowest of arithmetic, memory "
        "and links, the others hidden behind it: a bound, not a forecast. Checkpoints, evaluation, input are left out."
    ]
    parts = [
        "# Preflight of the paper-scale runs",
        "Made by `make preflight`, which goes on where it was interrupted. Nothing here ran on the hardware it names.",
        Table(COLUMNS, rows, notes=notes).markdown(),
    ]
    for title, lines in (("Warnings", warnings), ("Refused", refused), ("Not compiled yet", missing)):
        if lines:
            parts += [f"## {title}", "\n".join(lines) if title != "Not compiled yet" else ", ".join(lines) + "."]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _row(entry: Entry, found: dict[str, Any]) -> list[Any]:
    memory = found["memory"]
    return [
        entry.name, found["target"], found["chips"], found["compiler"], found["mesh"], found["accumulate"],
        found["remat"], memory["peak"] / GIB, (memory["limit"] or 0) / GIB, memory["estimated_peak"] / GIB,
        sum(c["sent"] for c in found["collectives"]) / GIB, found["estimated_sent"] / GIB, found["step_s"],
        found["bound"], found["mfu_bound"], found["tokens_per_s"], found["chip_hours"], found["seconds"]["compile"],
    ]  # fmt: skip


def main() -> None:
    """Fills the folder of entries and writes the page."""
    parser = argparse.ArgumentParser(description="Compile the paper-scale presets for their targets.")
    parser.add_argument("--folder", type=Path, default=Path("docs/preflight"))
    parser.add_argument("--page", type=Path, default=Path("docs/preflight.md"))
    parser.add_argument("--only", default="", help="entries whose name or target holds this")
    parser.add_argument("--most", type=int, default=0, help="entries to compile at most; 0: all")
    given = parser.parse_args()
    try:
        print(f"{fill(given.folder, only=given.only, most=given.most)} compiled")
    except InputError as error:
        sys.exit(f"preflight: error: {error}")
    finally:
        write_text(given.page, page(given.folder))


if __name__ == "__main__":
    main()

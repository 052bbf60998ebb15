"""A finished run as one small JSON file, to be kept and committed; everything but its weights."""

import json
from pathlib import Path
from typing import Any

from fbi.errors import InputError
from fbi.files import make_directory, read_json, write_json, write_text
from fbi.report.runs import RunRecord, by_kind, read_run

FORMAT = 1
_PARTS = ("config", "env", "summary", "done")


def pack(directory: Path, file: Path) -> None:
    """Writes what the finished run in `directory` says into `file`; an `InputError` where it is not finished."""
    if read_run(directory).done is None:
        raise InputError(f"{directory} is not finished; finish it with `fbi train {directory}`")
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    parts = {name: read_json(directory / f"{name}.json") for name in _PARTS}
    content = {"format": FORMAT, **parts, "metrics": [json.loads(line) for line in lines if line.strip()]}
    rows = ",\n".join(json.dumps(row) for row in content.pop("metrics"))
    head = json.dumps(content, indent=1)
    write_text(file, f'{head[:-2]},\n "metrics": [\n{rows}\n]\n}}\n')


def unpack(file: Path, directory: Path) -> None:
    """Puts the files of a packed run back, without checkpoints: it counts as done, and cannot teach."""
    content = _content(file)
    make_directory(directory)
    write_text(directory / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in content["metrics"]))
    for name in _PARTS:  # done.json last: before it the run is not done
        write_json(directory / f"{name}.json", content[name])


def record_of(file: Path) -> RunRecord:
    """The record of a packed run, as `read_run` gives it; its directory is the file."""
    content = _content(file)
    rows = by_kind(content["metrics"])
    return RunRecord(file, content["config"]["run"], content["env"], rows, content["done"], content["summary"])


def _content(file: Path) -> dict[str, Any]:
    """What a packed run holds; an `InputError` where the file is none."""
    content = read_json(file)
    parts = {*_PARTS, "metrics"}
    if not isinstance(content, dict) or content.get("format") != FORMAT or not parts <= content.keys():
        raise InputError(f"{file} is not a packed run of format {FORMAT}; pack it anew")
    return content

"""How long the commands that read runs take over 200 run directories of 100 rows each, beside reading their bytes.

For example: python benchmarks/reports.py --runs 200
"""

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fbi.files import write_json
from fbi.report.spec import Claim, Figure, Line, Planned, Row, Sweep, TableSpec, to_json


def write(root: Path, count: int, rows: int) -> int:
    """A sweep of `count` runs, three seeds a configuration; returns its bytes."""
    groups = [f"c{index}" for index in range(math.ceil(count / 3))]
    names = [f"{group}-s{seed}" for group in groups for seed in range(3)][:count]
    for index, name in enumerate(names):
        folder = root / f"{name}-0000"
        folder.mkdir(parents=True)
        config = {"name": name, "policy": "fbi", "loss": "ce", "steps": 10 * rows, "model": {"dim": 128}}
        (folder / "config.json").write_text(json.dumps({"format": 1, "run": config}))
        (folder / "summary.json").write_text(json.dumps({"stored_bits_per_weight": 1 + index % 16}))
        loss = 3.5 + index % 7 / 10
        (folder / "done.json").write_text(json.dumps({"steps": 10 * rows, "loss": loss}))
        lines = [
            json.dumps({"kind": "train", "step": 10 * n, "tokens": 4096 * n, "loss": loss + 3 / n, "ce": loss + 3 / n,
                        "grad_norm": 0.7, "lr": 1e-3, "time_step_s": 0.2, "time_tokens_per_s": 2e4})
            for n in range(1, rows + 1)
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    table = TableSpec("All", [Row(group, group) for group in groups], baseline=groups[0])
    claims = [Claim(f"{a} below {b}", "none", a, b) for a, b in itertools.pairwise(groups)]
    figures = [
        Figure("bits", "Bits", [Line("all", "*")]),
        Figure("curves", "Curves", [Line("all", "c1*")], kind="curves"),
    ]
    planned = [Planned(name, f"{name}-0000") for name in names]
    write_json(
        root / "bench.sweep.json", to_json(Sweep("bench", "Bench", "", "", planned, {}, [table], claims, figures))
    )
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def main() -> None:
    """Prints medians in seconds, and each as a multiple of an empty Python that reads the same bytes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        size = write(root, options.runs, options.rows)
        floor = f"from pathlib import Path; [p.read_bytes() for p in Path({str(root)!r}).rglob('*') if p.is_file()]"
        commands = {"read the bytes": ["-c", floor]}
        commands |= {name: ["-m", "fbi", name, str(root)] for name in ("table", "plot", "report", "status")}
        print(f"{options.runs} runs, {size / 1e6:.1f} MB, medians of {options.repeats}")
        least = None
        for name, arguments in commands.items():
            times = []
            for _ in range(options.repeats):
                began = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
                times.append(time.perf_counter() - began)
            median = statistics.median(times)
            least = least or median
            print(f"{name:16s} {median:6.2f} s  {median / least:6.1f}x")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

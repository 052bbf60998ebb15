"""What a student loses, and gains in speed, that learns from a table of its teacher instead of the teacher itself.

    python benchmarks/offline_teacher.py [--seeds 3] [--tables 64,64:16] [--steps 400] [--root runs/offline]

The miniature of experiments/fbi_llm.py: for each seed a full-precision teacher, then its fully binarized students by
autoregressive distillation (FBI-LLM, arXiv 2407.07093, eq. 7): one with the teacher in memory, one from each table
(`64`: its 64 likeliest tokens; `64:16`: 16 of the 64 drawn from the others). Prints held-out losses and their
differences to the live teacher's, by seed, the bytes that a token takes on disk, and tokens/s as the record has them
(medians of rows, without the first; runs of one seed take turns, one process each). Interrupted it goes on; needs about
two minutes a seed and table.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

EVERY = 20  # steps of a row of the record


def fbi(*arguments: object) -> None:
    """One command of the library, in a process of its own; ends with it where it fails."""
    done = subprocess.run([sys.executable, "-m", "fbi", *map(str, arguments)], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def train(directory: Path, steps: int, *fields: str) -> float:
    """Trains the small model with these fields; its held-out loss, nats/token."""
    settings = ["model=nano", "data.batch=8", "optimizer.lr=3e-3", f"steps={steps}", *fields]
    if not (directory / "done.json").exists():
        fbi("train", directory, *(part for field in settings for part in ("--set", field)),
            "--eval-every", 0, "--log-every", EVERY, "--unroll", 1, "--mesh", "data=1")  # fmt: skip
    return json.loads((directory / "done.json").read_text())["loss"]


def rate(directory: Path) -> float:
    """Tokens a second, median over the rows of the record but the first."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return statistics.median([row["time_tokens_per_s"] for row in rows if row["kind"] == "train"][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", default="64,64:16", help="k or k:drawn, joined by commas")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--root", type=Path, default=Path("runs/offline"))
    options = parser.parse_args()
    if options.steps < 2 * EVERY:
        parser.error(f"--steps {options.steps} gives too few rows for a rate; take at least {2 * EVERY}")
    kinds = ["live", *options.tables.split(",")]
    losses: dict[str, list[float]] = {kind: [] for kind in kinds}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    stored: dict[str, str] = {}
    for seed in range(options.seeds):
        seeds = (f"seed={seed}", f"data.seed={seed}")
        teacher = options.root / f"teacher-s{seed}"
        train(teacher, options.steps, "policy=fp", *seeds)
        for kind in kinds:
            name = kind.replace(":", "-of-")
            source = teacher if kind == "live" else options.root / f"table-{name}-s{seed}"
            if source != teacher:
                k, _, drawn = kind.partition(":")
                fbi("teach", teacher, "--out", source, "--k", k, "--drawn", drawn or 0)
                on_disk = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
                meta = json.loads((source / "meta.json").read_text())
                stored[kind] = f"{meta['bytes_per_token']:.1f} of {on_disk / 1e6:.0f} MB"
            student = options.root / f"student-{name}-s{seed}"
            where = f"teacher={source.resolve()}"
            losses[kind].append(train(student, options.steps, "policy=fbi", "loss=ad", where, *seeds))
            rates[kind].append(rate(student))
    print("\ntable  loss by seed              less live: mean, spread   tokens/s  bytes a token")
    for kind, found in losses.items():
        paired = [a - b for a, b in zip(found, losses["live"], strict=True)]
        spread = statistics.stdev(paired) if len(paired) > 1 else float("nan")
        by_seed = " ".join(f"{loss:.4f}" for loss in found)
        print(f"{kind:<6} {by_seed:25} {statistics.mean(paired):+.4f}, {spread:.4f}           "
              f"{statistics.median(rates[kind]):8,.0f}  {stored.get(kind, '')}")  # fmt: skip
    live = losses["live"]
    if len(live) > 1:
        print(f"spread of the live teacher's students over seeds: {statistics.stdev(live):.4f}")


if __name__ == "__main__":
    main()

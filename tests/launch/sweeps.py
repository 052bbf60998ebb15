"""A small experiment in files of its own, launched as a user would."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 900  # seconds for anything that takes a few on a quiet machine
EXPERIMENT = '''"""Tiny runs.

Command: fbi sweep experiments/tiny.py
"""

import dataclasses

from fbi.data.config import DataConfig
from fbi.experiment import grid, seeds, variants
from fbi.model.config import ModelConfig
from fbi.report.spec import Claim, Row, TableSpec
from fbi.train.run import Execution, Run

MODEL = ModelConfig(vocab=300, dim=32, layers=1, heads=2, kv_heads=2, head_dim=16, ff=64, context=64)
DATA = DataConfig(corpus="text:{corpus}", tokenizer="bpe:300", window=16, batch=4, validation=0.2)
BASE = Run(model=MODEL, policy="fp", data=DATA, steps={steps})
EXECUTION = Execution(checkpoint_every=20, eval_every=0, log_every=5, mesh="data=1")


def runs():
    named = {{
        "fp": {{}},
        "ad": {{"policy": "fbi", "loss": "ad", "teacher": "@fp-s{{seed}}"}},
        "ce": {{"policy": "fbi"}},
        "b158": {{"policy": "bitnet-b158"}},
    }}
    return seeds(variants(BASE, named), {seeds})


def tables():
    return [TableSpec("Tiny", [Row("full", "fp", 3.2, "a paper"), Row("one bit", "ce")], baseline="full")]


def claims():
    return [Claim("full precision is better", "a paper", "fp", "ce", published="+0.1")]
'''

UNDISTURBED = """
import os, sys
from pathlib import Path

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fbi
from fbi.launch.plan import load_experiment, plan

planned = plan("experiments/tiny.py", Path(sys.argv[1]))
for directory, run in planned.runs.items():
    if directory.startswith(sys.argv[2]):
        fbi.train(run, planned.root / directory, load_experiment("experiments/tiny.py").EXECUTION)
"""


def write_experiment(folder: Path, steps: int = 60, seeds: int = 3) -> Path:
    """experiments/tiny.py and its corpus in a folder."""
    draw = random.Random(0)
    words = ["the", "state", "of", "union", "is", "strong", "and", "we", "shall", "keep", "it", "so", "for", "all"]
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    for number in range(60):
        (folder / "corpus" / f"{number:03}.txt").write_text(" ".join(draw.choices(words, k=120)) + f"\n{number}.\n")
    path = folder / "experiments" / "tiny.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(EXPERIMENT.format(corpus=folder / "corpus", steps=steps, seeds=seeds))
    return path


def environment(cache: Path) -> dict[str, str]:
    """Of the processes: one device, caches of their own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    return kept | {"FBI_CACHE": str(cache), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}


class Fbi:
    """The command line in a folder."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.environment = folder, environment(cache)

    @contextlib.contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A process of its own, which does not outlive the block."""
        command = [sys.executable, "-m", "fbi", *arguments]
        with subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def train(self, root: str, prefix: str = "") -> Path:
        """Trains the runs of the experiment one after the other in one process, on one core as a slot has it."""
        subprocess.run(
            [sys.executable, "-c", UNDISTURBED, root, prefix], cwd=self.folder, env=self.environment, check=True
        )
        return self.folder / root

    def run(self, *arguments: str) -> tuple[int, str]:
        with self.started(*arguments) as process:
            output, _ = process.communicate(timeout=PATIENCE)
            return process.returncode, output


def directories(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/config.json"))


def done(root: Path) -> list[Path]:
    return [path for path in directories(root) if (path / "done.json").exists()]


def workers(root: Path) -> dict[Path, int]:
    """The processes that say they run something."""
    found = {}
    for path in directories(root):
        try:
            found[path] = json.loads((path / "running.json").read_text())["pid"]
        except (OSError, ValueError):
            continue
    return found


def steps(directory: Path) -> int:
    """The last step on record."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def starts(directory: Path) -> int:
    """How often the run was started, by its log."""
    return sum(line.startswith("== ") for line in (directory / "log.txt").read_text().splitlines())


def record(directory: Path) -> list[dict]:
    """Every row of the run, without times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time_")} for row in rows]


def until(condition, what: str):
    """Waits for a condition and returns its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.02)
    return value


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)

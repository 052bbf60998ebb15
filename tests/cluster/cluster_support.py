"""The sweep of `sweep.py` under a launcher, in a process of its own; a run caught in the middle; what came out."""

import contextlib
import fnmatch
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

EXPERIMENT = Path(__file__).with_name("sweep.py")
RUNS, STEPS = 12, 60
PATIENCE = 540  # seconds for a sweep, which takes one or two minutes on a quiet machine
TEXT = "the state of union is a strong one and we shall keep it so for all who come after us in peace"


def write_corpus(folder: Path) -> Path:
    """Two hundred small documents, the same on every call."""
    draw = random.Random(0)
    for number in range(200):
        words = draw.choices(TEXT.split(), k=150)
        (folder / f"{number:03}.txt").write_text(f"{' '.join(words)}\nNumber {number}.\n")
    return folder


def directories(root: Path) -> list[Path]:
    """The runs of a sweep."""
    return sorted(path.parent for path in root.glob("*/config.json"))


def until(seen: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """The first true value of `seen()`."""
    deadline = time.monotonic() + patience
    while not (found := seen()):
        assert time.monotonic() < deadline, f"not seen within {patience:.0f} s: {what}"
        time.sleep(0.02)
    return found


class Sweep:
    """`fbi sweep` in a process of its own."""

    def __init__(self, root: Path, launcher: str, corpus: Path, only: str = "*"):
        root.parent.mkdir(parents=True, exist_ok=True)
        self.root, self.said = root, root.parent / "said.txt"
        command = [sys.executable, "-m", "fbi", "sweep", str(EXPERIMENT), "--root", str(root), "--only", only]
        command += ["--launcher", launcher]
        variables = {"FBI_TEST_CORPUS": str(corpus), "FBI_CACHE": str(corpus.parent / "cache")}
        with self.said.open("a") as said:
            self.process = subprocess.Popen(
                command, stdout=said, stderr=subprocess.STDOUT, env=os.environ | variables, cwd=root.parent
            )

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def words(self) -> str:
        """What it has said."""
        return self.said.read_text()

    def stop(self) -> None:
        """Asks it to stop, as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Its exit code."""
        return self.process.wait(PATIENCE)

    def catch(self, which: Callable[[Path, dict[str, Any]], bool] = lambda directory, running: True) -> "Caught":
        """A run that is past its first checkpoint and not yet half done, standing still."""

        def look() -> Caught | None:
            assert self.process.poll() is None, f"the sweep ended before a run was caught:\n{self.words}"
            return next((c for d in directories(self.root) if (c := _caught(d, which)) is not None), None)

        return until(look, f"a run in the middle of its training; the sweep said:\n{self.words}")


class Caught:
    """A run whose process stands still."""

    def __init__(self, directory: Path, process: psutil.Process):
        self.directory, self.process = directory, process

    def let_go(self) -> None:
        """Lets the process go on, where it is still there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.send_signal(signal.SIGCONT)


def _caught(directory: Path, which: Callable[[Path, dict[str, Any]], bool]) -> Caught | None:
    if not (saved(directory) and 10 <= last_step(directory) <= STEPS // 2):
        return None
    try:
        running = json.loads((directory / "running.json").read_text())
        process = psutil.Process(running["pid"])
        if not which(directory, running):
            return None
        process.send_signal(signal.SIGSTOP)
    except (OSError, ValueError, psutil.NoSuchProcess):
        return None
    if last_step(directory) <= STEPS - 15:  # it went on until the signal came
        return Caught(directory, process)
    process.send_signal(signal.SIGCONT)
    return None


def saved(directory: Path) -> list[str]:
    """The whole checkpoints."""
    return [path.name for path in directory.glob("checkpoints/*") if path.name.isdigit()]


def last_step(directory: Path) -> int:
    """The step of the last whole row of the record, -1 where there is none."""
    rows = [row for row in record(directory) if row["kind"] == "train"]
    return rows[-1]["step"] if rows else -1


def record(directory: Path) -> list[dict[str, Any]]:
    """The whole rows of the record, without the times, which are never twice the same."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in row.items() if not name.startswith("time_")} for row in found]


def starts(directory: Path) -> list[str]:
    """What the process printed, a text for each time that it was started."""
    return (directory / "log.txt").read_text().split("== 20")[1:]


def assert_same(root: Path, reference: Path, caught: Sequence[Caught], only: str = "*") -> None:
    """Every run is done, once, with the numbers of the reference; the caught ones were started twice, the rest once."""
    names = [directory.name for directory in directories(reference) if fnmatch.fnmatch(directory.name, only)]
    for name in names:
        rows = record(root / name)
        assert rows == record(reference / name), name
        trained = [row for row in rows if row["kind"] == "train"]
        assert all({"loss", "grad_norm"} <= row.keys() for row in trained)
        steps = [row["step"] for row in trained]
        assert steps == sorted(set(steps)), f"{name} has steps twice"
        assert steps[-1] == STEPS
        assert (root / name / "done.json").read_bytes() == (reference / name / "done.json").read_bytes()
        assert not (root / name / "stop").exists()
        assert not (root / name / "failed.json").exists()
        assert not (root / name / "running.json").exists()
    again = {one.directory.name: 2 for one in caught}
    assert {name: len(starts(root / name)) for name in names} == dict.fromkeys(names, 1) | again
    for one in caught:
        assert "continuing from step" in starts(one.directory)[1]

"""Tiny runs in processes of their own, and means to stop them where a test wants them stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import fbi
from fbi.train.run import FORMAT, Run, from_json, to_json

TEXT = "the state of union is a strong one and we shall keep it so for all who come after us in peace"
# seconds for anything that takes a few on a quiet machine
PATIENCE = float(os.environ.get("FBI_TEST_PATIENCE", "180"))
# Of a run, and between its checkpoints: evaluations make these steps longer than the writing of a checkpoint, and
# log_every divides neither number, so that rows of the record straddle checkpoints.
STEPS, EVERY = 36, 12
OPTIONS = (
    "--checkpoint_every", str(EVERY), "--keep_last", "2", "--eval_every", "3", "--log_every", "5", "--mesh", "data=1",
)  # fmt: skip
COMMAND = (sys.executable, "-c", "from fbi.cli import entry; entry()")


def write_corpus(folder: Path) -> Path:
    """Sixty small documents, the same on every call."""
    draw = random.Random(0)
    folder.mkdir(parents=True)
    for number in range(60):
        (folder / f"{number:03}.txt").write_text(" ".join(draw.choices(TEXT.split(), k=120)) + f"\nNumber {number}.\n")
    return folder


def tiny(corpus: Path, **fields: Any) -> Run:
    """A run whose steps take milliseconds."""
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"vocab": 300, "dim": 32, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "ff": 64},
        "data": {"corpus": f"text:{corpus}", "tokenizer": "bpe:300", "window": 16, "batch": 4, "validation": 0.2},
        "optimizer": {"lr": 0.01},
        "guard": {},
        "steps": STEPS,
    }
    for name, value in fields.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return from_json(Run, config)


def write_config(path: Path, run: Run) -> Path:
    path.write_text(json.dumps({"format": FORMAT, "run": to_json(run)}))
    return path


def arguments(directory: Path, config: Path, *options: str) -> list[str]:
    return ["train", str(directory), "--config", str(config), *OPTIONS, *options]


class Ended(NamedTuple):
    """What a process left: its exit code (negative: the signal that killed it) and its words."""

    code: int
    out: str
    err: str


class Process:
    """A run of the command line in a process of its own."""

    def __init__(self, arguments: Sequence[str], said: Path, environment: Mapping[str, str]):
        """`said`: where its words go, less the suffix; `environment` comes on top of this process's own."""
        self._said = said.with_suffix(".out"), said.with_suffix(".err")
        with self._said[0].open("w") as out, self._said[1].open("w") as err:
            self._process = subprocess.Popen(
                [*COMMAND, *arguments], stdout=out, stderr=err, env=os.environ | dict(environment), cwd=said.parent
            )

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        if self.running:
            self._process.kill()
            self._process.wait(PATIENCE)

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for something to be seen while the process runs; False where it ended first."""
        deadline = time.monotonic() + PATIENCE
        while self.running:
            if condition():
                return True
            assert time.monotonic() < deadline, self.words
            time.sleep(0.002)
        return False

    def caught(self, moment: Callable[[], bool]) -> bool:
        """Stops the process where `moment` holds, and leaves it standing; False where it ended before that."""
        while self.until(moment):
            self.freeze()
            if self.running and moment():
                return True
            self.send(signal.SIGCONT)
        return False

    def freeze(self) -> None:
        """Stops it where it is; returns when it stands still, with all its threads, or has ended."""
        if self.running:
            self.send(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> Ended:
        """Waits for its end."""
        self._process.wait(PATIENCE)
        return Ended(self._process.returncode, *self.words)

    @property
    def words(self) -> tuple[str, str]:
        return self._said[0].read_text(), self._said[1].read_text()


def command(arguments: Sequence[str], said: Path, environment: Mapping[str, str]) -> Ended:
    """The command line in a process of its own, from start to end."""
    with Process(arguments, said, environment) as process:
        return process.end()


def finished(ended: Ended, directory: Path) -> None:
    """Asserts that a run went to its end without a word on standard error."""
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert (directory / "done.json").exists()


def copy(directory: Path, target: Path) -> Path:
    """The run directory as it is now: what a kill at this moment would leave."""
    return shutil.copytree(directory, target)


def rows(directory: Path, *kinds: str) -> list[dict[str, Any]]:
    """The whole lines of a record, of these kinds, without what differs from one execution to the next."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [
        {name: value for name, value in row.items() if not name.startswith("time_")}
        for row in found
        if not kinds or row["kind"] in kinds
    ]


def last_step(directory: Path) -> int:
    """The step of the last whole line of the record, -1 where there is none."""
    path = directory / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return next((json.loads(line)["step"] for line in reversed(whole) if line.endswith(b"\n")), -1)


def saved(directory: Path) -> list[int]:
    """The steps of the whole checkpoints."""
    folder = directory / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def temporaries(directory: Path) -> list[Path]:
    """The folders of checkpoints that are being written."""
    return sorted((directory / "checkpoints").glob("*tmp*"))


def amid(directory: Path) -> bool:
    """Whether a run has two whole checkpoints and is at a step between the newer one and the next."""
    steps = saved(directory)
    return len(steps) == 2 and steps[1] < last_step(directory) < steps[1] + EVERY and not temporaries(directory)


def files(directory: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def params(directory: Path) -> dict[str, np.ndarray]:
    """The parameters of the newest checkpoint."""
    flat, _ = jax.tree_util.tree_flatten_with_path(fbi.load(directory).params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def assert_same(directory: Path, reference: Path) -> None:
    """The two runs have the same record, result and final parameters, digit for digit."""
    assert rows(directory) == rows(reference)
    assert (directory / "done.json").read_bytes() == (reference / "done.json").read_bytes()
    assert saved(directory)[-1] == saved(reference)[-1] == rows(reference)[-1]["step"]
    ours, theirs = params(directory), params(reference)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.dtype == theirs[name].dtype
        assert leaf.tobytes() == theirs[name].tobytes(), name


def drawn(abstract: Any, rng: np.random.Generator) -> Any:
    """Parameters of these shapes and layouts, normal with a deviation of 0.3."""
    return jax.tree.map(lambda leaf: jax.device_put(0.3 * rng.standard_normal(leaf.shape), leaf.sharding), abstract)


def assert_alike_in_float64(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    """Two pairs of (loss, gradients) agree to 1e-9, each gradient laid out as its twin."""
    assert abs(float(one[0]) - float(other[0])) < 1e-9
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)

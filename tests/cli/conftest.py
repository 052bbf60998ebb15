import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import EXECUTION, Ended, assignments

from fbi.cli import main

WORDS = "the state of union is a strong one and we shall keep it so for all who come after us in peace"
LIMITED = """
import os, resource, sys
limit, *command = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
os.execv(command[0], command)
"""


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with some text, and a cache that the tests share."""
    folder = tmp_path_factory.mktemp("cli")
    draw = random.Random(0)
    (folder / "text").mkdir()
    for number in range(60):
        text = " ".join(draw.choices(WORDS.split(), k=120)) + f"\nNumber {number}.\n"
        (folder / "text" / f"{number:03}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def tiny(home):
    """The settings of a run of a moment: one layer of width 32, 16 tokens, 2 steps."""
    shape = {"layers": 1, "dim": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "ff": 64, "vocab": 300, "context": 64}
    data = {"corpus": f"text:{home / 'text'}", "tokenizer": "bpe:300", "window": 16, "batch": 4, "validation": 0.2}
    settings = {f"model.{k}": v for k, v in shape.items()} | {f"data.{k}": v for k, v in data.items()}
    return tuple(f"{k}={v}" for k, v in (settings | {"data.test": 0.1, "policy": "fp", "steps": 2}).items())


@pytest.fixture(scope="session")
def teacher(home, tiny):
    """The directory of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", str(home / "cache"))
        assert main(["train", str(home / "teacher"), *assignments(*tiny), *EXECUTION]) == 0
    assert sorted(path.name for path in (home / "teacher" / "checkpoints").iterdir()) == ["1", "2"]
    return home / "teacher"


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setenv("FBI_CACHE", str(home / "cache"))
    return home / "cache"


@pytest.fixture
def fbi(capsys) -> Callable[..., Ended]:
    """Runs a command in this process: `fbi("train", directory, "--set", ...)`."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def train(fbi, tiny) -> Callable[..., Ended]:
    """Trains the tiny run in this process, with changes: `train(directory, "steps=4", execution=(...))`."""

    def run(directory: Path, *settings: str, execution: tuple[str, ...] = EXECUTION) -> Ended:
        return fbi("train", directory, *assignments(*tiny, *settings), *execution)

    return run


@pytest.fixture
def console() -> Callable[..., Ended]:
    """Runs the console script; `limit` is the most bytes that a file may have, which stands for a full disk."""

    def run(*arguments: object, limit: int = 0, **environment: str) -> Ended:
        environment = {"JAX_NUM_CPU_DEVICES": "8"} | environment  # as here: what was compiled here serves there
        command = [str(Path(sys.executable).with_name("fbi")), *map(str, arguments)]
        if limit:
            environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}  # reads what is compiled, adds nothing
            command = [sys.executable, "-c", LIMITED, str(limit), *command]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run

import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support import (
    Ended,
    Process,
    amid,
    arguments,
    copy,
    files,
    finished,
    last_step,
    saved,
    temporaries,
    tiny,
    write_config,
    write_corpus,
)

from fbi.cli import main

TRIALS = 3  # of a kill that has to come at a certain moment
EARLY = 5  # steps before the writing of a checkpoint is broken off


class Home(NamedTuple):
    """What all tests share."""

    folder: Path
    corpus: Path
    config: Path
    """Of the run that they interrupt."""
    environment: dict[str, str]
    """Of the processes: one device, one cache of data, every compiled program kept."""

    def arguments(self, directory: Path, *options: str) -> list[str]:
        return arguments(directory, self.config, *options)

    def process(self, name: str, *options: str, **environment: str) -> Process:
        """Begins the run `name`, or goes on with it, in a process of its own."""
        options = tuple(self.arguments(self.folder / name, *options))
        return Process(options, self.folder / f"{name}-said", self.environment | environment)

    def command(self, name: str, *options: str, **environment: str) -> Ended:
        """The same, to its end."""
        with self.process(name, *options, **environment) as process:
            return process.end()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    corpus = write_corpus(folder / "text")
    environment = {
        "FBI_CACHE": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    return Home(folder, corpus, write_config(folder / "config.json", tiny(corpus)), environment)


@pytest.fixture(scope="session")
def reference(home):
    """The directory of the run that nothing interrupts."""
    finished(home.command("reference"), home.folder / "reference")
    return home.folder / "reference"


class Killed(NamedTuple):
    """A run that SIGKILL ended, and what was seen of it."""

    name: str
    directory: Path
    image: Path
    """A copy of the directory as the kill left it."""
    ended: Ended
    rival: Ended | None = None
    """Another process that was started on the directory while the run was alive."""
    touched: bool = False
    """Whether any file was another after the rival had gone."""


def _kill(
    home: Home, name: str, moment: Callable[[Path], bool], *options: str, rival: bool = False, **environment: str
) -> Killed:
    """Begins a run and kills it at a moment; a trial that missed the moment is repeated."""
    for trial in range(TRIALS):
        directory = home.folder / f"{name}-{trial}"
        with home.process(directory.name, *options, **environment) as process:
            if not process.caught(lambda d=directory: moment(d)):
                print(f"trial {trial} missed: {process.words}")  # shown with a failure
                continue
            before = files(directory)
            other = home.command(directory.name, *options) if rival else None
            touched = files(directory) != before
            assert process.running
            assert moment(directory)
            process.send(signal.SIGKILL)
            ended = process.end()
            image = copy(directory, home.folder / f"{name}-image")
            return Killed(directory.name, directory, image, ended, other, touched)
    pytest.fail(f"in {TRIALS} trials the run was never stopped at that moment")


@pytest.fixture(scope="session")
def killed(home):
    """A run killed between two checkpoints, after another process had tried its directory."""
    return _kill(home, "killed", amid, rival=True)


@pytest.fixture(scope="session")
def half_written(home):
    """A run killed while it was writing a checkpoint, with a whole one before it."""
    moment = lambda d: last_step(d) > EARLY and bool(saved(d)) and bool(temporaries(d))
    return _kill(home, "half", moment, "--checkpoint_every", "3", JAX_LOG_COMPILES="1")


@pytest.fixture
def go_on(home, capsys, monkeypatch):
    """Starts a run in this process: `go_on(directory, *options)` -> Ended."""
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])

    def start(directory: Path, *options: str, config: Path = home.config) -> Ended:
        capsys.readouterr()
        code = main(arguments(directory, config, *options))
        return Ended(code, *capsys.readouterr())

    return start

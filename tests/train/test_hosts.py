"""A run on several processes: the numbers of one process, whichever process is lost or however many go on."""

import json
import signal
import socket
import time
from contextlib import ExitStack

import psutil
import pytest
from support import PATIENCE, Process, arguments, finished, last_step, rows, saved, tiny, write_config

from fbi.errors import EXIT_INPUT, EXIT_LOST, EXIT_STOPPED

pytestmark = pytest.mark.slow

STEPS = 20
HEARTBEAT = 10
FLAGS = ("--checkpoint_every", "7", "--eval_every", "2", "--log_every", "1", "--diagnose_every", "9")
EACH = {  # of every process
    "JAX_ENABLE_X64": "1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
}


@pytest.fixture(scope="module")
def config(home):
    """Of a run in float64."""
    run = tiny(home.corpus, steps=STEPS, model={"dtype": "float64"}, data={"batch": 8})
    return write_config(home.folder / "float64.json", run)


@pytest.fixture(scope="module")
def begin(home, config):
    """Starts a run on several processes: `begin(stack, name, processes, devices, *flags, odd=of the last)` -> them."""

    def start(
        stack: ExitStack, name: str, count: int, devices: int = 1, *flags: str, odd: tuple[str, ...] = ()
    ) -> list[Process]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = f"127.0.0.1:{free.getsockname()[1]}"
        environment = home.environment | EACH | {"JAX_NUM_CPU_DEVICES": str(devices)}
        told = arguments(home.folder / name, config, *FLAGS, "--mesh", f"data={count * devices}", *flags)
        found = []
        for process in range(count):
            where = ("--coordinator", meeting, "--processes", str(count), "--heartbeat", str(HEARTBEAT))
            place = (*where, "--process", str(process)) if count > 1 else ()
            said = home.folder / f"{name}-{count}-{process}"
            more = odd if process == count - 1 else ()
            found.append(stack.enter_context(Process([*told, *place, *more], said, environment)))
        return found

    return start


@pytest.fixture(scope="module")
def whole(home, begin):
    """The directory of the run of one process."""
    with ExitStack() as stack:
        (process,) = begin(stack, "one", 1)
        finished(process.end(), home.folder / "one")
    return home.folder / "one"


def close(ours, theirs):
    """Whether two values of plain data are the same, numbers to 1e-9."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(close(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, float):
        return abs(ours - theirs) <= 1e-9 * max(1.0, abs(theirs))
    return ours == theirs


def assert_close(directory, reference):
    """The two runs have the same record and result to 1e-9."""
    ours, theirs = rows(directory), rows(reference)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    assert [row["step"] for row in rows(directory, "train")] == list(range(1, STEPS + 1))
    different = [(a, b) for a, b in zip(ours, theirs, strict=True) if not close(a, b)]
    assert different == []
    done = [json.loads((d / "done.json").read_text()) for d in (directory, reference)]
    assert close(*done)


@pytest.mark.parametrize(("count", "devices"), [(2, 2), (4, 1)])
def test_several_processes_come_to_the_numbers_of_one(count, devices, home, begin, whole):
    directory = home.folder / f"straight-{count}"
    with ExitStack() as stack:
        ended = [process.end() for process in begin(stack, directory.name, count, devices)]
    assert [e.code for e in ended] == [0] * count, ended
    assert "tiny: done, 20 steps" in ended[0].out
    assert all("tiny" not in e.out for e in ended[1:])  # one speaks for all
    assert_close(directory, whole)
    assert json.loads((directory / "env.json").read_text())["processes"] == count


def test_a_run_goes_on_with_other_processes_after_a_signal_and_after_a_kill(home, begin, whole):
    directory = home.folder / "cut"
    with ExitStack() as stack:  # a signal to one of two stops both, with a checkpoint
        both = begin(stack, directory.name, 2)
        assert both[1].until(lambda: last_step(directory) >= 3)
        both[1].send(signal.SIGTERM)
        ended = [process.end() for process in both]
    assert [e.code for e in ended] == [EXIT_STOPPED] * 2, ended
    (step,) = {e.err.strip().rsplit("stopped at step ", 1)[1].split(";")[0] for e in ended}
    assert saved(directory)[-1] == int(step) < STEPS - 5
    with ExitStack() as stack:  # of four that go on one is killed: all end, and say why
        four = begin(stack, directory.name, 4)
        assert four[0].until(lambda: last_step(directory) >= int(step) + 3)
        (child,) = psutil.Process(four[3].pid).children()
        child.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        ended = [process.end() for process in four]
        took = time.monotonic() - killed
    assert took < 60 < PATIENCE
    assert [e.code for e in ended] == [EXIT_LOST] * 4, ended
    assert f"continuing from step {step}\n" in ended[0].out
    last = [e.err.splitlines()[-1] for e in ended]
    assert last[3].startswith("fbi: process 3 of 4 was killed by SIGKILL")
    assert all(f"fbi: process {i} of 4 was ended by the runtime (SIGABRT): process 3 died" in last[i] for i in range(3))
    assert all(line.endswith("; the same command on every host continues") for line in last)
    assert not (directory / "done.json").exists()
    with ExitStack() as stack:  # one ends it
        (process,) = begin(stack, directory.name, 1)
        finished(process.end(), directory)
    assert_close(directory, whole)


def test_a_run_that_loses_a_process_starts_again_where_that_is_asked(home, begin, whole):
    directory = home.folder / "again"
    with ExitStack() as stack:
        both = begin(stack, directory.name, 2, 1, "--restarts", "1")
        assert both[0].until(lambda: last_step(directory) >= 9)
        (child,) = psutil.Process(both[0].pid).children()
        child.send_signal(signal.SIGKILL)  # of the process where all met
        ended = [process.end() for process in both]
    assert [e.code for e in ended] == [0, 0], ended
    assert all("starting again from the last checkpoint" in e.err for e in ended)
    assert "continuing from step 7\n" in ended[0].out
    assert_close(directory, whole)


def test_processes_with_different_commands_are_refused_together(home, begin):
    with ExitStack() as stack:
        both = begin(stack, "differs", 2, 1, odd=("--log_every", "2"))
        ended = [process.end() for process in both]
    assert [e.code for e in ended] == [EXIT_INPUT] * 2, ended
    says = "fbi: error: process 1 has another command than process 0: execution.log_every: 1 -> 2; start the same"
    assert all(says in e.err for e in ended)
    assert not (home.folder / "differs").exists()

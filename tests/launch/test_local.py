"""Sweeps on this machine, with real processes: killed, stopped, shared by two launchers, failing."""

import os
import signal

import pytest
from sweeps import PATIENCE, Fbi, directories, done, kill, record, starts, steps, until, workers, write_experiment

pytestmark = pytest.mark.slow

STEPS = 120  # about a second after the compilation: long enough to be caught in the middle
SWEEP = ("sweep", "experiments/tiny.py", "--launcher", "local:slots=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the experiment."""
    folder = tmp_path_factory.mktemp("sweep")
    write_experiment(folder, STEPS)
    return folder


def test_a_sweep_killed_in_the_middle_ends_as_an_undisturbed_one(home, cache):
    fbi, root = Fbi(home, cache), home / "killed"
    straight = fbi.train("straight")
    with fbi.started(*SWEEP, "--root", "killed") as launcher:
        caught = until(
            lambda: len(done(root)) >= 4 and [d for d in workers(root) if 0 < steps(d) < STEPS], "a run in its middle"
        )
        alive = workers(root)
        kill(launcher.pid, *alive.values())
    before = {directory: (directory / "done.json").stat().st_mtime_ns for directory in done(root)}
    assert 4 <= len(before) < 12
    assert any(d not in before for d in caught), "the kill came too late"
    for directory in alive:
        assert not (directory / "failed.json").exists()
    code, output = fbi.run(*SWEEP, "--root", "killed")
    assert code == 0, output
    assert len(done(root)) == 12
    for directory, time in before.items():
        assert (directory / "done.json").stat().st_mtime_ns == time
        assert starts(directory) == 1
    assert sum(starts(directory) for directory in directories(root)) > 12
    for directory in directories(root):
        assert record(directory) == record(straight / directory.name)


def test_two_launchers_start_no_run_twice(home, cache):
    fbi = Fbi(home, cache)
    sweep = (*SWEEP, "--root", "shared", "--only", "ce-*")
    with fbi.started(*sweep) as one, fbi.started(*sweep) as other:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), outputs
    assert [starts(directory) for directory in done(home / "shared")] == [1, 1, 1]
    assert all("all 3 runs are done" in output for output in outputs)


def test_a_signal_leaves_every_run_resumable(home, cache):
    fbi, root = Fbi(home, cache), home / "signalled"
    straight = fbi.train("straight-b158", "b158-")
    with fbi.started(*SWEEP, "--root", "signalled", "--only", "b158-*") as launcher:
        until(lambda: any(0 < steps(d) < STEPS for d in workers(root)), "a run in its middle")
        launcher.send_signal(signal.SIGINT)
        output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 75, output
    assert "each running run saves a checkpoint" in output
    assert not workers(root)
    assert not list(root.glob("*/failed.json"))
    code, output = fbi.run(*SWEEP, "--root", "signalled", "--only", "b158-*")
    assert code == 0, output
    for directory in done(root):
        assert record(directory) == record(straight / directory.name)
    assert any(starts(directory) == 2 for directory in done(root))


def test_stop_is_obeyed_from_another_process_and_taken_back_by_the_next_sweep(home, cache):
    fbi, root = Fbi(home, cache), home / "stopped"
    with fbi.started(*SWEEP, "--root", "stopped", "--only", "fp-*") as launcher:
        until(lambda: any(steps(d) > 0 for d in workers(root)), "a run on its way")
        code, output = fbi.run("stop", "stopped")
        assert code == 0
        assert "asked to stop with a checkpoint" in output
        output, _ = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 75, output
    assert len(done(root)) < 3
    code, output = fbi.run("status", "stopped", "--only", "fp-*")
    assert "stopped" in output
    code, output = fbi.run(*SWEEP, "--root", "stopped", "--only", "fp-*")
    assert code == 0, output
    assert len(done(root)) == 3


def test_a_failed_run_shows_its_log_holds_up_nothing_else_and_can_be_retried(tmp_path, cache):
    path = write_experiment(tmp_path, 10, seeds=1)
    missing = tmp_path / "moved"
    (tmp_path / "corpus").rename(missing)
    text = path.read_text().replace(
        '"ce": {"policy": "fbi"}', f'"ce": {{"policy": "fbi", "data.corpus": "text:{missing}"}}'
    )
    path.write_text(text)
    fbi = Fbi(tmp_path, cache / "other")
    code, output = fbi.run(*SWEEP)
    assert code == 1
    assert "fp-s0" in output
    assert f"  | fbi: error: no file or folder {tmp_path / 'corpus'}" in output
    assert [d.name.rsplit("-", 1)[0] for d in done(tmp_path / "runs/tiny")] == ["ce-s0"]
    assert "fbi retry" in output
    code, output = fbi.run("status", "runs/tiny")
    assert "failed" in output
    assert "waiting" in output
    code, output = fbi.run(*SWEEP)  # a failed run is not run again by itself
    assert code == 1
    assert [starts(d) for d in directories(tmp_path / "runs/tiny") if d.name.startswith("fp-")] == [1]
    missing.rename(tmp_path / "corpus")
    code, output = fbi.run("retry", "runs/tiny", "--launcher", "local:slots=2")
    assert code == 0, output
    assert len(done(tmp_path / "runs/tiny")) == 4


def test_a_process_outlives_no_launcher(home, cache):
    fbi, root = Fbi(home, cache), home / "orphan"
    endless = (*SWEEP, "--root", "orphan", "--only", "fp-s0", "--set", "steps=1000000")
    with fbi.started(*endless) as launcher:
        directory = until(lambda: next((d for d in workers(root) if steps(d) > 0), None), "a run on its way")
        kill(launcher.pid)
    until(lambda: "stopped at step" in (directory / "log.txt").read_text(), "the end of its process")
    assert not (directory / "failed.json").exists()


def test_a_second_signal_leaves_at_once_and_the_process_saves_a_checkpoint(home, cache):
    fbi, root = Fbi(home, cache), home / "twice"
    endless = (*SWEEP, "--root", "twice", "--only", "fp-s0", "--set", "steps=1000000")
    with fbi.started(*endless) as launcher:
        directory, pid = until(
            lambda: next((item for item in workers(root).items() if steps(item[0]) > 0), None), "a run on its way"
        )
        os.kill(pid, signal.SIGSTOP)  # it cannot answer the first request
        launcher.send_signal(signal.SIGINT)
        until(lambda: "each running run saves a checkpoint" in launcher.stdout.readline(), "the answer to the first")
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(PATIENCE) == 130
        os.kill(pid, signal.SIGCONT)
    until(lambda: "stopped at step" in (directory / "log.txt").read_text(), "the end of its process")


def test_a_run_that_cannot_be_started_holds_up_no_other(home, cache):
    fbi, root = Fbi(home, cache), home / "blocked"
    chosen = ("sweep", "experiments/tiny.py", "--root", "blocked", "--only", "fp-s*", "--launcher")
    assert fbi.run(*chosen, "none")[0] == 0
    (blocked,) = root.glob("fp-s0-*")
    (blocked / ".claim").mkdir()  # a folder cannot be opened as the lock
    code, output = fbi.run(*chosen, "local:slots=2")
    assert code == 2
    assert f"fbi: error: cannot write in {blocked.relative_to(home)}: Is a directory" in output
    assert "Traceback" not in output
    assert len(done(root)) == 2

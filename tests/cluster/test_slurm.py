"""A sweep on a real Slurm of one machine, one of whose jobs is requeued in the middle."""

import json
import re
import subprocess
from pathlib import Path

import cluster_support as support
import pytest

pytestmark = pytest.mark.timeout(1800)  # the first one waits for the reference too

SCRIPT = Path(__file__).with_name("slurm_one_machine.sh")


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands work on a cluster of this machine."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    try:
        # its daemons keep standard error open, so that it goes to a file
        with (folder / "said.txt").open("w") as said:
            started = subprocess.run(
                ["bash", SCRIPT, "start", folder], stdout=subprocess.PIPE, stderr=said, text=True, timeout=400
            )
        assert started.returncode == 0, (folder / "said.txt").read_text()
        monkeypatch.setenv("SLURM_CONF", started.stdout.strip())
        yield folder
    finally:
        subprocess.run(["bash", SCRIPT, "stop", folder], timeout=120, check=True)


def scontrol(*arguments):
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=120)


def start_now(number):
    """Slurm lets a requeued job wait for two minutes, unless it is told not to."""
    support.until(lambda: "JobState=PENDING" in scontrol("show", "job", number).stdout, "it waits again", 180)
    support.until(lambda: scontrol("update", f"jobid={number}", "starttime=now").returncode == 0, "an update", 60)


def test_requeued_runs_go_on_where_they_were(slurm, corpus, reference, tmp_path):
    root = tmp_path / "sweep"
    with support.Sweep(root, "slurm:wait=false,time=120", corpus) as sweep:
        assert sweep.end() == 0, sweep.words
    submitted = json.loads((root / "slurm/queue.json").read_text())
    assert len(submitted) == support.RUNS
    assert len({number.partition("_")[0] for number in submitted.values()}) == 2  # an array of those that need others

    def number(caught):
        return submitted[caught.directory.name]

    with support.Sweep(root, "slurm:time=120", corpus) as sweep:  # waits for those that are in the queue
        first = sweep.catch()
        requeued = scontrol("requeue", number(first))
        assert requeued.returncode == 0, requeued.stderr
        first.let_go()
        start_now(number(first))
        second = sweep.catch(lambda directory, running: directory != first.directory)
        # what Slurm sends, to all processes of a job, some time before its time limit
        subprocess.run(["scancel", "--signal=USR2", number(second)], check=True, timeout=120)
        second.let_go()
        start_now(number(second))
        for one in (first, second):
            support.until(lambda one=one: len(support.starts(one.directory)) == 2, "its second start")
            assert re.search(r"\bRestarts=1\b", scontrol("show", "job", number(one)).stdout)
        assert sweep.end() == 0, sweep.words
    assert json.loads((root / "slurm/queue.json").read_text()) == submitted
    for one in (first, second):
        said = (root / "slurm" / f"{number(one)}_0_log.out").read_text()
        assert re.findall(r"SLURM_RESTART_COUNT=(\d)", said) == ["0", "1"]
    assert "stopped at step" in support.starts(second.directory)[0]  # it saved a checkpoint
    support.assert_same(root, reference, [first, second])


def test_a_sweep_asked_to_stop_goes_on_later(slurm, corpus, reference, tmp_path):
    root, only = tmp_path / "sweep", "tiny-fp-s[01]"
    with support.Sweep(root, "slurm:at_once=1,time=120", corpus, only) as sweep:
        caught = sweep.catch()
        sweep.stop()
        support.until(lambda: (caught.directory / "stop").exists(), "the request to stop", 120)
        caught.let_go()
        assert sweep.end() == 75, sweep.words
    assert not (caught.directory / "done.json").exists()
    assert not list(root.glob("*/stop"))
    assert not subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout
    with support.Sweep(root, "slurm:time=120", corpus, only) as sweep:
        assert sweep.end() == 0, sweep.words
    support.assert_same(root, reference, [caught], only + "-*")


def test_what_sbatch_refuses_is_named(slurm, corpus, tmp_path):
    with support.Sweep(tmp_path / "sweep", "slurm:partition=nowhere", corpus) as sweep:
        assert sweep.end() == 2, sweep.words
    assert "sbatch refused the runs" in sweep.words
    assert "invalid partition" in sweep.words
    assert "Traceback" not in sweep.words

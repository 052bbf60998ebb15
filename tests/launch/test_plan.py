"""From an experiment's file to run directories, and the table of their states."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweeps import write_experiment

from fbi.cli import main
from fbi.data.config import DataConfig
from fbi.errors import InputError
from fbi.launch import launchers
from fbi.launch.job import Job, execute
from fbi.launch.local import places
from fbi.launch.plan import jobs, link, plan
from fbi.launch.schedule import Schedule
from fbi.launch.watch import summary
from fbi.report.spec import read_sweep
from fbi.report.state import State, state_of
from fbi.train.progress import clock
from fbi.train.run import Run, to_json
from fbi.train.rundir import read_run

FP = Run(name="fp", policy="fp")


def test_directories_are_named_by_content_and_teachers_lie_beside():
    ad = Run(name="ad", loss="ad", teacher="@fp")
    linked = link([ad, FP])
    (fp_directory, (_, fp)), (ad_directory, (name, student)) = linked.items()
    assert fp_directory == f"fp-{FP.hash[:8]}"
    assert (fp, name, student.teacher) == (FP, "ad", f"../{fp_directory}")
    assert ad_directory == f"ad-{student.hash[:8]}"
    changed = link([ad, FP], lambda run: run if run.name == "ad" else Run(name="fp", policy="fp", steps=3))
    assert set(changed).isdisjoint(linked), "a changed teacher makes its student another run"


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([Run(name="a", loss="ad", teacher="@b")], "unknown run named in a 'b'"),
        ([Run(name="a", teacher="@b"), Run(name="b", teacher="@a")], "in a circle: a -> b -> a"),
        ([FP, Run(name="fp", policy="fbi")], "two unlike runs are named 'fp'"),
    ],
)
def test_references_that_lead_nowhere_are_refused(runs, says):
    with pytest.raises(InputError, match=says):
        link(runs)


def test_a_plan_writes_whole_configs_once_and_the_jobs_of_a_glob_with_what_they_need(tmp_path):
    made = plan(write_experiment(tmp_path, steps=4), tmp_path / "r")
    made.write()
    sweep = read_sweep(made.path)
    assert len(sweep.runs) == 12
    assert sweep.execution == {"mesh": "data=1", "checkpoint_every": 20, "eval_every": 0, "log_every": 5}
    assert sweep.text.startswith("Tiny runs.")
    found = jobs(sweep, made.root, "ad-s1")
    assert [job.name.rsplit("-", 1)[0] for job in found] == ["fp-s1", "ad-s1"]
    assert found[1].needs == (found[0].directory,)
    assert found[1].command[1:4] == ["-m", "fbi", "train"]
    assert read_run(found[1].directory).teacher == f"../{found[0].name}"
    with pytest.raises(InputError, match=r"no run of tiny matches 'x\*'; it has fp-s0, fp-s1"):
        jobs(sweep, made.root, "x*")
    before = {path: path.stat().st_mtime_ns for path in made.root.glob("*/config.json")}
    plan(tmp_path / "experiments/tiny.py", tmp_path / "r").write()
    assert {path: path.stat().st_mtime_ns for path in made.root.glob("*/config.json")} == before
    other = plan(tmp_path / "experiments/tiny.py", tmp_path / "r", assignments=["steps=5"])
    assert not set(other.runs) & set(made.runs)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not an experiment: give a Python file"),
        ('"""Doc."""\n', "it has no function runs"),
        ("def runs():\n    return []\n", "needs a docstring"),
    ],
)
def test_a_file_that_is_no_experiment_is_one_line(tmp_path, text, says, capsys):
    path = tmp_path / "experiments" / f"bad{abs(hash(says))}.py"
    path.parent.mkdir()
    if text is not None:
        path.write_text(text)
    assert main(["sweep", str(path), "--launcher", "none"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_launchers_are_text_and_refuse_what_they_do_not_know():
    assert launchers.parse("local:slots=3,pin=none").slots == 3
    for text, says in (("loca", "did you mean 'local'"), ("local:slot=1", "did you mean 'slots'"),
                       ("local:slots=x", "not a whole number"), ("local:pin=x", "valid: auto, cores")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            launchers.parse(text)


def test_slots_share_the_cores():
    cores = sorted(os.sched_getaffinity(0))
    shares = [share for share, _ in places(len(cores), "cores")]
    assert sorted(core for share in shares for core in share) == cores
    assert places(2, "none") == [(set(), {}), (set(), {})]
    with pytest.raises(InputError, match="slots is 0"):
        places(0, "none")


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in places(2, "auto")] == ["0,2", "1,5"]
    with pytest.raises(InputError, match="slots is 5, but this machine has 4 of gpu"):
        places(5, "gpu")


def write_run(directory, rows=(), done=None, steps=40, **files):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"format": 1, "run": {"steps": steps}}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in ({"done": done} if done else {}).items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


ROWS = [{"kind": "train", "step": 10 * n, "loss": 4.0 - n, "time_step_s": 0.5, "time_tokens_per_s": 100.0 * n}
        for n in (1, 2)]  # fmt: skip


def test_states_are_read_from_files(tmp_path):
    done = write_run(tmp_path / "done", ROWS, {"steps": 40, "loss": 1.5})
    failed = write_run(tmp_path / "failed", ROWS, failed={"what": "exit code 2: no such corpus"})
    queued = write_run(tmp_path / "queued")
    state = state_of(done)
    assert (state.kind, state.step, state.loss, state.rate) == ("done", 40, 1.5, 150.0)
    state = state_of(failed)
    assert (state.kind, state.step, state.loss, state.note) == ("failed", 20, 2.0, "exit code 2: no such corpus")
    assert state_of(queued).kind == "queued"
    timed = [row | {"time_useful_s": 3.0 * n, "time_wall_s": 4.0 * n + 4} for n, row in enumerate(ROWS, 1)]
    assert state_of(write_run(tmp_path / "timed", timed)).goodput == 6.0 / 12.0
    assert state_of(done).goodput is None
    assert state_of(queued, (done,)).kind == "queued"
    state = state_of(queued, (done, failed))
    assert (state.kind, state.note) == ("waiting", "failed failed")
    (queued / "stop").write_text("")
    assert state_of(queued).kind == "stopped"


def test_a_run_is_running_while_its_claim_is_held_and_elsewhere_while_it_shows_signs_of_life(tmp_path):
    run = write_run(tmp_path / "run", ROWS, running={"host": platform.node(), "pid": 1})
    (run / ".claim").write_text("")
    assert state_of(run).kind == "queued"
    code = (
        f"import fcntl, time; f = open({str(run / '.claim')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(1, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as holder:
        holder.stdout.read(1)
        state = state_of(run)
        holder.kill()
    assert (state.kind, state.left) == ("running", 10.0)
    assert state_of(run).kind == "queued"
    (run / "running.json").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert state_of(run).kind == "running"
    os.utime(run / "running.json", (time.time() - 1000,) * 2)
    assert state_of(run).kind == "queued"


def test_a_schedule_gives_each_job_once_after_what_it_needs(tmp_path):
    first, second, third = (write_run(tmp_path / name) for name in "abc")
    made = [Job(second, needs=(first,)), Job(first), Job(third, needs=(second,))]
    schedule = Schedule(made)
    assert schedule.take() == made[1]
    assert schedule.take() is None
    (first / "done.json").write_text("{}")
    schedule.end(made[1], "done")
    assert schedule.take() == made[0]
    schedule.end(made[0], "busy")  # another launcher has it: it is looked at again
    assert schedule.take() == made[0]
    (second / "failed.json").write_text("{}")
    schedule.end(made[0], "failed")
    assert not schedule.over
    assert schedule.take() is None  # what needs a failed run is without hope
    assert schedule.over
    assert schedule.outcomes == {made[1]: "done", made[0]: "failed", made[2]: "failed"}


def test_a_job_that_cannot_start_leaves_its_reason(tmp_path):
    (tmp_path / "run").mkdir()
    run = Run(name="x", data=DataConfig(corpus=f"text:{tmp_path}/none"))
    (tmp_path / "run" / "config.json").write_text(json.dumps({"format": 1, "run": to_json(run)}))
    assert execute(Job(tmp_path / "run")) == "failed"
    failed = json.loads((tmp_path / "run" / "failed.json").read_text())
    assert failed["code"] == 2
    assert "none" in failed["what"]
    assert not (tmp_path / "run" / "running.json").exists()
    assert execute(Job(tmp_path / "run")) == "failed"
    assert (tmp_path / "run" / "log.txt").read_text().count("== ") == 1


def test_the_time_left_counts_what_is_queued_at_the_pace_of_what_ran():
    states = {
        "a": State("done", 40, 40, pace=0.5),
        "b": State("running", 40, 40, pace=1.5),
        "c": State("queued", 0, 60),
    }
    found = {Job(Path(name)): state for name, state in states.items()}
    assert summary(found) == f"1 done, 1 queued, 1 running; about {clock(60.0)} left"
    assert summary({Job(Path("c")): states["c"]}) == "1 queued"

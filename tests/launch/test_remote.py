"""What launchers to other machines share, and what of the Slurm launcher needs no Slurm."""

import fcntl
import json
import pickle
import sys
import threading
from pathlib import Path

import pytest

from fbi.errors import InputError
from fbi.launch.job import Job
from fbi.launch.launchers import LAUNCHERS, parse
from fbi.launch.ray import Ray
from fbi.launch.remote import Stops, absolute, carry_out, give_up, levels, optional, pairs
from fbi.launch.slurm import Slurm, _left, _settled
from fbi.launch.slurm_task import CarryOut
from fbi.report.state import state_of


def job(root, name, *needs, **files):
    directory = root / name
    directory.mkdir(parents=True)
    for file, text in files.items():
        (directory / file.replace("_", ".")).write_text(text)
    return Job(directory, needs=tuple(root / need for need in needs))


def test_every_launcher_is_parsed_with_its_options():
    assert all(hasattr(parse(name), "launch") for name in LAUNCHERS)
    assert parse("ray:address=10.0.0.1:6379,cpus=2,gpus=0.5,resources=TPU=4;big=1,at_once=3,retries=5,hosts=2") == Ray(
        "10.0.0.1:6379", 2.0, 0.5, "TPU=4;big=1", 3, 5, 2
    )
    assert parse("slurm:partition=p,time=60,extra=qos=high;exclusive,wait=false") == Slurm(
        partition="p", time=60, extra="qos=high;exclusive", wait=False
    )


def test_pairs():
    assert pairs("", "extra") == {}
    assert pairs("qos=high; constraint=a&b=c;exclusive;", "extra") == {
        "qos": "high",
        "constraint": "a&b=c",
        "exclusive": "",
    }
    with pytest.raises(InputError, match="extra is '=3'; it must be NAME=VALUE, several joined by ;"):
        pairs("=3", "extra")


@pytest.mark.parametrize(
    ("option", "says"), [("resources=TPU=four", "give numbers, as in TPU=4"), ("at_once=-1", "0 or")]
)
def test_ray_names_a_wrong_option(tmp_path, option, says):
    with pytest.raises(InputError, match=says):
        parse(f"ray:{option}").launch([job(tmp_path, "a")], lambda: None, threading.Event())


def test_a_ray_task_leaves_a_run_to_the_process_that_has_it(tmp_path, monkeypatch):
    one = job(tmp_path, "a", done_json="{}")
    monkeypatch.chdir(tmp_path)
    with (one.directory / ".claim").open("a") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        assert carry_out(one, str(one.directory), {}) == "busy"
    assert carry_out(one, str(tmp_path / "not here"), {}) == "done"
    assert Path.cwd() == one.directory  # where the sweep was launched, as far as it is there


def test_levels_put_needed_jobs_first_and_leave_out_what_is_not_asked_for(tmp_path):
    a, b = job(tmp_path, "a"), job(tmp_path, "b", "a")
    c, d = job(tmp_path, "c", "a", "b"), job(tmp_path, "d", "elsewhere")
    assert levels([c, b, a, d]) == [[a, d], [b], [c]]
    assert levels([c, d]) == [[c, d]]
    assert levels([]) == []
    one, two = Job(tmp_path / "1", needs=(tmp_path / "2",)), Job(tmp_path / "2", needs=(tmp_path / "1",))
    with pytest.raises(InputError, match="in a circle: 1, 2"):
        levels([one, two])


def test_a_job_keeps_its_meaning_in_another_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = job(tmp_path.relative_to(tmp_path), "a", "b")
    assert not relative.directory.is_absolute()
    assert absolute(relative) == Job(tmp_path / "a", needs=(tmp_path / "b",))


def test_requests_to_stop_are_taken_back_and_those_of_others_stay(tmp_path):
    ours, theirs = job(tmp_path, "ours"), job(tmp_path, "theirs", stop="")
    stops = Stops()
    stops.ask([ours, theirs])
    assert (ours.directory / "stop").exists()
    stops.clear()
    assert not (ours.directory / "stop").exists()
    assert (theirs.directory / "stop").exists()


def test_a_run_given_up_is_shown_as_failed(tmp_path):
    one = job(tmp_path, "a", log_txt="one\ntwo\n")
    give_up(one, "the node is gone")
    assert state_of(one.directory).kind == "failed"
    assert state_of(one.directory).note == "the node is gone"
    assert json.loads((one.directory / "failed.json").read_text())["log"] == "one\ntwo"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"submitit is not installed.*pip install 'fbi\[slurm\]'"):
        optional("submitit", "slurm")


@pytest.mark.parametrize(
    ("files", "kind"), [({"failed_json": '{"what": "it broke"}'}, "failed"), ({}, "queued"), ({"stop": ""}, "stopped")]
)
def test_a_slurm_job_whose_needs_are_not_done_ends_without_running_and_says_so(tmp_path, capsys, files, kind):
    need = job(tmp_path, "teacher", **files)
    assert CarryOut()(job(tmp_path, "student", "teacher")) == "failed"
    assert f"student is not started: teacher, which it needs, is {kind}" in capsys.readouterr().out
    assert not (tmp_path / "student" / "log.txt").exists()
    assert not (need.directory / "log.txt").exists()


def test_a_slurm_job_carries_out_a_run_and_is_done_at_once_when_it_is_done(tmp_path):
    done = job(tmp_path, "done", done_json="{}")
    assert pickle.loads(pickle.dumps(CarryOut()))(done) == "done"
    broken = job(tmp_path, "broken", config_json="{}")
    assert CarryOut()(broken) == "failed"  # by `fbi train`, which says what is wrong with the config
    assert "== " in (broken.directory / "log.txt").read_text()
    assert state_of(broken.directory).note.startswith("exit code 2")


def test_what_is_done_or_lost_is_not_submitted(tmp_path):
    jobs = [
        job(tmp_path, "done", done_json="{}"),
        job(tmp_path, "broken", failed_json="{}"),
        job(tmp_path, "its-student", "broken"),
        job(tmp_path, "its-student-too", "its-student"),
    ]
    schedule = Slurm().launch(jobs, lambda: None, threading.Event())  # asks no Slurm
    assert list(schedule.outcomes.values()) == ["done", "failed", "failed", "failed"]
    assert schedule.over


def test_how_a_slurm_job_ended_that_is_out_of_the_queue(tmp_path):
    one = job(tmp_path, "a")
    assert _settled(one) is None
    assert _left(one, "7_1", tmp_path, True) is None  # its result may be late
    (tmp_path / "7_1_0_result.pkl").write_bytes(pickle.dumps(("success", "stopped")))
    assert _left(one, "7_1", tmp_path, True) == "stopped"
    (tmp_path / "7_1_0_result.pkl").write_bytes(pickle.dumps(("error", "Traceback ...\nOSError: no space\n")))
    assert _left(one, "7_1", tmp_path, True) == "failed"
    assert state_of(one.directory).note == "Slurm job 7_1: OSError: no space"
    assert _settled(one) == "failed"


def test_a_slurm_job_that_left_nothing_is_failed_with_its_log(tmp_path):
    one = job(tmp_path, "a")
    (tmp_path / "7_0_log.err").write_text("slurmstepd: error: Exceeded memory limit\n")
    assert _left(one, "7", tmp_path, False) == "failed"
    failure = json.loads((one.directory / "failed.json").read_text())
    assert "Slurm job 7 ended before the run did" in failure["what"]
    assert failure["log"] == "slurmstepd: error: Exceeded memory limit"

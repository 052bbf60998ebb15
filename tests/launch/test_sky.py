"""What the `sky` launcher writes: a task that SkyPilot's schemas accept, and a script that starts a job a run."""

import json
import shlex
import subprocess
import threading
from pathlib import Path

import jsonschema
import pytest
import yaml

from fbi.errors import InputError
from fbi.launch.job import Job
from fbi.launch.launchers import parse
from fbi.launch.sky import Sky

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((ROOT / "tests/reference/skypilot_task_schema.json").read_text())


def same_but_for_case(validator, allowed, value, schema):
    if str(value).lower() not in [name.lower() for name in allowed]:
        yield jsonschema.ValidationError(f"{value!r} is not one of {allowed}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"case_insensitive_enum": same_but_for_case})


def validate(task):
    Validator(SCHEMAS["task"]).validate(task)
    Validator(SCHEMAS["resources"]).validate(task["resources"])
    for mount in task["file_mounts"].values():
        Validator(SCHEMAS["storage"]).validate(mount)


def job(root, name, needs=(), done=False):
    directory = root / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(name)
    (directory / "metrics.jsonl").write_text("begun here")
    if done:
        (directory / "done.json").write_text("{}")
    return Job(directory, ("--mesh", "data=1,model=2", "--eval-every", "5"), tuple(root / need for need in needs))


def write(jobs, text):
    schedule = parse(text).launch(jobs, lambda: None, threading.Event())
    assert not schedule.over  # nothing is started
    folder = jobs[0].directory.parent / "sky"
    return yaml.safe_load((folder / "task.yaml").read_text()), folder / "launch.sh"


def started(script, tmp_path):
    """The arguments of each `sky` that the script starts, with a `sky` that only notes them."""
    (tmp_path / "bin").mkdir()
    note = tmp_path / "bin" / "sky"
    note.write_text('#!/bin/bash\n[[ -e task.yaml ]] && printf "%s\\0" "$@" END >> "$NOTES"\n')
    note.chmod(0o755)
    environment = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "NOTES": str(tmp_path / "notes")}
    subprocess.run([script], env=environment, check=True, timeout=60)
    return [part.strip("\0").split("\0") for part in (tmp_path / "notes").read_text().split("END\0") if part]


@pytest.mark.parametrize(
    ("text", "resources", "mount", "extra"),
    [
        (
            "sky:bucket=b,cloud=gcp,region=us-central1",
            {"accelerators": "tpu-v5litepod-8", "use_spot": True, "infra": "gcp/us-central1"},
            {"store": "gcs"},
            "[tpu]",
        ),
        (
            "sky:bucket=b,accelerators=A100:8,use_spot=false,region=us-east-1",
            {"accelerators": "A100:8", "use_spot": False, "infra": "*/us-east-1"},
            {},
            "[cuda]",
        ),
        (
            "sky:bucket=b,accelerators=H100:1,cloud=aws,store=r2,extra=dev",
            {"accelerators": "H100:1", "use_spot": True, "infra": "aws"},
            {"store": "r2"},
            "[dev]",
        ),
        ("sky:bucket=b,accelerators=L4:1", {"accelerators": "L4:1", "use_spot": True}, {}, "[cuda]"),
    ],
)
def test_the_task_is_what_skypilot_accepts_and_what_was_asked_for(tmp_path, text, resources, mount, extra):
    task, _ = write([job(tmp_path, "a-0")], f"{text},workdir={ROOT}")
    validate(task)
    recovery = {"job_recovery": {"recover_on_exit_codes": [75]}}
    assert task["resources"] == resources | recovery
    assert task["workdir"] == str(ROOT)
    assert task["file_mounts"] == {
        "/runs": {
            "name": "b",
            "source": str(tmp_path / "sky/runs"),
            "mode": "MOUNT_CACHED",
            "config": {"mount_cached": {"transfers": 1}},
            **mount,
        }
    }
    assert extra in task["setup"]
    assert set(task["envs"]) == {"FBI_RUN", "FBI_NEEDS", "FBI_FLAGS"}


def test_the_schemas_refuse_a_task_that_is_none(tmp_path):
    task, _ = write([job(tmp_path, "a-0")], f"sky:bucket=b,workdir={ROOT}")
    wrong = [
        task | {"gpus": 1},
        task | {"resources": task["resources"] | {"use_spot": "yes"}},
        task | {"resources": task["resources"] | {"infra": "nowhere"}},
        task | {"file_mounts": {"/runs": {"name": "b", "mode": "MOUNTED"}}},
    ]
    for one in wrong:
        with pytest.raises(jsonschema.ValidationError):
            validate(one)


def test_the_script_starts_a_job_a_run_and_waits_for_those_that_others_need(tmp_path):
    root = tmp_path / "runs"
    jobs = [
        job(root, "teacher-0"),
        job(root, "old-1", done=True),
        job(root, "student-2", needs=("teacher-0", "old-1")),
        job(root, "other-3"),
    ]
    task, script = write(jobs, f"sky:bucket=b,workdir={ROOT}")
    calls = started(script, tmp_path)
    assert all(call[:3] == ["jobs", "launch", "--yes"] and call[-1] == "task.yaml" for call in calls)
    names = [call[call.index("--name") + 1] for call in calls]
    assert sorted(names[:2]) == ["fbi-other-3", "fbi-teacher-0"]
    assert names[2:] == ["fbi-student-2"]
    assert ["--detach-run" in call for call in calls] == [False, False, True]
    student = {part.split("=", 1)[0]: part.split("=", 1)[1] for part in calls[-1] if part.startswith("FBI_")}
    assert student == {
        "FBI_RUN": "student-2",
        "FBI_NEEDS": "teacher-0 old-1",
        "FBI_FLAGS": "--mesh data=1,model=2 --eval-every 5",
    }
    assert set(student) == set(task["envs"])
    up = root / "sky/runs"
    assert (up / "student-2/config.json").read_text() == "student-2"
    assert not (up / "student-2/metrics.jsonl").exists()  # the bucket may hold a newer one
    assert (up / "old-1/done.json").exists()
    assert (up / "old-1/metrics.jsonl").exists()


def test_the_task_carries_out_the_contract_of_all_launchers(tmp_path):
    """Its `run` part, under bash, with folders and the program moved to a place that is here."""
    one = job(tmp_path / "runs", "a-0", needs=("b-1",))
    run = write([one], f"sky:bucket=b,workdir={ROOT}")[0]["run"]
    run = run.replace("~/fbi-env/bin/fbi", "echo fbi").replace("/runs/", f"{tmp_path}/runs/")

    def carried_out():
        variables = {"FBI_RUN": one.name, "FBI_NEEDS": "b-1", "FBI_FLAGS": shlex.join(one.flags), "PATH": "/bin"}
        return subprocess.run(["bash", "-c", run], env=variables, capture_output=True, text=True, timeout=60)

    refused = carried_out()
    assert (refused.returncode, refused.stdout) == (1, "a-0 needs b-1, which is not done\n")
    job(tmp_path / "runs", "b-1", done=True)
    assert carried_out().stdout == f"fbi train {one.directory} {shlex.join(one.flags)}\n"


def test_what_is_done_is_not_started_again(tmp_path):
    assert Sky(bucket="b", workdir=str(ROOT)).launch([job(tmp_path, "a-0", done=True)], lambda: None, threading.Event())
    assert not (tmp_path / "sky").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sky", "needs a bucket"),
        ("sky:bucket=b,accelerators=", "needs accelerators, such as tpu-v5litepod-8"),
        ("sky:bucket=b,workdir=/nowhere", "workdir is '/nowhere', where there is no pyproject.toml"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, says):
    with pytest.raises(InputError, match=says):
        parse(text).launch([job(tmp_path, "a-0")], lambda: None, threading.Event())

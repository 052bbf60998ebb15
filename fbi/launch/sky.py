"""Runs as managed spot jobs of SkyPilot: writes its task and a script that starts a job a run. It starts nothing.

https://docs.skypilot.co: a managed job that loses its machine gets another one; its run directory is in a bucket, so
that the run continues from its last checkpoint.
"""

import dataclasses
import json
import shlex
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fbi.errors import EXIT_STOPPED, InputError
from fbi.files import write_text
from fbi.launch.job import Job
from fbi.launch.remote import levels
from fbi.launch.schedule import Schedule

MOUNTED = "/runs"  # on the machines
STORES = {"aws": "s3", "gcp": "gcs", "azure": "azure", "oci": "oci", "nebius": "nebius", "ibm": "ibm"}


@dataclasses.dataclass(frozen=True)
class Sky:
    """Managed jobs on spot machines of a cloud, TPUs and GPUs alike."""

    bucket: str = ""
    """Bucket that holds the folder of the runs; SkyPilot makes it where there is none."""
    accelerators: str = "tpu-v5litepod-8"
    """Of one run, all on one machine: a TPU slice such as tpu-v5litepod-8, or a GPU such as A100:8."""
    cloud: str = ""
    """Such as gcp or aws; empty: where it is cheapest."""
    region: str = ""
    """Such as us-central1; empty: any."""
    use_spot: bool = True
    """Machines that may be taken away, at a lower price."""
    store: Literal["", "s3", "gcs", "azure", "r2", "oci", "nebius", "ibm"] = ""
    """Kind of the bucket; empty: that of the cloud, or what SkyPilot chooses."""
    workdir: str = "."
    """The source of fbi, which is installed from it on each machine."""
    extra: str = ""
    """Optional part of fbi to install; empty: tpu or cuda, after the accelerators."""

    def launch(self, jobs: Sequence[Job], watch: Callable[[], None], cancelled: threading.Event) -> Schedule:
        """Writes sky/task.yaml and sky/launch.sh beside the runs that are not done, and says where they are."""
        del watch, cancelled
        self._check()
        schedule = Schedule(jobs)
        left = [job for job in jobs if not (job.directory / "done.json").exists()]
        if left:
            folder = jobs[0].directory.parent.resolve() / "sky"
            _gather(left, folder / "runs")
            write_text(folder / "task.yaml", self.task(folder / "runs"))
            write_text(folder / "launch.sh", script(left))
            (folder / "launch.sh").chmod(0o755)
            print(
                f"{folder}/task.yaml is the task of a run, {folder}/launch.sh starts {len(left)} of them as managed "
                f"jobs; nothing is started yet. The results come into the bucket {self.bucket}",
                flush=True,
            )
        return schedule

    def _check(self) -> None:
        if not self.bucket:
            raise InputError("sky needs a bucket for the folder of the runs, as in sky:bucket=my-runs")
        if not self.accelerators:
            raise InputError("sky needs accelerators, such as tpu-v5litepod-8 or A100:8")
        if not (Path(self.workdir) / "pyproject.toml").exists():
            raise InputError(f"workdir is {self.workdir!r}, where there is no pyproject.toml; give the source of fbi")

    def task(self, start: Path) -> str:
        """The YAML of a task that carries out the run named by FBI_RUN; the bucket starts with what is in `start`."""
        extra = self.extra or ("tpu" if self.accelerators.lower().startswith("tpu") else "cuda")
        infra = f"{self.cloud or '*'}/{self.region}" if self.region else self.cloud
        store = self.store or STORES.get(self.cloud.lower(), "")
        text = json.dumps  # a JSON string is a YAML string
        lines = [
            "# SkyPilot task: one run of a sweep. `launch.sh` beside this file starts a managed job a run.",
            "name: fbi",
            f"workdir: {text(str(Path(self.workdir).resolve()))}",
            "resources:",
            f"  accelerators: {text(self.accelerators)}",
            f"  use_spot: {text(self.use_spot)}",
            *([f"  infra: {text(infra)}"] if infra else []),
            "  job_recovery:",
            f"    recover_on_exit_codes: [{EXIT_STOPPED}]  # asked to stop by a signal: its checkpoint is written",
            "envs:",
            '  FBI_RUN: ""  # directory name of the run',
            '  FBI_NEEDS: ""  # those of the runs that must be done before',
            '  FBI_FLAGS: ""  # how it is executed',
            "file_mounts:",
            f"  {MOUNTED}:",
            f"    name: {text(self.bucket)}",
            f"    source: {text(str(start))}",
            *([f"    store: {store}"] if store else []),
            "    mode: MOUNT_CACHED  # files are written in place and uploaded behind, as checkpoints need it",
            "    config:",
            "      mount_cached:",
            "        transfers: 1  # in the order of writing: what completes a checkpoint comes last",
            "setup: |",
            "  set -e",
            "  python3 -m pip install --quiet --user uv",
            "  python3 -m uv venv --quiet --python 3.11 --allow-existing ~/fbi-env",
            f"  python3 -m uv pip install --quiet --python ~/fbi-env/bin/python -c constraints.txt '.[{extra}]'",
            "run: |",
            "  for need in $FBI_NEEDS; do",
            f'    if [ ! -e "{MOUNTED}/$need/done.json" ]; then',
            '      echo "$FBI_RUN needs $need, which is not done"; exit 1',
            "    fi",
            "  done",
            f'  ~/fbi-env/bin/fbi train "{MOUNTED}/$FBI_RUN" $FBI_FLAGS',
        ]
        return "\n".join(lines) + "\n"


def _gather(jobs: Sequence[Job], folder: Path) -> None:
    """Fills the folder that is uploaded: configs of the runs, and whole the finished runs that they need.

    Never the rest of a run that was begun here: uploaded again, it would replace newer files of the bucket.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for job in jobs:
        write_text(folder / job.name / "config.json", (job.directory / "config.json").read_text(encoding="utf-8"))
    for need in {need for job in jobs for need in job.needs if (need / "done.json").exists()}:
        shutil.copytree(need, folder / need.name)


def script(jobs: Sequence[Job]) -> str:
    """A shell script that starts a managed job a run; those that others need are waited for."""
    lines = [
        "#!/usr/bin/env bash",
        "# Starts a managed job a run. Safe to start again: what is done ends at once, the rest continues.",
        "# Needs SkyPilot (pip install 'skypilot[gcp]', or [aws], ...) and `sky check`.",
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
    ]
    groups = levels(jobs)
    for index, group in enumerate(groups):
        last = index == len(groups) - 1
        lines.append("")
        lines += [_start(job, detach=last) + ("" if last else " &") for job in group]
        lines += [] if last else ["wait  # the next ones need these; a job goes on when this script is interrupted"]
    return "\n".join(lines) + "\n"


def _start(job: Job, detach: bool) -> str:
    variables = {
        "FBI_RUN": job.name,
        "FBI_NEEDS": " ".join(need.name for need in job.needs),
        "FBI_FLAGS": " ".join(job.flags),
    }
    flags = ["--yes", *(["--detach-run"] if detach else []), "--name", f"fbi-{job.name}"]
    flags += [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    return shlex.join(["sky", "jobs", "launch", *flags, "task.yaml"])

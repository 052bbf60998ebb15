"""What a fleet does to a run: notice and kill, the time that this costs, a checkpoint read on other meshes."""

import dataclasses
import itertools
import json
import signal
import time

import jax
import numpy as np
import pytest
from support import STEPS, copy, finished, last_step, saved

from fbi import optim
from fbi.model import Model
from fbi.model.config import preset
from fbi.policy import Policy
from fbi.report.runs import read_run
from fbi.train import mesh as meshes
from fbi.train.checkpoint import Checkpoints
from fbi.train.step import abstract_state

pytestmark = pytest.mark.slow


def test_a_notice_leaves_a_checkpoint_within_the_grace_and_a_late_one_is_told(home):
    directory = home.folder / "noticed"
    with home.process("noticed", "--grace", "0.0001", "--profile", "3:5", "--checkpoint_every", "3") as process:
        assert process.until(lambda: last_step(directory) >= 9)  # the second checkpoint has waited for the first
        process.send(signal.SIGUSR1)
        noticed = time.monotonic()
        ended = process.end()
    assert time.monotonic() - noticed < 30
    step = saved(directory)[-1]
    assert (ended.code, ended.err) == (75, f"fbi: stopped at step {step}; the same command continues\n")
    assert 9 <= step < STEPS
    assert ended.out.count("a checkpoint may come too late for a preemption: a turn takes up to ") == 1
    assert f"steps 3 to 5 traced into {directory / 'profile'}; open with `tensorboard" in ended.out
    assert len(list((directory / "profile").rglob("*.xplane.pb"))) == 1


def lines(directory):
    """The whole lines of a record."""
    found = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [line for line in found if line.endswith("\n")]


def test_the_goodput_of_a_killed_and_continued_run(killed, go_on, tmp_path):
    directory = copy(killed.image, tmp_path / "run")
    last = [row for row in map(json.loads, lines(killed.image)) if "time_wall_s" in row][-1]
    dead = float((directory / ".clock").read_text())
    step = saved(directory)[-1]
    kept, wall = Checkpoints(directory / "checkpoints")._describe(step)[1]["host"]["time"]
    assert 0 < kept < last["time_useful_s"] < last["time_wall_s"]  # what was done since the checkpoint is lost
    since = max(dead, wall)  # the last sign of life may be older than the checkpoint, by one beat
    assert kept < wall
    began = time.perf_counter()
    finished(go_on(directory), directory)
    took = time.perf_counter() - began
    timed = [row for row in map(json.loads, lines(directory)) if "time_wall_s" in row]
    assert {row["kind"] for row in timed} == {"train", "eval"}
    for before, after in itertools.pairwise(timed):
        assert before["time_wall_s"] < after["time_wall_s"]
        assert before["time_useful_s"] <= after["time_useful_s"]
    for row in timed:
        assert (row["time_wall_s"] > since) == (row["step"] > step)
    end = timed[-1]
    assert since < end["time_wall_s"] < since + took
    assert kept < end["time_useful_s"] < kept + took
    assert read_run(directory).goodput == end["time_useful_s"] / end["time_wall_s"] < 1
    assert not (directory / ".clock").exists()


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A checkpoint of a model and its optimizer, written on data=8, and what is in it."""
    folder = tmp_path_factory.mktemp("eight") / "checkpoints"
    draw = np.random.default_rng(0)

    def leaf(kind: jax.ShapeDtypeStruct) -> jax.Array:
        integers = np.issubdtype(kind.dtype, np.integer)
        values = draw.integers(0, 100, kind.shape) if integers else draw.standard_normal(kind.shape)
        return jax.device_put(np.asarray(values, kind.dtype), kind.sharding)

    with on("data=8") as abstract:
        state = jax.tree.map(leaf, abstract)
        checkpoints = Checkpoints(folder)
        checkpoints.save(5, state, {"skipped": [[3, 4]]})
        kept = jax.device_get(state)
        jax.tree.map(lambda x: x.delete(), state)  # as a step that takes the state over
        checkpoints.close()
    return folder, kept


class on:
    """The shapes of a training state under a mesh."""

    def __init__(self, mesh: str):
        config = dataclasses.replace(
            preset("nano"), vocab=64, dim=64, layers=2, heads=4, kv_heads=4, head_dim=16, ff=64
        )
        self.mesh = jax.set_mesh(meshes.make(meshes.parse(mesh, 8)))
        self.model = Model(config, Policy.parse("fbi"))

    def __enter__(self):
        self.mesh.__enter__()
        return abstract_state(self.model, optim.build(optim.OptimizerConfig(), 10))

    def __exit__(self, *error: object) -> None:
        self.mesh.__exit__(*error)


@pytest.mark.parametrize("mesh", ["data=2,model=4", "data=1,model=1"])
def test_a_checkpoint_of_eight_devices_is_exact_on_another_mesh(eight, mesh):
    folder, kept = eight
    said: list[str] = []
    with on(mesh) as abstract:
        found = Checkpoints(folder).restore(abstract, said.append)
    assert found is not None
    step, state, host = found
    assert (step, host, said) == (5, {"skipped": [[3, 4]]}, [])
    assert jax.tree.structure(state) == jax.tree.structure(kept) == jax.tree.structure(abstract)
    for ours, theirs, wanted in zip(*map(jax.tree.leaves, (state, kept, abstract)), strict=True):
        assert ours.sharding.is_equivalent_to(wanted.sharding, ours.ndim)
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == theirs.tobytes()

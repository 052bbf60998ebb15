"""Damaged checkpoints are never used and never lost; training that goes wrong goes back; a run that cannot, says so."""

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    EVERY,
    STEPS,
    assert_same,
    copy,
    files,
    finished,
    rows,
    saved,
    tiny,
    write_config,
    write_corpus,
)

from fbi import optim
from fbi.data import Batches, prepare
from fbi.errors import InputError
from fbi.loss import Loss
from fbi.train import mesh as meshes
from fbi.train.checkpoint import Checkpoints, fingerprint
from fbi.train.guard import MEMORY, SETTLE, Guard
from fbi.train.load import build_model, starting_params
from fbi.train.run import GuardConfig, from_json, to_json
from fbi.train.step import make_step

pytestmark = pytest.mark.slow


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def largest(checkpoint: Path) -> Path:
    """The file that holds most of a checkpoint's numbers."""
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut_data(checkpoint: Path) -> None:
    truncate(largest(checkpoint))


def flip_data(checkpoint: Path) -> None:
    flip(largest(checkpoint), largest(checkpoint).stat().st_size // 2)


def flip_description(checkpoint: Path) -> None:
    path = checkpoint / "_CHECKPOINT_METADATA"
    flip(path, path.read_bytes().index(b'"mean": ') + 10)  # a digit of the guard's running mean


def delete_files(checkpoint: Path) -> None:
    for path in sorted(checkpoint.rglob("*"))[::2]:
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize("damage", [cut_data, flip_data, flip_description, delete_files])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(damage, killed, reference, go_on, tmp_path):
    directory = copy(killed.image, tmp_path / "run")
    before, newest = saved(directory)
    damage(directory / "checkpoints" / str(newest))
    damaged = files(directory / "checkpoints" / str(newest))
    ended = go_on(directory)
    finished(ended, directory)
    aside = directory / "damaged" / f"{newest}-0"
    first, second = ended.out.splitlines()[:2]
    assert first.startswith(f"tiny: checkpoint {newest} is damaged (")
    assert first.endswith(f"moved to {aside.absolute()}, going back to the one before")
    assert second == f"tiny: continuing from step {before}"
    assert files(aside) == damaged
    assert_same(directory, reference)


def test_of_damage_only_one_line_is_said(killed, home, reference):
    directory = copy(killed.image, home.folder / "noisy-damage")
    before, newest = saved(directory)
    truncate(largest(directory / "checkpoints" / str(newest) / "params" / "d"))
    ended = home.command(directory.name)
    finished(ended, directory)
    assert ended.err == ""
    aside = f"{directory}/damaged/{newest}-0"
    why = "its params cannot be read"
    first = f"tiny: checkpoint {newest} is damaged ({why}); moved to {aside}, going back to the one before"
    assert ended.out.splitlines()[:2] == [first, f"tiny: continuing from step {before}"]
    assert_same(directory, reference)


def test_a_run_goes_on_from_what_is_left_of_its_checkpoints(killed, reference, go_on, tmp_path):
    directory = copy(killed.image, tmp_path / "run")
    before, newest = saved(directory)
    shutil.rmtree(directory / "checkpoints" / str(newest))
    ended = go_on(directory)
    finished(ended, directory)
    assert ended.out.splitlines()[0] == f"tiny: continuing from step {before}"
    assert_same(directory, reference)


def test_a_run_whose_checkpoints_are_all_damaged_starts_from_the_beginning(killed, reference, go_on, tmp_path):
    directory = copy(killed.image, tmp_path / "run")
    steps = saved(directory)
    for step in steps:
        flip_data(directory / "checkpoints" / str(step))
    ended = go_on(directory)
    finished(ended, directory)
    lines = ended.out.splitlines()
    for line, step in zip(lines, reversed(steps), strict=False):
        assert line.startswith(f"tiny: checkpoint {step} is damaged (the bits of its ")
    assert lines[2] == "tiny: no checkpoint to continue from, starting from the beginning"
    assert sorted(p.name for p in (directory / "damaged").iterdir()) == [f"{step}-0" for step in steps]
    assert_same(directory, reference)


def small_state(seed: int) -> dict:
    draw = np.random.default_rng(seed)
    weights = jnp.asarray(draw.normal(size=(48, 32)), jnp.float32)
    return {
        "params": {"w": weights, "half": weights[:8].astype(jnp.bfloat16)},
        "opt": {"m": weights * 0.1, "count": jnp.asarray(seed, jnp.int32)},
    }


def host(seed: int) -> dict:
    return {"skipped": [], "sums": {"loss": 0.1 + seed}, "guard": {"mean": 1 / 3, "seen": seed}}


@pytest.fixture
def two_checkpoints(tmp_path):
    """A folder with the checkpoints of steps 1 and 2."""
    with jax.set_mesh(meshes.make({"data": 1, "model": 1})):
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=2)
        for step in (1, 2):
            checkpoints.save(step, small_state(step), host(step))
        checkpoints.close()
        yield tmp_path / "checkpoints"


def restored(folder: Path) -> tuple[int, list[str]]:
    """The step that a restore gives, whose content must be what was written, and what it said."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), small_state(0))
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep_last=2)
    try:
        found = checkpoints.restore(abstract, said.append)
    finally:
        checkpoints.close()
    assert found is not None
    step, state, plain = found
    wanted = small_state(step)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert plain == host(step)
    return step, said


def test_whatever_happens_to_a_file_no_other_numbers_come_back(two_checkpoints, tmp_path):
    assert restored(two_checkpoints) == (2, [])
    pristine = copy(two_checkpoints, tmp_path / "pristine")
    names = [name for name in sorted(files(pristine / "2")) if not name.startswith("opt/")]  # as params/
    draw, seen = random.Random(0), {}
    for name in names:
        size = (pristine / "2" / name).stat().st_size
        places = size // 2, draw.randrange(size)
        harms = [lambda path, at=at: flip(path, at, draw.randrange(8)) for at in places]
        for harm in [*harms, truncate, Path.unlink]:
            shutil.rmtree(tmp_path / "checkpoints")
            shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
            copy(pristine, two_checkpoints)
            harm(two_checkpoints / "2" / name)
            step, said = restored(two_checkpoints)
            assert (tmp_path / "damaged").exists() == bool(said) == (step == 1)
            seen.setdefault(name, []).append(step)
    for name, steps in seen.items():
        if "/d/" in name or name == "_CHECKPOINT_METADATA":
            assert steps[-2:] == [1, 1], name  # that a file of content was cut or deleted is noticed
    data = max(names, key=lambda name: (pristine / "2" / name).stat().st_size)
    assert 1 in seen[data][:-2]


def test_a_checkpoint_whose_arrays_were_exchanged_is_not_used(two_checkpoints, tmp_path):
    for name in ("params", "opt"):
        shutil.rmtree(two_checkpoints / "2" / name)
        copy(two_checkpoints / "1" / name, two_checkpoints / "2" / name)
    step, said = restored(two_checkpoints)
    assert step == 1
    assert re.match(
        r"checkpoint 2 is damaged \(the bits of its (params|opt) are not those that were written\)", said[0]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int32", "uint8", "bool"])
def test_every_bit_of_every_type_is_in_the_fingerprint(dtype):
    with jax.enable_x64(dtype == "float64"):
        original = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(jnp.dtype(dtype))
        bits = 1 if dtype == "bool" else 8 * original.dtype.itemsize
        prints = {fingerprint({"leaf": jnp.asarray(original)})}
        for place, bit in itertools.product((0, 7, 14), range(bits)):
            changed = original.copy()
            changed.view(np.uint8).reshape(15, -1)[place, bit // 8] ^= 1 << bit % 8
            assert jnp.asarray(changed).dtype == dtype
            prints.add(fingerprint({"leaf": jnp.asarray(changed)}))
        assert len(prints) == 1 + 3 * bits


def test_two_flips_of_the_same_bit_do_not_cancel_in_the_fingerprint():
    original = jnp.ones((8, 8))
    flips = [original.at[0, 0].multiply(-1), original.at[0, 0].multiply(-1).at[5, 3].multiply(-1)]
    swapped = original.at[0, 1].set(2.0), original.at[1, 0].set(2.0)
    assert len({fingerprint({"leaf": leaf}) for leaf in (original, *flips, *swapped)}) == 5


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_fingerprint_is_the_same_on_every_mesh(dtype):
    with jax.enable_x64(dtype == "float64"):
        leaf = np.random.default_rng(0).normal(size=(8, 12)).astype(jnp.dtype(dtype))
        prints = set()
        for data, model in ((1, 1), (4, 2), (2, 4)):
            mesh = meshes.make({"data": data, "model": model})
            with jax.set_mesh(mesh):
                for spec in (jax.P(), jax.P("data", "model"), jax.P("model", None)):
                    prints.add(fingerprint({"leaf": jax.device_put(leaf, jax.NamedSharding(mesh, spec))}))
        assert len(prints) == 1


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dim", 48, r".*\.embed is float32\[300, 32\] there and float32\[300, 48\] here"),
        ("norm", "sub", r".*\.attn\.sub_norm\.scale is absent there and float32\[1, 32\] here"),
    ],
)
def test_other_shapes_are_an_error_and_not_damage(field, value, says, killed, home, capsys, monkeypatch, tmp_path):
    from fbi.cli import main

    directory = copy(killed.image, tmp_path / "run")
    config = json.loads((directory / "config.json").read_text())
    config["run"]["model"][field] = value
    (directory / "config.json").write_text(json.dumps(config))
    checkpoints, record = files(directory / "checkpoints"), (directory / "metrics.jsonl").read_bytes()
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
    capsys.readouterr()
    assert main(["train", str(directory), "--mesh", "data=1"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    newest = saved(directory)[-1]
    assert re.match(f"fbi: error: checkpoint {newest} of {directory}/checkpoints is of another model: {says}", said.err)
    assert said.out == ""
    assert files(directory / "checkpoints") == checkpoints
    assert (directory / "metrics.jsonl").read_bytes() == record
    assert not (directory / "damaged").exists()


def test_the_guard_sees_what_is_not_finite_at_once():
    guard = Guard(GuardConfig())
    assert guard.fault(math.nan, 1.0) == "loss is nan"
    assert guard.fault(math.inf, 1.0) == "loss is inf"
    assert guard.fault(1.0, math.inf) == "gradient norm is inf"
    assert guard.fault(1.0, math.nan) == "gradient norm is nan"
    assert guard.state == {"mean": 0.0, "seen": 0}


def test_the_guard_sees_a_spike_once_the_mean_has_settled():
    guard = Guard(GuardConfig(spike=0.5))
    losses = [6.0 - 0.1 * n for n in range(SETTLE)]
    assert guard.fault(losses[0], 1.0) is None
    assert guard.fault(99.0, 1.0) is None  # too early to tell
    guard = Guard(GuardConfig(spike=0.5))
    for loss in losses:
        assert guard.fault(loss, 1.0) is None
    assert guard.state == {"mean": pytest.approx(np.mean(losses)), "seen": SETTLE}
    before = guard.state
    assert guard.fault(guard.mean + 0.501, 1.0).endswith(f"is more than 0.5 above its running mean {guard.mean:.4f}")
    assert guard.state == before  # a spike is no part of the mean
    assert guard.fault(guard.mean + 0.499, 1.0) is None
    assert guard.mean == pytest.approx(before["mean"] + (1 - MEMORY) * 0.499)
    again = Guard(GuardConfig(spike=0.5))
    again.state = json.loads(json.dumps(guard.state))
    assert again.state == guard.state


@pytest.fixture(scope="session")
def spiky(home):
    """A run of batches of one window, of which exactly one, at position SETTLE + 5, is noise: a spike of the data."""
    corpus = write_corpus(home.folder / "noisy")
    draw = random.Random(1)
    (corpus / "noise.txt").write_text("".join(draw.choices("QXZJVKWYFGHBCDELMPRU#@%&*!?$~^+=<>|1234567890", k=100)))
    run = tiny(corpus, data={"batch": 1}, optimizer={"lr": 0.02}, guard={"spike": 3.0}, name="spiky")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
        windows = prepare(run.data)
    tokens = np.stack([windows.read("train", index) for index in range(windows.count("train"))])
    surprise = -np.log(np.bincount(tokens.ravel())[tokens] / tokens.size).mean(1)
    noise = set(np.flatnonzero(surprise > (surprise.min() + surprise.max()) / 2))
    assert 1 <= len(noise) <= 10
    for seed in range(10_000):
        batches = Batches(windows, batch=1, seed=seed)
        if [p for p in range(2 * STEPS) if batches.indices_at(p)[0] in noise] == [SETTLE + 5]:
            return dataclasses.replace(run, data=dataclasses.replace(run.data, seed=seed)), windows
    raise AssertionError("no seed puts noise at that position alone")


def replayed(run, windows, skipped) -> list[float]:
    """The losses of a run's steps on the data outside `skipped`, by the step alone: no loop, guard or checkpoint."""
    model = build_model(run)
    tx = optim.build(run.optimizer, run.steps)
    mesh, losses = meshes.make({"data": 1, "model": 1}), []
    batches = Batches(windows, batch=run.data.batch, seed=run.data.seed, skipped=skipped)
    with jax.set_mesh(mesh):
        params = starting_params(run, model, lambda: pytest.fail("nothing is learned of activations"))
        state = {"params": params, "opt": jax.jit(tx.init)(params)}
        step = make_step(model, Loss.parse(run.loss), tx)
        for number in range(run.steps):
            tokens = meshes.put_batch(batches.batch_at(number), mesh)
            state, sums = step(state, None, tokens, jax.device_put(np.float32(number / run.steps)))
            losses.append(float(sums["loss"]) / float(sums["count"]))
    return losses


# With a checkpoint every 5 steps the spike comes one step after one, which is still being written.
@pytest.mark.parametrize("every", [EVERY, 5])
def test_after_a_spike_a_run_goes_back_skips_the_data_and_finishes(every, spiky, go_on, tmp_path):
    run, windows = spiky
    directory, spike = tmp_path / "run", SETTLE + 5  # the data position; its step is one more
    options = ("--checkpoint_every", str(every), "--log_every", "1", "--eval_every", "0")
    ended = go_on(directory, *options, config=write_config(tmp_path / "config.json", run))
    finished(ended, directory)
    back = spike // every * every
    assert f"spiky: at step {spike + 1} loss " in ended.out
    assert f"spiky: continuing from step {back}\n" in ended.out
    [event] = rows(directory, "event")
    assert event["step"] == back
    assert event["what"] == "returned"
    assert event["text"].endswith(f"; back to step {back}, batches {back} to {spike} skipped")
    assert [row["step"] for row in rows(directory, "train")] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in rows(directory, "train")]
    assert losses == replayed(run, windows, [(back, spike + 1)])
    assert max(losses[SETTLE:]) < 6 < max(replayed(run, windows, []))
    assert not (directory / "damaged").exists()
    assert json.loads((directory / "checkpoints" / str(STEPS) / "_CHECKPOINT_METADATA").read_text())["custom_metadata"][
        "host"
    ]["skipped"] == [[back, spike + 1]]


def test_a_run_that_spikes_again_and_again_is_given_up_for_good(home, go_on, tmp_path):
    fields = to_json(tiny(home.corpus, name="wild", guard={"spike": 0.3, "retries": 2}))
    fields["optimizer"] |= {"lr": 30.0, "warmup": SETTLE + 4, "clip": 0.0}  # it diverges on any data
    config = write_config(tmp_path / "config.json", from_json(type(tiny(home.corpus)), fields))
    directory = tmp_path / "run"
    for _ in range(2):  # the same command comes to the same end
        ended = go_on(directory, "--checkpoint_every", "7", "--eval_every", "0", config=config)
        assert ended.code == 2
        assert ended.err.count("\n") == 1
        assert ended.err.startswith("fbi: error: wild: at step ")
        assert "after 2 returns to a checkpoint; lower optimizer.lr, or raise guard.retries or guard.spike" in ended.err
        assert ended.out.count("returning to the last checkpoint and skipping the data since") in (0, 2)
        events = rows(directory, "event")
        assert len(events) == 2
        assert not (directory / "done.json").exists()


def test_returns_of_a_run_count_over_all_its_processes(spiky, go_on, tmp_path):
    run, _ = spiky
    run = dataclasses.replace(run, guard=dataclasses.replace(run.guard, retries=0))
    ended = go_on(tmp_path / "run", config=write_config(tmp_path / "config.json", run))
    assert ended.code == 2
    assert "after 0 returns" in ended.err


def test_a_checkpoint_keeps_what_it_was_given_although_the_loop_goes_on(tmp_path):
    with jax.set_mesh(meshes.make({"data": 1, "model": 1})):
        checkpoints = Checkpoints(tmp_path / "checkpoints")
        given = host(1)
        checkpoints.save(1, small_state(1), given)
        given["sums"]["loss"] = math.pi  # while it is being written
        given["guard"]["seen"] += 1
        checkpoints.close()
        assert restored(tmp_path / "checkpoints") == (1, [])


def test_parameters_of_a_damaged_checkpoint_are_refused(killed, tmp_path):
    import fbi

    directory = copy(killed.image, tmp_path / "run")
    newest = saved(directory)[-1]
    data = max((directory / "checkpoints" / str(newest) / "params").rglob("*"), key=lambda p: p.stat().st_size)
    flip(data, data.stat().st_size // 2)
    before = files(directory)
    with pytest.raises(InputError, match=f"checkpoint {newest} of .* is damaged: "):
        fbi.load(directory)
    assert files(directory) == before
    fbi.load(directory, step=saved(directory)[0])

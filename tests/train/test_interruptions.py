"""A run that is interrupted, however and wherever, comes to the numbers of the run that is not."""

import json
import os
import signal

import pytest
from support import (
    EVERY,
    STEPS,
    amid,
    assert_same,
    copy,
    files,
    finished,
    last_step,
    rows,
    saved,
    temporaries,
    tiny,
    write_config,
)

import fbi
from fbi.files import read_json
from fbi.train import compose

pytestmark = pytest.mark.slow


def test_a_run_records_every_step_once(reference):
    assert [row["step"] for row in rows(reference, "train")] == [*range(5, STEPS, 5), STEPS]
    assert [row["step"] for row in rows(reference, "eval")] == list(range(0, STEPS + 1, 3))
    sites = [f"layers.0.{name}" for name in ("attn.k", "attn.o", "attn.q", "attn.v", "mlp.down", "mlp.gate", "mlp.up")]
    for step in range(0, STEPS + 1, 3):
        scales = [row for row in rows(reference, "scales") if row["step"] == step]
        assert [row["site"] for row in scales] == sites
        assert all(row.keys() == {"kind", "step", "site", "alpha", "beta"} for row in scales)
    assert saved(reference) == [STEPS - EVERY, STEPS]
    assert rows(reference, "train")[-1]["loss"] < rows(reference, "train")[0]["loss"] - 1


def test_a_killed_run_continues_to_the_same_numbers(home, killed, reference):
    assert killed.ended.code == -signal.SIGKILL
    assert amid(killed.image)
    assert not (killed.image / "done.json").exists()
    ended = home.command(killed.name)
    finished(ended, killed.directory)
    assert f"tiny: continuing from step {saved(killed.image)[-1]}\n" in ended.out
    assert_same(killed.directory, reference)


def test_a_second_process_is_refused_while_the_first_is_alive(killed):
    assert killed.rival.code == 2
    assert killed.rival.err.count("\n") == 1
    assert f"{killed.directory} is in use by another process" in killed.rival.err
    assert killed.rival.out == ""
    assert not killed.touched
    # that the kill leaves no lock behind is seen where the run continues


def test_a_run_killed_while_it_writes_a_checkpoint_continues_to_the_same_numbers(home, half_written, reference):
    assert half_written.ended.code == -signal.SIGKILL
    broken = {path.name.split(".")[0] for path in temporaries(half_written.image)}
    whole = saved(half_written.image)
    assert broken
    assert not broken & set(map(str, whole))
    assert last_step(half_written.image) < STEPS
    ended = home.command(half_written.name, "--checkpoint_every", "3")
    finished(ended, half_written.directory)
    if whole:
        assert f"continuing from step {whole[-1]}\n" in ended.out
    assert temporaries(half_written.directory) == []
    assert_same(half_written.directory, reference)


def test_reading_a_run_leaves_alone_what_its_process_is_writing(half_written, tmp_path):
    directory = copy(half_written.image, tmp_path / "run")
    assert saved(directory)
    before = files(directory)
    fbi.load(directory)
    assert temporaries(directory)
    assert files(directory) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_its_step_and_exit_code_75(number, home, reference, go_on):
    for trial in range(5):
        name = f"{number.name}-{trial}"
        directory = home.folder / name
        with home.process(name) as process:
            process.until(lambda d=directory: last_step(d) >= EVERY + 1)
            process.send(number)
            ended = process.end()
        step = saved(directory)[-1]
        if ended.code == 75 and step % EVERY:
            break
        print(f"trial {trial} missed: step {step}, {ended}")  # shown with a failure
    assert ended.code == 75, ended.err
    assert ended.err == f"fbi: stopped at step {step}; the same command continues\n"
    assert EVERY < step < STEPS
    assert step % EVERY
    assert last_step(directory) <= step
    assert temporaries(directory) == []
    assert not (directory / "done.json").exists()
    ended = go_on(directory)
    finished(ended, directory)
    assert f"continuing from step {step}\n" in ended.out
    assert_same(directory, reference)


def test_a_signal_during_an_evaluation_also_leaves_a_checkpoint_of_its_step(home, reference, go_on, monkeypatch):
    directory, seen, evaluate = home.folder / "evaluating", [], compose.evaluate

    def interrupted(*args, **options):
        seen.append(last_step(directory))
        if len(seen) == 4:  # of step 9, which is due for no checkpoint
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(compose, "evaluate", interrupted)
        ended = go_on(directory)
    step = saved(directory)[-1]
    assert len(seen) == 4
    assert (ended.code, ended.err) == (75, f"fbi: stopped at step {step}; the same command continues\n")
    assert 9 <= step <= 10
    finished(go_on(directory), directory)
    assert_same(directory, reference)


@pytest.mark.parametrize("kept", [lambda line: line[: len(line) // 2], lambda line: line[:-1]])
def test_a_torn_last_line_is_cut(kept, killed, reference, go_on, tmp_path):
    directory = copy(killed.image, tmp_path / "run")
    record = directory / "metrics.jsonl"
    *whole, last = record.read_bytes().splitlines(keepends=True)
    assert json.loads(last)["step"] > saved(directory)[-1]
    record.write_bytes(b"".join(whole) + kept(last))
    finished(go_on(directory), directory)
    assert_same(directory, reference)


def test_a_run_stopped_between_its_last_checkpoint_and_its_result_gets_the_same_result(reference, go_on, tmp_path):
    directory = copy(reference, tmp_path / "run")
    (directory / "done.json").unlink()
    record = (directory / "metrics.jsonl").read_bytes()
    finished(go_on(directory), directory)
    assert (directory / "metrics.jsonl").read_bytes() == record
    assert_same(directory, reference)


def test_a_finished_run_started_again_does_nothing(home, reference, half_written):
    assert "Compiling" in half_written.ended.err  # with JAX_LOG_COMPILES, JAX says there what it compiles
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.name != ".lock"}
    ended = home.command("reference", JAX_LOG_COMPILES="1")
    assert ended.code == 0
    assert ended.out.startswith(f"tiny: done, {STEPS} steps, validation ")
    assert ended.err == ""
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.name != ".lock"} == before


def test_a_directory_of_another_run_is_refused_with_the_fields_that_differ(home, killed, go_on, tmp_path):
    directory = copy(killed.image, tmp_path / "run")
    before = files(directory)
    other = write_config(tmp_path / "other.json", tiny(home.corpus, data={"seed": 1}, optimizer={"lr": 0.02}))
    ended = go_on(directory, config=other)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "it differs in data.seed: 0 -> 1; optimizer.lr: 0.01 -> 0.02." in ended.err
    assert ended.out == ""
    assert files(directory) == before


def test_a_run_continues_on_another_mesh(home):
    config = write_config(home.folder / "double.json", tiny(home.corpus, model={"dtype": "float64"}))
    environment = {"JAX_ENABLE_X64": "1", "JAX_NUM_CPU_DEVICES": "8"}
    whole, halves = home.folder / "one-mesh", home.folder / "two-meshes"
    with home._replace(config=config).process(whole.name, **environment) as process:
        assert process.caught(lambda: amid(whole)), process.words
        copy(whole, halves)  # what a kill at this moment would leave
        process.send(signal.SIGCONT)
        finished(process.end(), whole)
    step = saved(halves)[-1]
    assert read_json(halves / "env.json")["execution"]["mesh"] == "data=1"
    ended = home._replace(config=config).command(halves.name, "--mesh", "data=4,model=2", **environment)
    finished(ended, halves)
    assert f"continuing from step {step}\n" in ended.out
    assert read_json(halves / "env.json")["execution"]["mesh"] == "data=4,model=2"
    assert len(read_json(halves / "env.json")["devices"]) == 8
    for kind in ("train", "eval"):
        ours, theirs = rows(halves, kind), rows(whole, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=0, abs=1e-9)

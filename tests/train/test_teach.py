"""Learning from a table of what a teacher said: made by real processes, some of them killed."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from support import (
    Process,
    assert_same,
    copy,
    files,
    last_step,
    params,
    rows,
    saved,
    tiny,
    write_config,
)

import fbi
from fbi.cli import main
from fbi.data import prepare
from fbi.data.table import META, Rows, Table
from fbi.errors import InputError
from fbi.train import Execution

pytestmark = pytest.mark.slow

EXECUTION = Execution(mesh="data=1", log_every=1, checkpoint_every=2, eval_every=0)
ON_ONE = ("--mesh", "data=1", "--batch", "8", "--shard", "16")
STEPS = 6
MASKED = {"mask_documents": True}
SHUFFLED = MASKED | {"seed": 3}
KEPT = 40
LUMPED = ("--k", str(KEPT), "--drawn", "0")


@pytest.fixture(scope="module", autouse=True)
def cache(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
        yield


@pytest.fixture(scope="module")
def teacher(home):
    directory = home.folder / "tutor"
    fbi.train(tiny(home.corpus, policy="fp", steps=24, data=MASKED), directory, EXECUTION)
    return directory


def made(teacher: Path, out: Path, *options: str) -> Table:
    assert main(["teach", str(teacher), "--out", str(out), *ON_ONE, *options]) == 0
    return Table(out)


@pytest.fixture(scope="module")
def table(home, teacher):
    return made(teacher, home.folder / "table", *LUMPED)


def student(home, taught: Path, **fields):
    return tiny(home.corpus, **{"loss": "mix", "teacher": str(taught), "steps": STEPS, "data": MASKED, **fields})


def refused(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fbi: error: ")
    assert error.count("\n") == 1
    return error


def trained(run, directory: Path) -> Path:
    fbi.train(run, directory, EXECUTION)
    return directory


@pytest.fixture(scope="module")
def live(home, teacher):
    """A student whose teacher is in memory."""
    return trained(student(home, teacher, policy="fp", data=SHUFFLED), home.folder / "live")


@pytest.fixture(scope="module")
def whole(home, teacher):
    """The table of every token in float32."""
    return made(teacher, home.folder / "whole", "--k", "300", "--dtype", "float32")


def test_with_every_token_kept_it_is_the_live_teacher(home, teacher, live, whole, capsys):
    """The same record: the losses of every step, and so the order of windows and the masks of documents."""
    half = made(teacher, home.folder / "whole-float16", "--k", "300")
    said = capsys.readouterr().out
    assert f"the 300 likeliest of 300; {sum(r['bytes'] for r in half.meta['shards']) / 1e6:.1f} MB, " in said
    assert f"{half.meta['bytes_per_token']:.1f} bytes/token ({300 * (2 + 2) + 2} before" in said
    for table, tolerance in ((whole, 2e-5), (half, 1e-3)):
        offline = home.folder / f"offline-{table.layout.dtype}"
        trained(student(home, table.folder, policy="fp", data=SHUFFLED), offline)
        for ours, theirs in zip(rows(offline, "train"), rows(live, "train"), strict=True):
            for name in ("loss", "ce", "ad", "floor"):
                assert ours[name] == pytest.approx(theirs[name], rel=tolerance), (table.layout.dtype, name)


def test_documents_are_masked_as_in_live_teaching(home, teacher, table):
    """Where attention may cross documents, other things are said after a separator, and nowhere else."""
    windows = prepare(tiny(home.corpus, data=MASKED).data)
    crossing = made(teacher, home.folder / "crossing", *LUMPED, "--set", "data.mask_documents=false")
    every = range(windows.count("train"))
    tokens = np.stack([windows.read("train", at)[:-1] for at in every])
    later = np.cumsum(tokens == windows.tokenizer.separator, 1) > 0
    off = np.abs(table.rows(every).logp[..., 0] - crossing.rows(every).logp[..., 0])
    assert 0 < later.mean() < 0.5
    assert off[later].mean() > 10 * off[~later].mean()


def test_a_killed_teacher_goes_on_and_writes_the_same_bytes(home, teacher, table):
    out = home.folder / "killed-table"
    arguments = ["teach", str(teacher), "--out", str(out), *ON_ONE, *LUMPED, "--line_every", "0"]
    there = lambda: len(list((out / "shards").glob("*.array_record")))
    with Process(arguments, home.folder / "teach-said", home.environment) as process:
        assert process.caught(lambda: 2 <= there() < len(table.meta["shards"]) and any((out / "shards").glob(".*")))
        process.send(signal.SIGKILL)
        ended = process.end()
    assert ended.code == -signal.SIGKILL
    assert "teach: window" in ended.out
    assert "tokens/s" in ended.out
    assert " left" in ended.out
    kept = files(out / "shards")
    whole = [name for name in kept if not name.startswith(".")]
    assert len(whole) == there() < len(table.meta["shards"])
    changed = {path: path.stat().st_mtime_ns for path in map((out / "shards").joinpath, whole)}
    assert made(teacher, out, *LUMPED).hash == table.hash
    assert {path: path.stat().st_mtime_ns for path in changed} == changed  # none of these was made again
    mine, theirs = files(out), files(table.folder)
    assert mine == theirs
    assert made(teacher, out, *LUMPED).hash == table.hash  # finished, it does nothing
    assert files(out) == mine


def test_tokens_drawn_from_the_tail_teach_and_are_drawn_again_alike(home, teacher, table, whole, capsys):
    out = home.folder / "drawn"
    assert made(teacher, home.folder / "quarter", "--k", str(KEPT)).layout.drawn == KEPT // 4
    drawn = made(teacher, out, "--k", str(KEPT), "--drawn", "30")
    assert f"the {KEPT - 30} likeliest of 300 and 30 drawn from the others; " in capsys.readouterr().out
    assert drawn.layout == dataclasses.replace(table.layout, drawn=30)
    every = range(drawn.windows)
    found, true = drawn.rows(every), whole.rows(every)
    np.testing.assert_allclose(np.exp(found.logp.astype(float)).sum(-1), 1, atol=2e-3)
    spread = lambda kept: np.bincount(kept.indices.ravel(), np.exp(kept.logp.astype(float)).ravel(), 300)
    off = np.abs(spread(found) - spread(true)).sum() / spread(true).sum()
    likeliest = Rows(found.indices[..., :10], found.logp[..., :10], None)
    assert 0 < off < 0.05 * np.abs(spread(likeliest) - spread(true)).sum() / spread(true).sum()
    before = files(out)
    (out / META).unlink()
    (out / "shards" / "00001.array_record").unlink()
    assert made(teacher, out, "--k", str(KEPT), "--drawn", "30").hash == drawn.hash
    assert files(out) == before
    record = rows(trained(student(home, out, loss="ad + 0.1*kl", steps=20), home.folder / "by-draws"), "train")
    assert record[-1]["ad"] < record[0]["ad"]
    refusal = student(home, out, loss="ad + rkl")
    with pytest.raises(InputError, match=r"rkl as given would be biased by the table .* with --drawn 0"):
        fbi.train(refusal, home.folder / "biased", EXECUTION)
    assert not (home.folder / "biased").exists()


def test_a_student_without_its_teacher_learns_and_goes_on_after_a_kill(home, teacher, table):
    """The teacher's directory is away while the student trains: nothing of it can be read."""
    away = teacher.rename(home.folder / "elsewhere")
    try:
        run = student(home, table.folder, loss="ad", steps=20)
        reference = trained(run, home.folder / "taught")
        config = write_config(home.folder / "taught.json", run)
        directory = home.folder / "taught-killed"
        execution = ("--mesh", "data=1", "--log_every", "1", "--checkpoint_every", "2", "--eval_every", "0")
        arguments = ["train", str(directory), "--config", str(config), *execution]
        with Process(arguments, home.folder / "taught-said", home.environment) as process:
            assert process.caught(lambda: bool(saved(directory)) and 0 < last_step(directory) < run.steps)
            process.send(signal.SIGKILL)
            assert process.end().code == -signal.SIGKILL
        assert 0 < saved(directory)[-1] < run.steps
        with Process(arguments, home.folder / "taught-said", home.environment) as process:
            assert process.end().code == 0, process.words
    finally:
        away.rename(teacher)
    assert_same(directory, reference)
    told = json.loads((directory / "teacher.json").read_text())
    assert told == {"table": table.hash, **table.meta["teacher"]}
    assert told["run"] == json.loads((teacher / "done.json").read_text())["hash"]
    assert told["step"] == saved(teacher)[-1]
    record = rows(directory, "train")
    assert record[-1]["ad"] < record[0]["ad"]
    assert all(row["ad"] > row["floor"] for row in record)  # Gibbs
    assert params(directory).keys() == params(home.folder / "taught").keys()


def test_diagnostics_parts_and_chunks_of_a_batch_work_from_a_table(home, live, whole):
    run = student(home, whole.folder, policy="fp", data=SHUFFLED, steps=1)
    execution = Execution(
        mesh="data=2", accumulate=2, loss_chunk=8, eval_every=0, diagnose_every=1, log_every=1,
        diagnostics="activations",
    )  # fmt: skip
    fbi.train(run, home.folder / "spread", execution)
    (ours,), theirs = rows(home.folder / "spread", "train"), rows(live, "train")[0]
    for name in ("loss", "ce", "ad", "floor", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert "layers.0.mlp.up" in {row["site"] for row in rows(home.folder / "spread", "diagnostics")}


def test_a_table_of_other_data_or_of_another_teacher_is_refused(home, teacher, table, capsys):
    config = write_config(home.folder / "student.json", student(home, table.folder))

    def train(*settings: str) -> str:
        options = [text for setting in settings for text in ("--set", setting)]
        error = refused(capsys, "train", home.folder / "refused", "--config", config, "--mesh", "data=1", *options)
        assert not (home.folder / "refused").exists()
        return error

    assert "tokenizer is " in train("data.tokenizer=bpe:290")
    assert "window is 16 there, 8 here; set data.window as it is there" in train("data.window=8")
    assert "mask_documents is True there, False here" in train("data.mask_documents=false")
    assert "corpus is " in train("data.validation=0.3")
    assert "hidden looks at features of the teacher" in train("loss=ad + hidden")
    assert f"top_k=5 has no use with the table {table.folder}, which holds the {KEPT}" in train("loss=ad:top_k=5")

    begun = trained(student(home, table.folder, steps=1), home.folder / "begun")
    (begun / "done.json").unlink()
    other = copy(table.folder, home.folder / "other-table")
    told = json.loads((other / META).read_text())
    told["teacher"]["run"] = "0123456789ab"
    (other / META).write_text(json.dumps(told))
    moved = table.folder.rename(home.folder / "set-aside")
    try:
        other.rename(table.folder)
        error = refused(capsys, "train", begun, "--mesh", "data=1")
        assert "was begun with another teacher (run " in error
        assert "holds now (run 0123456789ab at step 24" in error
        shard = table.folder / "shards" / "00001.array_record"
        shard.write_bytes(shard.read_bytes()[:-1])
        assert "is damaged: 00001.array_record has" in train()
        (table.folder / META).unlink()
        assert "is an unfinished table of a teacher: it has no meta.json; `fbi teach` with the same" in train()
    finally:
        shutil.rmtree(table.folder)
        moved.rename(table.folder)


def test_what_cannot_be_taught_is_refused(home, teacher, table, capsys):
    def teach(out: Path, *options: str) -> str:
        return refused(capsys, "teach", teacher, "--out", out, "--mesh", "data=1", "--shard", "16", *options)

    new = home.folder / "new"
    assert "layout.k: 40 -> 39. Use another directory" in teach(table.folder, "--k", "39", "--drawn", "0")
    assert "differs in layout.drawn: 0 -> 10. Use" in teach(table.folder, "--k", "40")
    assert "tokenizer" in teach(new, "--k", "4", "--set", "data.tokenizer=bpe:290")
    assert "k=301 must be at least 1 and at most the vocabulary of 300 tokens" in teach(new, "--k", "301")
    assert "unknown type of log-probabilities 'int8'" in teach(new, "--k", "4", "--dtype", "int8")
    assert "fbi teach takes fields of the data alone" in teach(new, "--set", "steps=3")
    assert "batch=0 must be at least 1" in teach(new, "--batch", "0", "--k", "4")
    assert "is neither empty nor a table of a teacher" in teach(teacher, "--k", "4")
    assert "is not a run directory" in refused(capsys, "teach", home.folder / "nowhere", "--out", new)

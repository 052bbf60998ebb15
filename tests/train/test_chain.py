"""Runs that teach each other: each link starts from the one before and learns from it, in real training."""

import json

import pytest
from support import params, rows, tiny

import fbi
from fbi.errors import InputError
from fbi.experiment import chain
from fbi.train import Execution
from fbi.train.compose import check

pytestmark = pytest.mark.slow

EXECUTION = Execution(mesh="data=1", log_every=1, eval_every=3)


def test_a_link_starts_from_the_one_before_and_learns_from_it(home, monkeypatch):
    monkeypatch.setenv("FBI_CACHE", home.environment["FBI_CACHE"])
    run = tiny(home.corpus, steps=3, loss="kl + 0.1*hidden", model={"layers": 2})
    links = chain(run, ["fp", "fp", "layers.*: w=fbi"], home.folder / "chain")
    for directory, link in links:
        fbi.train(link, directory, EXECUTION)
    records = [rows(directory, "train") for directory, _ in links]
    assert [set(record[0]) & {"kl", "hidden"} for record in records] == [set(), {"kl", "hidden"}, {"kl", "hidden"}]
    for record in records[1:]:
        for row in record:
            assert row["loss"] == pytest.approx(row["kl"] + 0.1 * row["hidden"], rel=1e-4, abs=1e-6)
    # The second link is its teacher at first: no distance, and the validation loss the first one ended with.
    assert abs(records[1][0]["kl"]) < 1e-6
    assert records[1][0]["hidden"] < 1e-6
    evaluated = [rows(directory, "eval") for directory, _ in links]
    done = [json.loads((directory / "done.json").read_text())["loss"] for directory, _ in links]
    assert evaluated[1][0]["step"] == 0
    assert evaluated[1][0]["loss"] == pytest.approx(done[0], rel=1e-6)
    assert done[0] < evaluated[0][0]["loss"]
    # The third has the same weights in one bit, some way from its teacher, and trains the scales of that bit.
    assert records[2][0]["kl"] > 1e-4
    assert records[2][0]["hidden"] > 1e-2
    assert any(name.endswith("['alpha']") for name in params(links[2][0]))


def test_links_differ_in_what_makes_a_chain_and_in_nothing_else(home):
    run = tiny(home.corpus, loss="kl", name="bits")
    first, second, third = chain(run, ["fp", "bitnet-b158", "fbi"], "runs/chain")
    assert [str(directory) for directory, _ in (first, second, third)] == [f"runs/chain/{i}" for i in range(3)]
    fields = ("name", "policy", "loss", "start", "teacher")
    assert [[getattr(link, name) for name in fields] for _, link in (first, second, third)] == [
        ["bits-0", "fp", "ce", "", ""],
        ["bits-1", "bitnet-b158", "kl", "runs/chain/0", "runs/chain/0"],
        ["bits-2", "fbi", "kl", "runs/chain/1", "runs/chain/1"],
    ]
    for _, link in (first, second, third):
        assert {f: getattr(link, f) for f in ("model", "data", "optimizer", "steps", "seed")} == {
            f: getattr(run, f) for f in ("model", "data", "optimizer", "steps", "seed")
        }
    taught = tiny(home.corpus, loss="kl", teacher="runs/t", start="runs/s")
    assert [(link.loss, link.teacher, link.start) for _, link in chain(taught, ["fbi", "fbi"], "c")] == [
        ("kl", "runs/t", "runs/s"), ("kl", "c/0", "c/0"),
    ]  # fmt: skip
    alone = chain(tiny(home.corpus, loss="ce"), ["fp", "fbi"], "c")[1][1]
    assert (alone.start, alone.teacher) == ("c/0", "")  # weights go down the chain, and no loss asks for a teacher


def test_what_cannot_be_a_chain_or_a_part_of_a_batch_is_refused(home):
    with pytest.raises(InputError, match="a chain of runs needs at least one policy"):
        chain(tiny(home.corpus), [], "c")
    run = tiny(home.corpus, loss="ce + cakld", teacher="runs/t")
    check(run, Execution(mesh="data=1"))
    with pytest.raises(InputError, match="cakld looks at the whole batch, which accumulate=2 computes in parts"):
        check(run, Execution(mesh="data=1", accumulate=2))
    with pytest.raises(InputError, match="cakld looks at the whole batch, which loss_chunk=8 computes in parts"):
        check(run, Execution(mesh="data=1", loss_chunk=8))
    check(tiny(home.corpus, loss="cakld:beta=0.5", teacher="runs/t"), Execution(mesh="data=1", accumulate=2))

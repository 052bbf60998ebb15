"""Hashes of runs: fields that came later leave those alone that do not use them."""

import dataclasses

import pytest

from fbi.fields import hashed, later
from fbi.train.run import Run, from_json, to_json


def test_a_run_has_the_hash_that_it_had_before_fields_were_added():
    assert Run().hash == "72e93b71aeb0"
    assert from_json(Run, to_json(Run())).hash == "72e93b71aeb0"


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ({"expert": 32}, {}),
        ({"gated": False}, {}),
        ({"expert": 32, "routing": "hard"}, {}),
        ({}, {"sparsity": 0.5}),
        ({}, {"grouping": "random"}),
    ],
)
def test_a_changed_later_field_changes_the_hash(model, fields):
    run = dataclasses.replace(Run(), model=dataclasses.replace(Run().model, **model), **fields)
    assert run.hash != Run().hash
    assert from_json(Run, to_json(run)) == run
    assert {"expert": 32}.items() <= hashed(run)["model"].items() or "expert" not in model


def test_a_later_field_is_left_out_at_its_default_alone():
    @dataclasses.dataclass(frozen=True)
    class Inner:
        a: int = 1
        b: int = later(2)

    @dataclasses.dataclass(frozen=True)
    class Outer:
        inner: Inner = Inner()
        c: str = later("x")

    assert hashed(Outer()) == {"inner": {"a": 1}}
    assert hashed(Outer(Inner(b=3), "x")) == {"inner": {"a": 1, "b": 3}}
    assert hashed(Outer(Inner(a=2), "y")) == {"inner": {"a": 2}, "c": "y"}

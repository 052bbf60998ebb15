"""Goodput as reports read it."""

import json

import pytest
from run_files import write_run

from fbi.report.measure import Found, measure
from fbi.report.runs import goodput, read_run
from fbi.report.show import describe
from fbi.report.sweep import read
from fbi.report.table import run_table

# 6 s of useful steps in 10 s, then 3 s of evaluation: 6 / 13.
ROWS = [
    {"kind": "train", "step": 10, "loss": 4.0, "time_step_s": 0.3, "time_useful_s": 3.0, "time_wall_s": 6.0},
    {"kind": "train", "step": 20, "loss": 3.0, "time_step_s": 0.3, "time_useful_s": 6.0, "time_wall_s": 10.0},
    {"kind": "eval", "step": 20, "split": "validation", "loss": 3.1, "time_useful_s": 6.0, "time_wall_s": 13.0},
]


def test_the_last_row_with_both_sums_tells():
    assert goodput(ROWS) == 6.0 / 13.0
    assert goodput(reversed(ROWS)) == 6.0 / 13.0
    assert goodput(ROWS[:1]) == 0.5
    assert goodput([{"kind": "train", "time_useful_s": 1.0}, {"kind": "eval", "time_wall_s": 0.0}]) is None
    assert goodput([]) is None


@pytest.fixture
def timed(tmp_path):
    return write_run(tmp_path / "a", steps=20, metrics__jsonl="".join(json.dumps(row) + "\n" for row in ROWS))


def test_every_report_shows_it(timed):
    record = read_run(timed)
    assert measure(record, "goodput") == 6.0 / 13.0
    table = run_table([record])
    assert dict(zip([c.name for c in table.columns], table.cells()[0], strict=True))["goodput"] == "0.462"
    assert "goodput 0.46, finished" in describe(record)
    from fbi.report.sweep import overview

    (results,) = read(timed.parent)
    assert [Found("a", record).group] == [run.group for run in results.found]
    table = overview(results)
    assert dict(zip([c.name for c in table.columns], table.cells()[0], strict=True))["goodput"] == "0.462 (1)"


def test_a_run_of_an_earlier_version_has_none(tmp_path):
    record = read_run(write_run(tmp_path / "old"))
    assert measure(record, "goodput") is None
    assert "goodput" not in describe(record)

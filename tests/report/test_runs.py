import json
import os
import subprocess
import sys

import pytest

from fbi.errors import InputError
from fbi.report.runs import find_runs, points, read_run


def test_a_run_directory_is_read_whole(new_run):
    record = read_run(new_run())
    assert (record.name, record.steps, record.step, record.unigram_entropy) == ("fbi-ad", 700, 700, 6.0614)
    assert {kind: len(rows) for kind, rows in record.rows.items()} == {"scales": 42, "train": 70, "eval": 7, "event": 1}
    assert record.done == {"step": 700}
    assert record.evaluations("test") == []


def test_a_run_that_has_just_begun_is_read(new_run):
    nothing = {"metrics__jsonl": None, "env__json": None, "summary__json": None}
    record = read_run(str(new_run(done=False, **nothing)))
    assert (record.rows, record.done, record.env, record.summary, record.step) == ({}, None, {}, {}, 0)
    assert record.unigram_entropy is None


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', '{"kind": "tr\u00e4', "{}"])
def test_a_torn_last_line_is_left_out(new_run, tail):
    folder = new_run()
    before = read_run(folder).rows
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail.encode()[:-1])  # cut within a character, too
    assert read_run(folder).rows == before


def test_a_whole_last_line_without_its_end_counts(new_run):
    folder = new_run(metrics__jsonl='{"kind": "train", "step": 1, "loss": 2.0}')
    assert points(read_run(folder).train, "loss") == ([1], [2.0])


def test_points_are_finite_numbers_only():
    rows = [{"step": i, "loss": value} for i, value in enumerate([1, float("nan"), None, "x", True, 2.5])]
    assert points([*rows, {"step": 9}], "loss") == ([0, 5], [1, 2.5])


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config__json": "{"}, "not JSON"),
        ({"config__json": "[]"}, "holds a list"),
        ({"config__json": json.dumps({"format": 2, "run": {}})}, "format 2, this version reads 1"),
        ({"config__json": json.dumps({"architectures": []})}, "no 'run'"),
        ({"config__json": None}, "no config.json"),
        ({"summary__json": "3"}, "holds a int"),
    ],
)
def test_what_is_no_whole_run_is_refused_in_one_line(new_run, files, says):
    with pytest.raises(InputError, match=says) as error:
        read_run(new_run(**files))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", ["nonsense", '{"step": 1}', "[]"])
def test_a_damaged_line_is_left_out_and_named(new_run, bad):
    good = '{"kind": "train", "step": 1, "loss": 2.0}'
    folder = new_run(metrics__jsonl=f"{good}\n{bad}\n{good}\n")
    record = read_run(folder)
    assert len(record.train) == 2
    assert record.warnings == [f"{folder / 'metrics.jsonl'}: line 2 is no row of metrics, left out"]


def test_a_folder_of_runs_names_some_of_them(new_run, tmp_path):
    new_run("one")
    with pytest.raises(InputError, match="such as one"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="not a directory"):
        read_run(tmp_path / "none")


def test_runs_are_found_at_any_depth_but_not_within_runs(new_run, tmp_path):
    expected = [new_run(name) for name in ("a", "b/c", "b/d")]
    new_run("a/checkpoints/inner")
    new_run(".hidden")
    new_run("model", config__json='{"architectures": []}')
    broken = new_run("z", config__json="{")  # reading it says what is wrong
    assert find_runs(tmp_path) == [*expected, broken]
    assert find_runs(str(expected[0])) == [expected[0]]
    with pytest.raises(InputError, match="not a directory"):
        find_runs(tmp_path / "none")


def test_reports_never_import_jax(new_run, tmp_path):
    code = f"""
import sys
from fbi.report.plot import demo_figure
from fbi.report.runs import find_runs, read_run
from fbi.report.show import show
from fbi.report.table import run_table

records = [read_run(path) for path in find_runs({str(tmp_path)!r})]
run_table(records).terminal()
demo_figure(records, {str(tmp_path / "demo.pdf")!r})
show(records[0].directory)
assert not {{"jax", "flax", "matplotlib.pyplot"}} & set(sys.modules)
"""
    new_run()
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, capture_output=True)

"""`fbi tasks` on a run: the table, and what it refuses."""

import pytest
from outcome import refused

from fbi.cli_tasks import _STANDARD
from fbi.evaluate.tasks import TASKS


def test_the_standard_tasks_are_there():
    assert set(_STANDARD.split(",")) <= set(TASKS)


def test_tasks_prints_a_row_for_each_task(fbi, teacher, package_cache):
    ended = fbi("tasks", str(teacher), "--tasks", "winogrande, lambada", "--limit", "4", "--batch", "4")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    table = lines[lines.index(f"{teacher}, zero-shot") :]  # a slow machine says before how far it is
    rows = {line.split()[0]: line.split() for line in table if line.strip()}
    heading = "task documents acc stderr acc_norm stderr chance perplexity bits/byte"
    assert " ".join(rows["task"]) == heading
    _, documents, acc, stderr, norm, _, chance, perplexity, _ = rows["winogrande"]
    assert (documents, chance, perplexity) == ("4", "0.5000", "-")
    assert norm == acc  # the continuations of WinoGrande are equal
    assert float(stderr) == pytest.approx((float(acc) * (1 - float(acc)) / 4) ** 0.5, abs=1e-4)
    assert rows["lambada"][4:7] == ["-", "-", "-"]
    assert float(rows["lambada"][7]) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tasks", "pica"], r"unknown task 'pica' (did you mean 'piqa'?)"),
        (["--tasks", ""], "unknown task ''"),
        (["--limit", "-1"], "limit is -1; it must be at least 0"),
        (["--batch", "0", "--limit", "1", "--tasks", "winogrande"], "batch is 0"),
    ],
)
def test_what_tasks_refuses(words, says, fbi, teacher, package_cache):
    assert says in refused(fbi("tasks", str(teacher), *words))


def test_a_directory_that_is_no_run_is_refused(fbi, tmp_path):
    refused(fbi("tasks", str(tmp_path / "none"), "--tasks", "piqa"))

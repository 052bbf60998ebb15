import csv
import io

import pytest

from fbi.report.runs import read_run
from fbi.report.table import Column, Table, run_table

TABLE = Table(
    (Column("run"), Column("policy"), Column("nats/token", ".3f")),
    [("a_1", "*: w=fbi | head: w=none", 3.14159), ("b, [red]c", None, None)],
    "50% of it",
    ["a note & more"],
)


def test_markdown():
    assert TABLE.markdown() == (
        "**50% of it**\n"
        "\n"
        "| run | policy | nats/token |\n"
        "| --- | --- | ---: |\n"
        "| a_1 | *: w=fbi \\| head: w=none | 3.142 |\n"
        "| b, [red]c | - | - |\n"
        "\n"
        "a note & more\n"
    )


def test_csv():
    assert TABLE.csv() == 'run,policy,nats/token\na_1,*: w=fbi | head: w=none,3.142\n"b, [red]c",-,-\n'
    assert list(csv.reader(io.StringIO(TABLE.csv())))[1:] == TABLE.cells()


def test_latex():
    assert TABLE.latex() == (
        "\\begin{table}\n"
        "\\centering\n"
        "\\caption{50\\% of it}\n"
        "\\begin{tabular}{llr}\n"
        "\\toprule\n"
        "run & policy & nats/token \\\\\n"
        "\\midrule\n"
        "a\\_1 & *: w=fbi \\textbar{} head: w=none & 3.142 \\\\\n"
        "b, [red]c & - & - \\\\\n"
        "\\bottomrule\n"
        "\\end{tabular}\n"
        "\\par\\small a note \\& more\n"
        "\\end{table}\n"
    )


def test_terminal():
    assert TABLE.terminal() == (
        "50% of it\n"
        " run         policy                    nats/token\n"
        " ────────────────────────────────────────────────\n"
        " a_1         *: w=fbi | head: w=none        3.142\n"
        " b, [red]c   -                                  -\n"
        "a note & more\n"
    )


def test_a_narrow_terminal_folds_text_and_a_plain_one_gets_plain_characters():
    text = TABLE.terminal(44, unicode=False)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 44
    assert "3.142" in text
    assert "nats/token" in text


def test_a_terminal_too_narrow_for_columns_gets_a_list():
    assert TABLE.terminal(20) == (
        "50% of it\n"
        "run         a_1\n"
        "policy      *: w=fbi | head: w=none\n"
        "nats/token  3.142\n"
        "\n"
        "run         b, [red]c\n"
        "policy      -\n"
        "nats/token  -\n"
        "\n"
        "a note & more\n"
    )


@pytest.mark.parametrize("render", [Table.terminal, Table.markdown, Table.csv, Table.latex])
def test_a_table_without_rows_is_its_heading(render):
    assert "nats/token" in render(Table(TABLE.columns, []))


def test_the_table_of_runs_says_what_each_is_costs_and_reaches(new_run):
    done, going = new_run("a", drop=0.1), new_run("b", done=False, summary__json=None, metrics__jsonl="")
    table = run_table([read_run(done), read_run(going)], "Runs")
    row, other = (dict(zip([c.name for c in table.columns], cells, strict=True)) for cells in table.cells())
    assert row == {
        "run": "a",
        "policy": "layers.0.*: w=none | layers.*: w=fbi",
        "loss": "ad",
        "parameters (M)": "0.83",
        "stored bits/weight": "1.250",
        "MB": "0.610",
        "validation nats/token": "3.5397",
        "perplexity": "34.46",
        "bits/byte": "1.9641",
        "train tokens/s": "16355",
        "goodput": "-",
        "directory": str(done),
    }
    assert other["run"] == "b"
    assert {other[name] for name in ("MB", "perplexity", "train tokens/s")} == {"-"}
    assert table.notes == ["unigram entropy: 6.0614 nats/token", "not finished: b (step 0 of 700)"]


def test_runs_on_unlike_data_have_each_their_entropy_in_the_note(new_run):
    records = [read_run(new_run("a")), read_run(new_run("b", summary__json='{"unigram_entropy": 5.5}'))]
    assert run_table(records).notes == ["unigram entropy: 6.0614 (a); 5.5000 (b) nats/token"]

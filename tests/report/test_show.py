import io
import sys

import pytest

from fbi.errors import InputError
from fbi.report.runs import read_run
from fbi.report.show import chart, describe, show


def test_a_run_is_described_from_its_files(new_run):
    text = describe(read_run(new_run(steps=200, done=False)))
    for part in (
        "policy     layers.0.*: w=none | layers.*: w=fbi",
        "teacher    runs/fp",
        "model      dim=128 layers=3",
        "optimizer  name=adamw lr=0.003",
        "step 200 of 200 (100%), 0.82M tokens, 16105 tokens/s, 0.25 s/step, 0 min left",
        "validation first 5.0642, last 4.2533, best 4.2533 (step 200); last perplexity 70.34, bits/byte 2.36",
        "unigram    6.0614 nats/token",
        "event      step 30: spike gradient norm 12, step left out",
        "█",
    ):
        assert part in text


def test_time_left_is_what_the_remaining_steps_take(new_run):
    row = '{"kind": "train", "step": 100, "loss": 4.0, "time_step_s": 9.0}\n'
    text = describe(read_run(new_run(done=False, metrics__jsonl=row)))
    assert "step 100 of 700 (14%), 9 s/step, 1 h 30 min left" in text
    assert "finished" in describe(read_run(new_run("done", metrics__jsonl=row)))


def test_only_the_last_of_many_events_are_listed(new_run):
    rows = "".join(f'{{"kind": "event", "step": {i}, "what": "spike"}}\n' for i in range(20))
    text = describe(read_run(new_run(metrics__jsonl=rows)))
    assert "12 earlier events" in text
    assert "step 11: spike" not in text
    assert "step 12: spike" in text


@pytest.mark.parametrize(("unicode", "full"), [(True, "█"), (False, "#")])
def test_the_chart_falls_where_the_loss_falls(unicode, full):
    lines = chart([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], width=40, height=4, unicode=unicode)
    bars = [line[8:] for line in lines[:4]]
    counts = [sum(column < len(bar) and bar[column] == full for bar in bars) for column in range(4)]
    assert counts[0] == 4
    assert counts == sorted(counts, reverse=True)
    assert "\n".join(lines).isascii() != unicode
    assert lines[0].startswith("  4.000 ")
    assert "step 3" in lines[4]


@pytest.mark.parametrize("values", [[2.0, 2.0], [5.0, 1.0, 3.0] * 500])
def test_a_chart_fits_its_width(values):
    lines = chart(list(range(len(values))), values, width=50, unicode=True)
    assert max(map(len, lines)) <= 50


def test_show_prints_and_leaves_a_picture_in_the_run(new_run, capsys):
    folder = new_run()
    show(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture    {folder / 'curves.png'}" in capsys.readouterr().out


def test_show_draws_elsewhere_or_not_at_all(new_run, tmp_path, capsys):
    folder = new_run()
    show(str(folder), picture=None)
    assert not (folder / "curves.png").exists()
    show(folder, picture=tmp_path / "other.pdf")
    assert (tmp_path / "other.pdf").exists()


def test_show_of_a_run_without_rows_says_so(new_run, capsys):
    folder = new_run(done=False, metrics__jsonl="")
    show(folder)
    assert "no loss yet" in capsys.readouterr().out
    assert not (folder / "curves.png").exists()


def test_a_plain_terminal_gets_plain_characters(new_run, monkeypatch):
    folder = new_run("größe")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    show(folder, picture=None)
    sys.stdout.flush()
    assert b"gr??e" in out.getvalue()
    assert b"###" in out.getvalue()


def test_show_of_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        show(tmp_path)

import json

import numpy as np
import pytest

from fbi.errors import InputError
from fbi.report.plot import MARKERS, curves, demo_figure, scales, smooth
from fbi.report.runs import points, read_run


def line(axes, gid):
    (found,) = [found for found in axes.get_lines() if found.get_gid() == gid]
    return list(found.get_xdata()), list(found.get_ydata())


def rows_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def records(new_run):
    return [read_run(new_run("fp", teacher=False, scales=False, seed=1)), read_run(new_run("fbi-ad", seed=2))]


def test_what_is_drawn_of_the_losses_is_what_the_rows_say(records, tmp_path):
    figure = curves(records, tmp_path / "sub" / "curves.png")
    assert (tmp_path / "sub" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "sub" / "curves.png").stat().st_size > 20_000
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["curves.png"]  # nothing half-written beside it
    (axes,) = figure.axes
    for record in records:
        assert line(axes, f"{record.name}:raw") == points(record.train, "loss")
        assert line(axes, f"{record.name}:validation") == points(record.evaluations(), "loss")
        assert line(axes, f"{record.name}:train")[1] == smooth(points(record.train, "loss")[1])
    assert line(axes, "fbi-ad:floor")[1] == smooth(points(records[1].train, "floor")[1])
    assert not [found for found in axes.get_lines() if found.get_gid() == "fp:floor"]
    assert line(axes, "unigram")[1] == [6.0614, 6.0614]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", "loss (nats per token)")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["fp", "fbi-ad", "training loss", "validation loss", "floor: the teacher's entropy",
                      "unigram entropy, 6.06"]  # fmt: skip


@pytest.mark.parametrize(("suffix", "start"), [(".pdf", b"%PDF"), (".PNG", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_suffix_chooses_the_kind_of_file_and_equal_runs_give_equal_files(records, tmp_path, suffix, start):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        curves(records, str(file))
    assert files[0].read_bytes().startswith(start)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_scales_are_drawn_by_layer_in_units_of_their_start(records, tmp_path):
    figure = scales(records, tmp_path / "scales.png")
    assert (tmp_path / "scales.png").stat().st_size > 20_000
    alpha, beta = figure.axes
    found = {(row["site"], row["step"]): row for row in records[1].rows["scales"]}
    for index, site in enumerate(["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]):
        drawn = [
            [entry for entry in axes.get_lines() if entry.get_marker() == MARKERS[index]] for axes in (alpha, beta)
        ]
        ends = [found[f"layers.{layer}.{site}", 700] for layer in range(3)]
        starts = [found[f"layers.{layer}.{site}", 0] for layer in range(3)]
        relative = [end["alpha"]["mean"] / start["alpha"]["mean"] for end, start in zip(ends, starts, strict=True)]
        np.testing.assert_allclose(list(drawn[0][0].get_ydata()), relative)
        np.testing.assert_allclose(list(drawn[1][0].get_ydata()), [end["beta"]["mean"] for end in ends])
        np.testing.assert_allclose(list(drawn[0][0].get_xdata()), range(3), atol=0.3)
    assert (alpha.get_ylabel(), beta.get_ylabel()) == ("alpha / alpha at step 0", "beta (units of the weight)")
    assert alpha.get_xlabel() == "layer"


def test_scales_without_a_start_without_a_beta_and_outside_layers_are_drawn_as_they_are(new_run, tmp_path):
    alpha = {"mean": 0.5, "std": 0.1, "min": 0.1, "max": 0.9}
    rows = [{"kind": "scales", "step": 9, "site": site, "alpha": alpha} for site in ("layers.1.attn.q", "head")]
    axes = scales([read_run(new_run(metrics__jsonl=rows_of(*rows)))], tmp_path / "scales.png").axes[0]
    assert axes.get_ylabel() == "alpha (units of the weight)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "head"]
    assert [list(entry.get_ydata()) for entry in axes.get_lines() if entry.get_marker() in MARKERS] == [[0.5], [0.5]]


def test_the_demo_figure_says_what_to_see(records, tmp_path):
    figure = demo_figure(records, tmp_path / "demo.png")
    losses, alpha, beta = (axes.get_title(loc="left") for sub in figure.subfigs for axes in sub.axes)
    assert "ends at 3.640 nats/token" in losses
    assert "2.42 below the unigram entropy" in losses
    assert "fbi-ad" in alpha
    assert "times its start" in alpha
    assert "0 to 0.0002" in beta


def test_a_burst_does_not_flatten_the_picture(new_run, tmp_path):
    rows = [{"kind": "train", "step": step, "loss": 1e6 if step == 3 else 4.0} for step in range(9)]
    (axes,) = curves([read_run(new_run(metrics__jsonl=rows_of(*rows)))], tmp_path / "a.png").axes
    assert axes.get_ylim()[1] < 10


def test_smoothing_keeps_a_line_a_line():
    np.testing.assert_allclose(smooth([float(i) for i in range(100)]), range(100))
    assert smooth([]) == []


@pytest.mark.parametrize("draw", [curves, scales, demo_figure])
def test_nothing_to_draw_and_unknown_kinds_of_picture_are_refused(new_run, tmp_path, draw):
    empty = read_run(new_run("empty", metrics__jsonl=""))
    with pytest.raises(InputError, match="empty"):
        draw([empty], tmp_path / "a.png")
    with pytest.raises(InputError, match="no runs"):
        draw([], tmp_path / "a.png")
    with pytest.raises(InputError, match=r"\.png, \.pdf"):
        draw([read_run(new_run("full"))], tmp_path / "a.bmp")
    assert not list(tmp_path.glob("a.*"))

"""A sweep's tables, verdicts, pictures and page, from files as a sweep leaves them: copied, half finished, damaged."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import pytest
from run_files import write_run

from fbi.cli import main
from fbi.errors import InputError
from fbi.files import write_json
from fbi.report import spec
from fbi.report.archive import pack, unpack
from fbi.report.measure import Sample, interval, measure, paired, sample, select, verdict
from fbi.report.page import page
from fbi.report.runs import read_run
from fbi.report.spec import Claim, Figure, Line, Planned, Row, Sweep, TableSpec, read_sweep
from fbi.report.sweep import read, tables
from fbi.report.sweep_plot import draw, plot

LOSSES = {"fp": (3.50, 3.52, 3.54), "ce": (3.70, 3.73, 3.73), "ad": (3.66, 3.60, 3.75)}


def sweep_of(losses=LOSSES, **changes):
    runs = [
        Planned(f"{name}-s{seed}", f"{name}-s{seed}-0000", ()) for name, of in losses.items() for seed in range(len(of))
    ]
    fields = {
        "tables": (TableSpec("Losses", (Row("full", "fp", 3.2, "table 1"), Row("CE", "ce"), Row("none yet", "later")),
                             baseline="full"),),
        "claims": (Claim("full is better", "table 1", "fp", "ce", published="+0.2"),
                   Claim("AD is better", "table 2", "ad", "ce")),
        "figures": (Figure("bits", "Loss", (Line("all", "*"),)),
                    Figure("curves", "C", (Line("CE", "ce"),), kind="curves", y="train.loss")),
    } | changes  # fmt: skip
    return Sweep(
        "tiny", "Tiny runs", "Tiny runs.\n\nCommand: fbi sweep tiny.py", "fbi sweep tiny.py", runs, {}, **fields
    )


def write_sweep(root, losses=LOSSES, **changes):
    sweep = sweep_of(losses, **changes)
    for planned in sweep.runs:
        name, _, seed = planned.name.rpartition("-s")
        loss = losses[name][int(seed)]
        result = {"steps": 40, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2}
        write_run(root / planned.directory, planned.name, steps=40, scales=False, seed=int(seed),
                  done__json=json.dumps(result))  # fmt: skip
    write_json(root / "tiny.sweep.json", spec.to_json(sweep))
    return root


@pytest.fixture
def root(tmp_path):
    return write_sweep(tmp_path / "sweep")


def test_a_sweep_and_its_file_are_the_same(root):
    again = read_sweep(root / "tiny.sweep.json")
    assert json.loads(json.dumps(spec.to_json(again))) == json.loads((root / "tiny.sweep.json").read_text())
    assert again.claims == sweep_of().claims
    assert again.figures[1].lines == (Line("CE", "ce"),)


@pytest.mark.parametrize(
    "content", ["[]", '{"format": 9}', '{"format": 1, "nam": "x"}', '{"format": 1, "runs": 3}', "{"]
)
def test_a_bad_sweep_file_is_one_line_that_names_it(tmp_path, content):
    (tmp_path / "x.sweep.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.sweep\.json"):
        read(tmp_path)


def test_a_measure_reads_results_summaries_configs_and_rows(tmp_path):
    rows = [
        {"kind": "train", "step": 10, "grad_norm": 1.0}, {"kind": "train", "step": 20, "grad_norm": 3.0},
        {"kind": "diagnostics", "step": 10, "site": "all", "flips": 0.5},
        {"kind": "diagnostics", "step": 20, "site": "all", "flips": 0.1},
        {"kind": "diagnostics", "step": 20, "site": "layers.0.mlp.up", "flips": 0.2},
        {"kind": "diagnostics", "step": 20, "site": "layers.1.mlp.up", "flips": None},
    ]  # fmt: skip
    folder = write_run(tmp_path / "r", metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows),
                       done__json='{"loss": 3.5, "perplexity": "x"}')  # fmt: skip
    record = read_run(folder)
    found = {name: measure(record, name) for name in (
        "loss", "perplexity", "summary.parameters", "config.model.dim", "config.model.none", "train.grad_norm",
        "train.grad_norm:last", "diagnostics.flips", "diagnostics.flips:last", "diagnostics.flips@layers.*",
        "scales.alpha")}  # fmt: skip
    assert found == {
        "loss": 3.5, "perplexity": None, "summary.parameters": 834816, "config.model.dim": 128,
        "config.model.none": None, "train.grad_norm": 2.0, "train.grad_norm:last": 3.0, "diagnostics.flips": 0.3,
        "diagnostics.flips:last": 0.1, "diagnostics.flips@layers.*": 0.2, "scales.alpha": None,
    }  # fmt: skip
    with pytest.raises(InputError, match="unknown metric 'los'; valid: loss, perplexity"):
        measure(record, "los")


def test_seeds_are_summed_up_and_paired(root):
    (results,) = read(root)
    fp, ad = (sample(select(results.found, name), "loss") for name in ("fp", "ad"))
    assert fp.mean == pytest.approx(3.52)
    assert fp.spread == pytest.approx(0.02)
    assert fp.text() == "3.520 ± 0.020 (3)"
    assert paired(fp, ad).values == pytest.approx({0: 0.16, 1: 0.08, 2: 0.21})
    assert paired(Sample({0: 1.0, 5: 2.0}), Sample({5: 2.5, 7: 1.0})).values == {5: 0.5}
    with pytest.raises(InputError, match="not ad, ce"):
        sample(select(results.found, "?[de]"), "loss")


def test_the_interval_is_student_s():
    # mean 0.2, standard deviation 0.1, three values: t(0.975, 2) = 4.302653 times 0.1 / sqrt(3)
    low, high = interval(Sample({0: 0.1, 1: 0.2, 2: 0.3}))
    assert (low, high) == pytest.approx((0.2 - 0.248414, 0.2 + 0.248414), abs=1e-5)
    assert interval(Sample({0: 0.1})) is None


@pytest.mark.parametrize(
    ("values", "less", "equal"),
    [
        ((), "pending", "pending"),
        ((0.3, 0.31), "not resolved", "not resolved"),
        ((0.30, 0.31, 0.32), "reproduced", "not reproduced"),
        ((-0.30, -0.31, -0.32), "not reproduced", "not reproduced"),
        ((-0.01, 0.01, 0.03), "not resolved", "not resolved"),
        ((0.001, 0.002, 0.003), "not resolved", "reproduced"),
        ((0.010, 0.011, 0.012), "reproduced", "reproduced"),
        ((0.0, 0.5, -0.5), "not resolved", "not resolved"),
    ],
)
def test_a_verdict_needs_three_seeds_and_an_interval_on_one_side(values, less, equal):
    differences = Sample(dict(enumerate(values)))
    assert verdict(Claim("", "", "", ""), differences) == less
    assert verdict(Claim("", "", "", "", kind="equal", margin=0.02), differences) == equal


def test_tables_show_own_values_beside_published_ones_and_where_they_lie(root):
    (results,) = read(root)
    losses, claims = tables(results)
    assert losses.cells() == [
        ["full", "3.520 ± 0.020 (3)", "+0.000 ± 0.000 (3)", "3.2", "table 1",
         "fp-s0-0000, fp-s1-0000, fp-s2-0000"],
        ["CE", "3.720 ± 0.017 (3)", "+0.200 ± 0.010 (3)", "-", "-", "ce-s0-0000, ce-s1-0000, ce-s2-0000"],
        ["none yet", "-", "-", "-", "-", "-"],
    ]  # fmt: skip
    assert [row[-1] for row in claims.cells()] == ["reproduced", "not resolved"]
    assert claims.cells()[0][2:4] == ["+0.2", "+0.200 ± 0.010 (3)"]


def test_a_copied_half_finished_damaged_sweep_is_read_with_warnings(root, tmp_path, capsys):
    (root / "ce-s1-0000" / "done.json").unlink()
    shutil.rmtree(root / "ce-s2-0000")
    metrics = root / "ad-s0-0000" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], "{torn", *lines[1:], '{"kind": "tr']))
    (root / "ad-s1-0000" / "config.json").write_text("{")
    copied = tmp_path / "elsewhere" / "copy"
    shutil.copytree(root, copied)
    shutil.rmtree(root)
    assert main(["table", str(copied)]) == 0
    out, err = capsys.readouterr()
    assert f"{copied}/ad-s0-0000/metrics.jsonl: line 2 is no row of metrics, left out" in err
    assert "ad-s1-0000/config.json is not JSON" in err
    assert "3.700 (1)" in out
    assert "not finished: ce-s1, ce-s2, ad-s1" in out
    assert main(["plot", str(copied)]) == 0
    assert {path.name for path in (copied / "figures").iterdir()} == {
        "tiny-bits.png", "tiny-bits.pdf", "tiny-curves.png", "tiny-curves.pdf"}  # fmt: skip
    assert main(["report", str(copied), "--out", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "left out" in text.lower()
    for form in ("markdown", "latex", "csv"):
        assert main(["table", str(copied), "--form", form]) == 0
        assert "3.700 (1)" in capsys.readouterr().out


def test_reports_never_load_jax(root):
    code = f"""
import sys
from fbi.cli import main
for command in (["table"], ["plot"], ["report"], ["status"]):
    assert main([*command, {str(root)!r}]) == 0
bad = {{name for name in sys.modules if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax")}}
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path):
    root = write_sweep(tmp_path / "s", tables=(TableSpec("<b>Losses</b>", (Row("a & b", "fp"),)),))
    (results,) = read(root)
    text = page(results)
    assert "&lt;b&gt;Losses" in text
    assert "a &amp; b" in text
    assert text.count("<polyline") == 9
    assert text.count("data:image/png;base64,") == 2
    assert 'src="http' not in text
    assert "href=" not in text
    assert 'class="reproduced"' in text
    assert "fbi sweep tiny.py" in text


def test_figures_draw_what_they_say(root):
    (results,) = read(root)
    bits, curves = results.sweep.figures
    axes = draw(bits, results.found).axes[0]
    ((points, _, _),) = axes.containers
    assert sorted(points.get_ydata()) == pytest.approx([3.52, 3.67, 3.72])
    assert len(draw(curves, results.found).axes[0].get_lines()) == 3
    with pytest.raises(InputError, match="none of its runs has 'loss' yet"):
        draw(Figure("x", "x", (Line("no", "nothing"),)), results.found)
    files, warnings = plot(results, root / "figures")
    assert len(files) == 4
    assert not warnings


def test_layers_are_drawn_as_they_are_at_the_end_and_as_means_over_seeds(root):
    (results,) = read(root)

    def with_rows(run):
        sites = ("layers.0.mlp.router", "layers.1.mlp.router", "all")
        rows = [
            {"kind": "routing", "step": step, "site": site, "sparsity": first + 0.2 * layer + 0.01 * run.seed}
            for step, first in ((0, 0.9), (40, 0.1))
            for layer, site in enumerate(sites)
        ]
        record = dataclasses.replace(run.record, rows={**run.record.rows, "routing": rows})
        return dataclasses.replace(run, record=record)

    found = [with_rows(run) if run.group == "ce" else run for run in results.found]
    figure = Figure("layers", "L", (Line("CE", "ce"), Line("none", "fp")), kind="layers", y="routing.sparsity")
    axes = draw(figure, found).axes[0]
    ((points, _, _),) = axes.containers
    assert list(points.get_xdata()) == [0, 1]
    assert list(points.get_ydata()) == pytest.approx([0.11, 0.31])
    assert axes.get_xlabel() == "layer"
    with pytest.raises(InputError, match=r"none of its runs has 'routing\.sparsity' yet"):
        draw(figure, results.found)


def test_a_folder_of_runs_without_a_plan_has_a_table_too(tmp_path, capsys):
    write_sweep(tmp_path / "s")
    (tmp_path / "s" / "tiny.sweep.json").unlink()
    assert main(["table", str(tmp_path / "s")]) == 0
    out = capsys.readouterr().out
    assert out.count("fp-s0-0000") >= 1
    assert main(["report", str(tmp_path / "s")]) == 0
    for place, says in (("nowhere", "does not exist"), ("", "holds no runs")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["table", str(tmp_path / "empty" / place)]) == 2
        assert says in capsys.readouterr().err


def test_a_packed_run_is_read_as_the_run_itself(root, tmp_path):
    (before,) = read(root)
    for planned in before.sweep.runs:
        pack(root / planned.directory, tmp_path / "kept" / "runs" / f"{planned.directory}.json")
    shutil.copy(root / "tiny.sweep.json", tmp_path / "kept")
    (kept,) = read(tmp_path / "kept")
    shown = lambda results: [[row[:-1] for row in table.cells()] for table in tables(results)]
    assert shown(kept) == shown(before)
    back = tmp_path / "back" / "fp-s0-0000"
    unpack(tmp_path / "kept" / "runs" / "fp-s0-0000.json", back)
    again, straight = read_run(back), read_run(root / "fp-s0-0000")
    assert (again.config, again.done, again.rows) == (straight.config, straight.done, straight.rows)
    (root / "fp-s0-0000" / "done.json").unlink()
    with pytest.raises(InputError, match="is not finished"):
        pack(root / "fp-s0-0000", tmp_path / "no.json")


@pytest.mark.parametrize("content", ["[]", '{"format": 9}', '{"format": 1, "config": {}}', "{"], ids=str)
def test_a_file_that_is_no_packed_run_is_left_out_with_a_warning(root, tmp_path, content):
    shutil.copy(root / "tiny.sweep.json", tmp_path)
    (tmp_path / "runs").mkdir()
    damaged = tmp_path / "runs" / "fp-s0-0000.json"
    damaged.write_text(content)
    (results,) = read(tmp_path)
    assert not results.found
    assert [str(damaged) in warning for warning in results.warnings] == [True]
    with pytest.raises(InputError, match=str(damaged)):
        unpack(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()

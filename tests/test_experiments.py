"""Every experiment plans at each of its scales, and its runs train, shrunken; each notebook runs from top to bottom."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fbi
from fbi.errors import InputError
from fbi.launch.outlay import outlay, table
from fbi.launch.plan import plan
from fbi.model.config import count_parameters
from fbi.policy import Policy
from fbi.report.page import page
from fbi.report.sweep import read, tables
from fbi.train.compose import check
from fbi.train.run import Execution

HOME = Path(__file__).parents[1]
NAMES = ("fbi_llm", "quest", "bitnet", "survey", "lte", "lte_20m")
PAPERS = ("fbi_llm", "quest", "bitnet", "lte")
MESHES = {"lte": "data=16"}  # as many rows as a step has
EXECUTION = Execution(eval_every=0, log_every=1, mesh="data=1", unroll=1, eval_windows=8)


@pytest.mark.parametrize("name", [*NAMES, "methods_table"])
def test_every_run_of_an_experiment_can_be_carried_out_and_every_row_and_claim_names_runs(name, tmp_path):
    made = plan(HOME / f"experiments/{name}.py", tmp_path)
    for run in made.runs.values():
        Policy.parse(run.policy)
        if run.seed == 0 and name != "methods_table":  # of which tests/model/test_methods.py trains every method
            check(run, EXECUTION)
    groups = {re.sub(r"-s\d+$", "", planned.name) for planned in made.sweep.runs}
    named = {row.runs for spec in made.sweep.tables for row in spec.rows}
    named |= {glob for claim in made.sweep.claims for glob in (claim.low, claim.high)}
    assert named <= groups
    for word in ("Command:", "Expected:", "Cost:"):
        assert word in made.sweep.text


@pytest.mark.smoke
@pytest.mark.parametrize("name", NAMES)
def test_a_shrunken_experiment_trains_and_reports(name, tmp_path):
    """One seed; one run of each kind, so that a student has its teacher."""
    made = plan(HOME / f"experiments/{name}.py", tmp_path, scale="smoke")
    made.write()
    wanted = [directory for directory, run in made.runs.items() if run.seed == 0][:3]
    for directory in wanted:
        result = fbi.train(made.runs[directory], tmp_path / directory, EXECUTION)
        assert result.steps == 2
        assert 0 < result.loss < 12
    (results,) = read(tmp_path)
    assert len([run for run in results.found if run.record.done]) == len(wanted)
    assert any("(1)" in cell for made in tables(results) for row in made.cells() for cell in row)
    assert "not finished" in page(results)


def test_the_guide_s_experiment_is_whole_and_short(tmp_path):
    recipe = (HOME / "CONTRIBUTING.md").read_text().partition("## Add an experiment")[2]
    (code,) = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    assert len(code.splitlines()) <= 30
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "mine.py").write_text(code)
    made = plan(tmp_path / "guide" / "mine.py", tmp_path / "runs", scale="smoke")
    made.write()
    assert sorted(planned.name for planned in made.sweep.runs) == [
        f"shift-{on}-s{seed}" for on in ("false", "true") for seed in range(3)]  # fmt: skip
    for run in made.runs.values():
        check(run, EXECUTION)
    (results,) = read(tmp_path / "runs")
    assert tables(results)[1].cells()[0][-1] == "pending"


@pytest.mark.parametrize("name", PAPERS)
def test_paper_scale_is_planned_and_estimated(name, tmp_path):
    made = plan(HOME / f"experiments/{name}.py", tmp_path, scale="paper")
    shown = table(HOME / f"experiments/{name}.py", "paper", MESHES.get(name, "data=128"), "v5p", 0.4)
    assert len(shown.rows) == len(made.runs)
    for run in made.runs.values():
        Policy.parse(run.policy)


def test_paper_scale_has_the_published_sizes_and_tokens(tmp_path):
    quest = {r.name: r for r in plan(HOME / "experiments/quest.py", tmp_path, scale="paper").runs.values()}
    # QuEST, 2502.05003, table 7: non-embedding parameters, and 3, 5, 10, 20, 43, 80 billion tokens
    published = {"30m": (30_482_560, 3e9), "50m": (49_556_736, 5e9), "100m": (102_777_856, 10e9),
                 "200m": (203_188_480, 20e9), "430m": (443_068_288, 43e9), "800m": (822_151_168, 80e9)}  # fmt: skip
    for size, (parameters, tokens) in published.items():
        run = quest[f"w4a4-{size}"]
        assert count_parameters(run.model).non_embedding == parameters
        assert run.steps * run.data.batch * run.data.window == pytest.approx(tokens, rel=1e-3)
    llm = {r.name: r for r in plan(HOME / "experiments/fbi_llm.py", tmp_path, scale="paper").runs.values()}
    # FBI-LLM, 2407.07093: matrices of the blocks; 2.10M, 2.36M, 3.93M tokens in a step; 1.26T tokens of Amber
    for size, (parameters, batch) in {"130m": (84_934_656, 2.10e6), "1.3b": (1_233_125_376, 2.36e6),
                                      "7b": (6_476_005_376, 3.93e6)}.items():  # fmt: skip
        run = llm[size]
        assert count_parameters(run.model).linear == parameters
        assert run.data.batch * run.data.window == pytest.approx(batch, rel=2e-3)
        assert run.steps * run.data.batch * run.data.window == pytest.approx(1.2585e12, rel=1e-3)
        assert (run.optimizer.lr, run.optimizer.warmup, run.optimizer.final) == (3e-4, 2000, 0.1)


def test_an_outlay_is_six_operations_a_parameter_and_token_and_the_attention():
    run = plan(HOME / "experiments/quest.py", scale="paper").runs
    (big,) = [r for r in run.values() if r.name == "fp-800m"]
    found = outlay(big, {"data": 64}, "h100", 0.5)
    weights = count_parameters(big.model).non_embedding + big.model.dim * big.model.vocab
    pairs = 2 * big.model.layers * big.model.dim * big.data.window  # queries x keys, probabilities x values
    assert found.flops == pytest.approx(6 * (weights + pairs) * found.tokens, rel=1e-3)
    assert found.hours == pytest.approx(found.flops / (989e12 * 0.5 * 64) / 3600)
    assert found.state == pytest.approx(16 * found.parameters / 64, rel=1e-3)
    assert outlay(big, {"data": 128}, "h100", 0.5).memory < found.memory
    for rows, chip, share, says in ((3, "v5p", 0.4, "not a multiple"), (4, "v3", 0.4, "valid: cpu, h100, v4"),
                                    (4, "v5p", 1.2, "share of the peak")):  # fmt: skip
        with pytest.raises(InputError, match=says):
            outlay(big, {"data": rows}, chip, share)


@pytest.mark.parametrize(
    ("mesh", "says"), [("data=x", "not a whole number"), ("tensor=2", "valid: data, model"), ("data=3", "multiple")]
)
def test_an_estimate_for_a_bad_mesh_is_one_line(mesh, says):
    with pytest.raises(InputError, match=says):
        table(HOME / "experiments/quest.py", "paper", mesh, "v5p", 0.4)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["01_quantizers", "02_train_tiny", "03_read_a_sweep", "04_sparsity"])
def test_a_notebook_runs_from_top_to_bottom(name):
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, f"notebooks/{name}.py"], cwd=HOME, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout

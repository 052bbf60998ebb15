"""Diagnostics in the record: what they say is true of the checkpoints, they change no number, they survive a resume."""

import shutil

import jax
import numpy as np
import pytest
from support import STEPS, assert_same, copy, finished, rows, saved

from fbi.errors import InputError
from fbi.train import Execution, Run
from fbi.train.compose import check
from fbi.train.load import load

pytestmark = pytest.mark.slow

NAMES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
SITES = [f"layers.0.{name}" for name in sorted(NAMES)]


def signs(directory, step):
    tree = load(directory, step).params["layers_0_1"]
    return {name: np.asarray(tree[name.split(".")[0]][name.split(".")[1]]["w"][0]) >= 0 for name in NAMES}


@pytest.fixture(scope="module")
def diagnosed(home):
    """The finished run of the reference, with every diagnostic of weights at every fourth step and all checkpoints."""
    directory = home.folder / "diagnosed"
    options = ("--diagnose_every", "4", "--diagnostics", "flips,entropy,margin,error,masked", "--keep_every", "1")
    ended = home.command("diagnosed", *options, "--checkpoint_every", "1")
    assert ended.code == 0, ended.err  # where the disk is slow Orbax says there that it saves too often
    return directory


def test_rows_for_each_site_and_one_of_all(diagnosed):
    found = rows(diagnosed, "diagnostics")
    assert [row["step"] for row in found if row["site"] == "all"] == list(range(4, STEPS + 1, 4))
    for step in range(4, STEPS + 1, 4):
        assert [row["site"] for row in found if row["step"] == step] == [*SITES, "all"]
    for row in found:
        assert set(row) == {"kind", "step", "site", "flips", "entropy", "margin", "near", "error", "masked"}
        assert 0 <= row["flips"] < 0.5
        assert 0.9 < row["entropy"] <= 1
        assert 0 < row["near"] < 0.3
        assert row["error"] > 0.2  # 0.36 at the start; learned scales do not minimise it
        assert row["masked"] == 0  # the identity masks nothing


def test_flips_entropy_and_error_are_those_of_the_checkpoints(diagnosed):
    found = {row["site"]: row for row in rows(diagnosed, "diagnostics") if row["step"] == 8}
    before, after = signs(diagnosed, 7), signs(diagnosed, 8)
    changed, entries = 0, 0
    for name in NAMES:
        row, differ = found[f"layers.0.{name}"], np.sum(before[name] != after[name])
        assert row["flips"] == pytest.approx(differ / before[name].size)
        p = after[name].mean()
        assert row["entropy"] == pytest.approx(-p * np.log2(p) - (1 - p) * np.log2(1 - p), rel=1e-5)
        changed, entries = changed + differ, entries + before[name].size
    assert changed > 0
    assert found["all"]["flips"] == pytest.approx(changed / entries)
    site = load(diagnosed, 8).params["layers_0_1"]["mlp"]["up"]
    w, q = np.asarray(site["w"][0]), jax.tree.map(lambda x: np.asarray(x[0]), site["q"])
    w_hat = q["alpha"] * np.where(w >= 0, 1, -1) + q["beta"]
    assert found["layers.0.mlp.up"]["error"] == pytest.approx(np.sum((w - w_hat) ** 2) / np.sum(w**2), rel=1e-5)


def test_they_change_no_number_of_the_run(diagnosed, reference):
    assert rows(diagnosed, "train", "eval", "scales") == rows(reference, "train", "eval", "scales")
    assert rows(reference, "diagnostics") == []


@pytest.mark.parametrize("step", [11, 12, 13])
def test_a_resumed_run_has_the_same_rows(step, diagnosed, go_on, tmp_path):
    directory = copy(diagnosed, tmp_path / "run")
    (directory / "done.json").unlink()
    for later in saved(directory):
        if later > step:
            shutil.rmtree(directory / "checkpoints" / str(later))
    ended = go_on(directory, "--diagnose_every", "4", "--diagnostics", "flips,entropy,margin,error,masked")
    finished(ended, directory)
    assert f"continuing from step {step}\n" in ended.out
    assert_same(directory, diagnosed)


def test_a_model_without_quantized_weights_has_rows_of_what_its_batch_shows_alone(go_on, tmp_path):
    names, options = "flips,activations,alignment", ("--set", "policy=fp", "--set", "steps=2", "--accumulate", "2")
    finished(go_on(tmp_path / "run", *options, "--diagnose_every", "2", "--diagnostics", names), tmp_path / "run")
    found = rows(tmp_path / "run", "diagnostics")
    assert [(row["step"], row["site"]) for row in found] == [(2, "head"), *((2, site) for site in SITES), (2, "all")]
    for row in found:
        assert {"kurtosis", "peak", "top_energy", "rms"} < set(row)
        assert row["kurtosis"] > 1
        assert row.get("alignment", 1.0) == pytest.approx(1.0, abs=1e-5)
        assert ("alignment" in row) == (row["site"] != "head")


@pytest.mark.parametrize(
    ("execution", "says"),
    [
        (Execution(diagnose_every=-1), "diagnose_every=-1 must be at least 0"),
        (
            Execution(diagnostics="flips,entropie"),
            "unknown diagnostic 'entropie' (did you mean 'entropy'?); "
            "valid: activations, alignment, entropy, error, flips, margin, masked",
        ),
    ],
)
def test_bad_input_is_refused(execution, says):
    with pytest.raises(InputError) as error:
        check(Run(), execution)
    assert str(error.value) == says

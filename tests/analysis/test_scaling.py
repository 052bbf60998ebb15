"""The scaling law: constants found again, Huber by hand, intervals that hold the truth, the published runs refitted."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import approx_fprime, brentq

from fbi.analysis.scaling import Law, Observation, Start, _Data, _objective, fit, huber, refit
from fbi.analysis.scaling_report import Interval, Resampled, bootstrap, optimum, precision_bits, profile, threshold
from fbi.errors import InputError

TRUE = Law(A=406.4, alpha=0.34, B=410.7, beta=0.28, E=1.69, eff={"16": 1.0, "4": 0.69, "1": 0.02})
SIZES, RATIOS = (3e7, 1e8, 3e8, 1e9), (10.0, 40.0, 160.0)
FEW = (Start(0.2, 0.3, 0.5, 0.3),)  # enough for data of the law's own form, and quick


def made(law, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [
        Observation(n, n * r, p, float(law.predict(n, n * r, p) * math.exp(noise * random.normal())))
        for p in law.eff for n in SIZES for r in RATIOS
    ]  # fmt: skip


def quest_law():
    path = Path(__file__).parents[2] / "experiments" / "quest_law.py"
    spec = importlib.util.spec_from_file_location("quest_law", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quest():
    return quest_law()


@pytest.fixture(scope="module")
def runs(quest):
    return quest.observations()


@pytest.fixture(scope="module")
def refitted(runs):
    return fit(runs, reference="BF16")


def test_the_law_by_hand():
    law = Law(A=8.0, alpha=0.5, B=27.0, beta=1 / 3, E=0.25, eff={"16": 1.0, "4": 0.25})
    assert law.predict(16.0, 27.0, "16") == pytest.approx(8 / 4 + 27 / 3 + 0.25)
    assert law.predict(16.0, 27.0, "4") == pytest.approx(8 / 2 + 27 / 3 + 0.25)  # counts as 4 parameters
    np.testing.assert_allclose(law.predict(np.array([16.0, 64.0]), np.array([27.0, 8.0]), "16"), [11.25, 14.75])
    np.testing.assert_allclose(law.residuals([Observation(16, 27, "16", 11.25 / math.e)]), [1.0])


def test_huber_by_hand():
    found = huber(np.array([0.0, 0.5, -1.0, 2.0, -3.0, 4.0]), 2.0)
    np.testing.assert_allclose(found, [0.0, 0.125, 0.5, 2.0, 4.0, 6.0])  # |r| <= 2: r^2 / 2, else 2 |r| - 2


def test_what_is_minimised_is_the_huber_sum_of_log_residuals_and_its_gradient_is_right():
    runs = made(TRUE, noise=0.003)
    data = _Data.of(runs, "16", None)
    weights = np.arange(len(runs), dtype=float) % 3  # some runs left out, some counted twice
    other = Law(A=300.0, alpha=0.3, B=500.0, beta=0.29, E=1.5, eff={"16": 1.0, "4": 0.6, "1": 0.03})
    x = data.vector(other)
    r = other.residuals(runs)
    by_hand = sum(
        w * (e * e / 2 if abs(e) <= 2e-3 else 2e-3 * (abs(e) - 1e-3)) for w, e in zip(weights, r, strict=True)
    )
    value, gradient = _objective(x, data, weights, 2e-3)
    assert value == pytest.approx(by_hand / 1e-6, rel=1e-9)
    np.testing.assert_allclose(
        gradient, approx_fprime(x, lambda y: _objective(y, data, weights, 2e-3)[0], 1e-7), rtol=1e-4
    )


def test_known_constants_are_found_again():
    found = fit(made(TRUE), starts=FEW)
    for name in ("A", "alpha", "B", "beta", "E"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=2e-3), name
    assert found.eff == pytest.approx(TRUE.eff, rel=1e-3)
    assert found.eff["16"] == 1.0
    assert found.rmse < 1e-6
    held = fit(made(TRUE), starts=FEW, fixed_E=1.69)
    assert (held.E, held.fixed_E) == (1.69, True)
    assert held.alpha == pytest.approx(0.34, rel=1e-4)


def test_one_run_far_off_hardly_moves_a_huber_fit():
    runs = made(TRUE)
    runs[7] = Observation(runs[7].parameters, runs[7].tokens, runs[7].precision, 1.2 * runs[7].loss)
    error = {delta: abs(fit(runs, starts=FEW, delta=delta).eff["4"] - 0.69) for delta in (1e-3, 1.0)}
    assert error[1e-3] < 0.002
    assert error[1.0] > 0.02


def test_a_weight_of_two_is_the_run_twice():
    runs = made(TRUE, noise=0.002)
    law = fit(runs, starts=FEW)
    weights = np.ones(len(runs))
    weights[3], weights[8] = 2.0, 0.0
    assert refit(runs, law, weights).eff == pytest.approx(
        fit([*runs[:8], *runs[9:], runs[3]], starts=FEW).eff, rel=2e-3
    )


def test_bootstrap_intervals_hold_the_truth_and_shrink_with_the_noise():
    width = {}
    for noise in (0.004, 0.001):
        runs = made(TRUE, noise, seed=3)
        law = fit(runs, starts=FEW, fixed_E=1.69)
        resampled = bootstrap(runs, law, resamples=40, seed=1)
        for precision in ("4", "1"):
            low, high = resampled.eff(precision)
            assert low < TRUE.eff[precision] < high
            assert low < law.eff[precision] < high
        width[noise] = resampled.eff("4").high - resampled.eff("4").low
        low, high = resampled.interval(lambda each: each.predict(1e10, 1e12, "4"))
        assert low < TRUE.predict(1e10, 1e12, "4") < high
        assert high - low < 0.1
        assert resampled.eff("16") == Interval(1.0, 1.0)
    assert 0.001 < width[0.001] < width[0.004] / 2
    again = bootstrap(runs, law, resamples=5, seed=1).laws
    assert again == resampled.laws[:5]
    assert bootstrap(runs, law, resamples=5, seed=2).laws != again


def test_an_interval_is_of_order_statistics():
    laws = [Law(A=1.0, alpha=1.0, B=1.0, beta=1.0, E=0.0, eff={"16": 1.0, "4": float(v)}) for v in range(1, 101)]
    assert Resampled(tuple(laws)).eff("4", 0.9) == Interval(5.0, 95.0)
    assert Resampled(tuple(laws)).interval(lambda law: math.inf if law.eff["4"] > 10 else 1.0) == Interval(
        1.0, math.inf
    )


@pytest.mark.parametrize(
    ("precision", "bits"),
    [("4", 4.0), ("2.5", 2.5), ("quest:bits=4", 4.0), ("w=quest:bits=4;a=quest:bits=4", 4.0), ("FP4", 4.5)],
)
def test_bits_of_a_precision(precision, bits):
    assert precision_bits(precision, {"FP4": 4.5}) == bits


@pytest.mark.parametrize("precision", ["BF16", "fbi", "w=quest:bits=4;a=quest:bits=8"])
def test_bits_that_no_name_tells_must_be_given(precision):
    with pytest.raises(InputError, match="give bits="):
        precision_bits(precision)


def test_the_optimum_is_the_least_loss_at_a_fixed_memory():
    law = Law(A=8.0, alpha=0.1, B=80.0, beta=0.25, E=0.5, eff={"16": 1.0, "8": 0.9, "4": 0.7, "2": 0.2})
    rows = optimum(law)
    assert [(row.precision, row.per_bit) for row in rows] == [("4", 0.175), ("8", 0.1125), ("2", 0.1), ("16", 0.0625)]
    by_loss = sorted(law.eff, key=lambda p: law.predict(1e9 / float(p), 1e10, p))
    assert [row.precision for row in rows] == by_loss
    others = (law, Law(A=8.0, alpha=0.1, B=80.0, beta=0.25, E=0.5, eff=law.eff | {"8": 1.5}))
    best = optimum(law, Resampled(others), among=["8", "4"])
    assert [(row.precision, row.wins) for row in best] == [("4", 0.5), ("8", 0.5)]
    assert best[1].interval == Interval(0.9 / 8, 1.5 / 8)


@pytest.mark.parametrize("memory", [1.6e9, 14e9, 112e9])
def test_the_threshold_is_where_the_losses_cross(quest, memory):
    law = quest.PUBLISHED
    n4, n8 = memory / 4, memory / 8

    def gap(log_ratio):  # both cost n8 * d8 = n4 * d4
        d8 = n8 * math.exp(log_ratio)
        return law.predict(n4, n8 * d8 / n4, "QuEST 4") - law.predict(n8, d8, "QuEST 8")

    found = threshold(law, "QuEST 4", "QuEST 8", memory, bits=quest.BITS)
    assert found == pytest.approx(math.exp(brentq(gap, -5, 12, xtol=1e-12)), rel=1e-8)
    assert gap(math.log(found) + 0.1) < 0 < gap(math.log(found) - 0.1)  # above it, the fewer bits are better
    assert found == pytest.approx({1.6e9: 146, 14e9: 29.3, 112e9: 6.28}[memory], rel=0.01)  # the paper: about 30, 14 Gb


def test_a_threshold_that_does_not_exist():
    law = Law(A=8.0, alpha=0.1, B=80.0, beta=0.25, E=0.5, eff={"16": 1.0, "8": 0.9, "2": 0.1})
    with pytest.raises(InputError, match=r"'2' does not overtake '8'.*0\.0500 against 0\.1125"):
        threshold(law, "2", "8", 1e9)
    with pytest.raises(InputError, match="must have fewer"):
        threshold(law, "8", "2", 1e9)
    with pytest.raises(InputError, match=r"unknown precision '3'.*valid: 16, 2, 8"):
        threshold(law, "3", "8", 1e9)


def test_bad_runs_are_refused():
    for field, value in (("loss", 0.0), ("loss", math.nan), ("tokens", math.inf), ("parameters", -1)):
        numbers = {"parameters": 1e8, "tokens": 1e9, "loss": 3.0} | {field: value}
        with pytest.raises(InputError, match=rf"{field}=.*'4' is not a positive finite number"):
            Observation(precision="4", **numbers)


def test_bad_fits_are_refused():
    runs = made(TRUE)
    with pytest.raises(InputError, match=r"6 runs of .* 7 free parameters"):
        fit([runs[i] for i in (0, 5, 11, 15, 20, 30)])
    with pytest.raises(InputError, match="of 1 sizes"):
        fit([run for run in runs if run.parameters == 3e7])
    with pytest.raises(InputError, match=r"no run at the reference precision 'BF16'.*'16', '4', '1'"):
        fit(runs, reference="BF16")
    with pytest.raises(InputError, match="there are no runs"):
        fit([])
    with pytest.raises(InputError, match="below the least loss"):
        fit(runs, fixed_E=5.0)
    with pytest.raises(InputError, match="delta must be positive"):
        fit(runs, delta=0.0)
    with pytest.raises(InputError, match="fewer than two runs at '2'"):
        bootstrap([*runs, Observation(1e8, 1e9, "2", 4.0)], Law(1.0, 1.0, 1.0, 1.0, 0.0, {**TRUE.eff, "2": 0.1}))
    with pytest.raises(InputError, match="unknown precision '3'"):
        bootstrap([*runs, Observation(1e8, 1e9, "3", 3.0)], TRUE)
    with pytest.raises(InputError, match="unknown precision 'fp4'"):
        TRUE.predict(1e8, 1e9, "fp4")


def test_the_published_runs_fall_into_their_schemes(quest, runs):
    """The counts that the authors' notebook asserts, and losses of its plots."""
    count = lambda names: [sum(run.precision == name for run in runs) for name in names]
    assert len(runs) == 104
    assert count(quest.QUEST) == [6, 12, 13, 14, 3]
    assert count(quest.PLAIN) == [5, 4, 5, 6, 4]
    assert count(quest.WEIGHTS) == [4, 4, 4, 4]
    assert count(["FP4", "2:4 INT4", "BF16"]) == [4, 6, 6]
    losses = {r.precision: round(float(r.loss), 4) for r in runs if r.parameters == 30_482_560 and r.tokens > 2.9e9}
    assert (losses["QuEST 2"], losses["no Hadamard 2"], losses["weight only 2"]) == (3.5740, 3.6772, 3.3730)
    assert (losses["FP4"], losses["2:4 INT4"], losses["BF16"]) == (3.2958, 3.3791, 3.2071)


def test_refitting_the_published_runs(refitted):
    """Efficiencies of an independent refit with a true Huber loss; the paper's own are least squares (below)."""
    expected = {"QuEST 1": 0.020, "QuEST 2": 0.156, "QuEST 3": 0.430, "QuEST 4": 0.690, "QuEST 8": 1.002, "FP4": 0.618,
                "2:4 INT4": 0.376}  # fmt: skip
    assert {name: refitted.eff[name] for name in expected} == pytest.approx(expected, rel=0.03)
    assert refitted.rmse <= 0.0041
    assert refitted.alpha == pytest.approx(0.0633, abs=2e-4)
    assert refitted.E < 0.01


def test_least_squares_gives_the_published_numbers(quest, runs):
    found = fit(runs, reference="BF16", delta=1.0, starts=FEW)
    assert found.eff == pytest.approx(quest.PUBLISHED.eff, rel=5e-3)
    assert (found.A, found.alpha, found.B, found.beta) == pytest.approx((8.1340, 0.062727, 86.412, 0.241288), rel=1e-3)


def test_no_start_ends_elsewhere(runs, refitted):
    far = [Start(0.05, 0.3, 0.9, 0.0), Start(1.0, 1.0, 0.5, 0.9)]
    for start in far:
        assert fit(runs, reference="BF16", starts=[start]).eff == pytest.approx(refitted.eff, rel=1e-3)


def test_the_published_runs_do_not_fix_the_floor(quest, runs, refitted):
    held = profile(runs, refitted, (1.0, 1.69, 1.9), starts=FEW)
    assert [law.alpha for law in held] == pytest.approx([0.104, 0.165, 0.192], abs=1e-3)
    assert [law.rmse for law in held] == pytest.approx([0.0058, 0.0094, 0.0115], abs=1e-4)
    for law in held:  # alpha triples; the efficiencies and what they say stay
        assert optimum(law, among=quest.FAMILY, bits=quest.BITS)[0].precision == "QuEST 4"
        near = {name: refitted.eff[name] for name in ("QuEST 2", "QuEST 3", "QuEST 4", "QuEST 8", "FP4")}
        assert {name: law.eff[name] for name in near} == pytest.approx(near, rel=0.10)
    alone = fit([run for run in runs if run.precision == "BF16"], reference="BF16", starts=FEW)
    assert abs(alone.E - 1.4) < 0.05


def test_the_experiment_prints_and_writes_its_tables(quest, tmp_path, capsys):
    assert quest.main(["--resamples", "3", "--starts", "1", "--out", str(tmp_path)]) == 0
    assert "Efficiencies" in capsys.readouterr().out
    written = (tmp_path / "quest_law.md").read_text()
    (row,) = [line for line in written.splitlines() if line.startswith("| QuEST 4 | 4 | 14 |")]
    assert row.split(" | ")[3] == "0.6904"
    assert (tmp_path / "quest_law.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "quest_law.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("module", ["fbi.analysis.scaling", "fbi.analysis.scaling_report"])
def test_the_law_needs_no_jax(module):
    program = f"import sys, {module}\nprint(sorted({{'jax', 'flax', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

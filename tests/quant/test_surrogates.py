"""Surrogates: their areas, their schedules, and what is added around a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.quant import Ctx, quantizer
from fbi.quant.around import output_norm, prelu_shifted, rank_one, scale_experts
from fbi.quant.grid import Binary, HalfIntegers
from fbi.quant.surrogate import SURROGATES, Clip, Trust, surrogate

U = jnp.linspace(-40, 40, 800_001)


def area(name, t=1.0):
    slopes = surrogate(name)(Binary(), U, jnp.asarray(t))
    return float(np.trapezoid(np.asarray(slopes, np.float64), np.asarray(U, np.float64)))


@pytest.mark.parametrize(
    ("name", "expected"), [("clip", 2), ("swishsign", 2), ("approxsign", 2), ("tanh", 2.08), ("fourier", 2.045)]
)
def test_the_slope_of_a_sign_has_the_area_of_its_jump(name, expected):
    assert area(name) == pytest.approx(expected, abs=2e-3)


def test_scheduled_surrogates_follow_progress_without_compiling_anew():
    traced = 0

    @jax.jit
    def grad(w, t):
        nonlocal traced
        traced += 1
        return jax.grad(lambda w: jnp.sum(quantizer("irnet").apply(w, {}, Ctx(t))))(w)

    w = jax.random.normal(jax.random.key(0), (16, 4))
    assert not np.allclose(grad(w, 0.1), grad(w, 0.9))
    assert traced == 1
    # EDE: t = 0.1 and k = 10 at the start, t = 10 and k = 1 at the end: both slopes are k t = 1 and 10 at zero.
    zero = jnp.zeros((1,))
    ede, reste = surrogate("ede"), surrogate("reste")
    np.testing.assert_allclose([ede(Binary(), zero, jnp.asarray(t))[0] for t in (0.0, 0.5, 1.0)], [1, 1, 10], rtol=1e-5)
    # ReSTE: o = 1 is the clipped identity, o = 3 the cube root, its chord below 0.1.
    u = jnp.array([0.05, 0.5, 1.4, 1.6])
    np.testing.assert_allclose(reste(Binary(), u, jnp.asarray(0.0)), [1, 1, 1, 0], rtol=1e-5)
    expected = [0.1 ** (1 / 3) / 0.1, 0.5 ** (-2 / 3) / 3, 1.4 ** (-2 / 3) / 3, 0]
    np.testing.assert_allclose(reste(Binary(), u, jnp.asarray(1.0)), expected, rtol=1e-5)


def test_masks_follow_the_grid():
    u, t = jnp.array([-2.4, -2.0, -1.6, 0.3, 1.4, 1.9, 2.1]), jnp.asarray(1.0)
    grid = HalfIntegers.of(2)  # levels -1.5 ... 1.5
    np.testing.assert_array_equal(Clip()(grid, u, t), [False, False, False, True, True, False, False])
    np.testing.assert_array_equal(Trust()(grid, u, t), [False, True, True, True, True, True, False])
    assert Clip(1.3) == Clip(1.3)
    assert len({Clip(1.3), Clip(1.3), Clip(1.25)}) == 2


@pytest.mark.parametrize("name", SURROGATES)
def test_any_surrogate_goes_with_any_method_that_takes_one(name):
    w = jax.random.normal(jax.random.key(0), (16, 4))
    for text in ("fbi", "bitnet-b158", "bireal"):
        role = "activation" if text == "bireal" else "weight"
        q = quantizer(f"{text}:surrogate={name}", role)
        grad = jax.grad(lambda w, q=q: jnp.sum(q.apply(w, q.init(w)) ** 2))(w)
        assert np.isfinite(grad).all()


def test_the_rank_one_scales_are_the_top_singular_pair(x64):
    w = np.abs(np.random.default_rng(0).standard_normal((40, 24)))
    left, right = rank_one(jnp.asarray(w))
    u, s, v = np.linalg.svd(w)
    np.testing.assert_allclose(left * right, s[0] * np.outer(u[:, 0], v[0]), rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(left**2), jnp.sum(right**2), rtol=1e-9)


def test_the_output_norm_has_no_mean_and_unit_variance():
    y = output_norm(0.0).post(3 + jax.random.normal(jax.random.key(0), (5, 64)), {}, None)
    np.testing.assert_allclose(y.mean(-1), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(y.var(-1), np.ones(5), rtol=1e-5)


def test_scale_experts_equal_the_papers_formula(x64):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 12)), rng.standard_normal((12, 6))
    around = scale_experts(4)
    p = {
        name: jnp.asarray(rng.standard_normal(leaf.shape))
        for name, leaf in around.init(jnp.asarray(w), jax.random.key(0)).items()
    }
    signs = quantizer("binarymos").apply(jnp.asarray(w))
    moved, memo = around.pre(jnp.asarray(x), p)
    y = around.post(moved @ signs, p, memo)
    logits = x @ np.asarray(p["gate"])
    r = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = ((x * (r @ np.asarray(p["into"]))) @ np.sign(w)) * (r @ np.asarray(p["out"]))
    np.testing.assert_allclose(y, expected, rtol=1e-9)


def test_scale_experts_start_as_the_rank_one_scales_whatever_the_gate_says(x64):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((12, 6)))
    around, x = scale_experts(4), jnp.ones((2, 3, 12))
    p = around.init(w, jax.random.key(0))
    moved, memo = around.pre(x, p)
    left, right = rank_one(jnp.abs(w))
    expected = x @ (jnp.sign(w) * left * right)
    np.testing.assert_allclose(around.post(moved @ jnp.sign(w), p, memo), expected, rtol=1e-9)


def test_rprelu_bends_at_gamma_and_lands_at_zeta():
    p = {"gamma": jnp.array([[1.0]]), "zeta": jnp.array([[0.5]]), "slope": jnp.array([[0.25]])}
    y = prelu_shifted().post(jnp.array([[3.0], [1.0], [-1.0]]), p, None)
    np.testing.assert_allclose(y, [[2.5], [0.5], [0.0]])


def test_onebit_is_the_norm_of_the_rank_one_product():
    q = quantizer("onebit")
    w = jax.random.normal(jax.random.key(0), (32, 8))
    p = q.init(w)
    np.testing.assert_allclose(q.apply(w, p), p["g"] * jnp.sign(w) * p["h"], rtol=1e-6)
    assert q.bits((4096, 4096)).paper_per_weight == pytest.approx(1.0078, abs=1e-4)
    assert quantizer("binarymos").bits((4096, 4096)).paper_per_weight == pytest.approx(1.047, abs=1e-3)
    assert quantizer("binarymos").bits((4096, 11008)).paper_per_weight == pytest.approx(1.027, abs=1e-3)

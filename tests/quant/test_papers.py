"""The papers' formulas, forward and backward, written out by hand in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.quant import Ctx, quantizer

RNG = np.random.default_rng(0)


def pulled(text, role, x, g, qparams=None):
    """(y, dL/dx, gradients of what is learned) as float64 numpy."""
    q = quantizer(text, role)
    qparams = q.init(x) if qparams is None else qparams
    y, pull = jax.vjp(q.apply, x, qparams)
    dx, dp = pull(g)
    return np.asarray(y), np.asarray(dx), {name: np.asarray(leaf) for name, leaf in dp.items()}


@pytest.fixture
def wg(x64):
    """A weight and a cotangent."""
    return jnp.asarray(RNG.standard_normal((24, 10))), jnp.asarray(RNG.standard_normal((24, 10)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_equals_equations_1_to_3(wg, bits):
    w, g = (np.asarray(a) for a in wg)
    top = 2 ** (bits - 1) - 1
    s = 2 * np.abs(w).mean() / np.sqrt(top)
    y, dw, dp = pulled(f"lsq:bits={bits}", "weight", *wg)
    u = w / s
    inside = (-top - 1 <= u) & (u <= top)
    np.testing.assert_allclose(y, s * np.clip(np.round(u), -top - 1, top), rtol=1e-12)
    np.testing.assert_allclose(dw, g * inside, rtol=1e-12)
    slope = np.where(u < -top - 1, -top - 1, np.where(u > top, top, np.round(u) - u))
    np.testing.assert_allclose(dp["step"], np.sum(g * slope).reshape(1, 1) / np.sqrt(w.size * top), rtol=1e-9)


def test_lsq_counts_the_features_of_an_activation(wg):
    x, g = wg
    _, _, dp = pulled("lsq:bits=4", "activation", x, g, {"step": jnp.full((1, 1), 0.2)})
    _, _, dw = pulled("lsq:bits=4", "weight", x, g, {"step": jnp.full((1, 1), 0.2)})
    np.testing.assert_allclose(dp["step"] * np.sqrt(x.shape[1]), dw["step"] * np.sqrt(x.size), rtol=1e-12)


def test_pact_equals_equations_1_and_3(wg):
    x, g = (np.asarray(a) for a in wg)
    alpha, n = 1.1, 15
    y, dx, dp = pulled("pact:bits=4", "activation", *wg, {"alpha": jnp.full((1, 1), alpha)})
    np.testing.assert_allclose(y, np.round(np.clip(x, 0, alpha) * n / alpha) * alpha / n, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(dx, g * ((x > 0) & (x < alpha)), rtol=1e-9)
    np.testing.assert_allclose(dp["alpha"], g[x >= alpha].sum().reshape(1, 1), rtol=1e-9)
    _, dx, dp = pulled("pact:bits=4,range=symmetric", "activation", *wg, {"alpha": jnp.full((1, 1), alpha)})
    np.testing.assert_allclose(dx, g * (np.abs(x) < alpha), rtol=1e-9)
    np.testing.assert_allclose(dp["alpha"][0, 0], g[x >= alpha].sum() - g[x <= -alpha].sum(), rtol=1e-9)


@pytest.mark.parametrize("text", ["paretoq:bits=1", "lsq:bits=1,granularity=output"])
def test_the_elastic_sign_equals_its_formula(wg, text):
    w, g = (np.asarray(a) for a in wg)
    y, dw, dp = pulled(text, "weight", *wg)
    alpha = np.abs(w).mean(0, keepdims=True)
    np.testing.assert_allclose(y, alpha * np.where(w >= 0, 1, -1), rtol=1e-12)
    np.testing.assert_allclose(dw, g * (np.abs(w) <= alpha), rtol=1e-9)
    np.testing.assert_allclose(dp[next(iter(dp))], (g * np.sign(w)).sum(0, keepdims=True) / np.sqrt(w.size), rtol=1e-9)


def test_fbi_scales_equal_section_3_1(wg):
    w, g = (np.asarray(a) for a in wg)
    y, dw, dp = pulled("fbi", "weight", *wg)
    beta = w.mean(1, keepdims=True)
    alpha = np.abs(w - beta).mean(1, keepdims=True)
    np.testing.assert_allclose(y, alpha * np.sign(w) + beta, rtol=1e-12)
    np.testing.assert_allclose(dw, alpha * g, rtol=1e-12)
    np.testing.assert_allclose(dp["alpha"], (g * np.sign(w)).sum(1, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(dp["beta"], g.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize(("bits", "stretch", "half"), [(1.58, 1.5, 0.0), (2, 2.0, 0.5)])
def test_the_stretched_quantizer_of_paretoq_equals_its_equation(wg, bits, stretch, half):
    w, g = (np.asarray(a) for a in wg)
    alpha = np.full((1, w.shape[1]), 1.3)
    y, dw, dp = pulled(f"paretoq:bits={bits}", "weight", *wg, {"alpha": jnp.asarray(alpha)})
    u = np.clip(w / alpha, -0.99, 0.99)
    level = np.round(u * stretch - half) + half
    np.testing.assert_allclose(y, alpha * level / stretch, rtol=1e-9)
    inside = np.abs(w / alpha) <= 0.99
    np.testing.assert_allclose(dw, g * inside, rtol=1e-9)
    slope = level / stretch - np.where(inside, w / alpha, 0)
    np.testing.assert_allclose(dp["alpha"], (g * slope).sum(0, keepdims=True) / np.sqrt(w.size), rtol=1e-9)
    np.testing.assert_allclose(quantizer(f"paretoq:bits={bits}").init(wg[0])["alpha"][0], np.abs(w).max(0), rtol=1e-12)


def test_twn_ttq_and_xnor_equal_their_equations(wg):
    w, g = (np.asarray(a) for a in wg)
    threshold = 0.7 * np.abs(w).mean()
    above = np.abs(w) > threshold
    y, dw, _ = pulled("twn", "weight", *wg)
    np.testing.assert_allclose(y, np.where(above, np.sign(w), 0) * np.abs(w)[above].mean(), rtol=1e-9)
    np.testing.assert_allclose(dw, g, rtol=1e-9)

    threshold = 0.05 * np.abs(w).max()
    y, dw, dp = pulled("ttq", "weight", *wg, {"positive": jnp.full((1, 1), 0.8), "negative": jnp.full((1, 1), 1.7)})
    plus, minus = w > threshold, w < -threshold
    np.testing.assert_allclose(y, 0.8 * plus - 1.7 * minus, rtol=1e-12)
    np.testing.assert_allclose(dw, g * np.where(plus, 0.8, np.where(minus, 1.7, 1.0)), rtol=1e-9)
    np.testing.assert_allclose(dp["positive"][0, 0], g[plus].sum(), rtol=1e-9)
    np.testing.assert_allclose(dp["negative"][0, 0], -g[minus].sum(), rtol=1e-9)

    alpha = np.abs(w).mean(0, keepdims=True)
    y, dw, _ = pulled("xnor", "weight", *wg)
    np.testing.assert_allclose(y, alpha * np.sign(w), rtol=1e-9)
    np.testing.assert_allclose(dw, g * (1 / len(w) + alpha * (np.abs(w) <= 1)), rtol=1e-9)


def test_dorefa_equals_equations_7_to_11(wg):
    w, g = (np.asarray(a) for a in wg)
    squashed, n = np.tanh(w), 7
    top = np.abs(squashed).max()
    y, dw, _ = pulled("dorefa:bits=3", "weight", *wg)
    np.testing.assert_allclose(y, 2 * np.round(n * (squashed / (2 * top) + 0.5)) / n - 1, rtol=1e-9)
    np.testing.assert_allclose(dw, g * (1 - squashed**2) / top, rtol=1e-9)
    y, dx, _ = pulled("dorefa:bits=3", "activation", *wg)
    np.testing.assert_allclose(y, np.round(n * np.clip(w, 0, 1)) / n, rtol=1e-9)
    np.testing.assert_allclose(dx, g * ((w >= 0) & (w <= 1)), rtol=1e-9)


def test_bitnet_b1_centres_the_sign_and_not_the_scale(wg):
    w, g = (np.asarray(a) for a in wg)
    skewed = jnp.asarray(w + 0.8)
    y, dw, _ = pulled("bitnet-b1", "weight", skewed, wg[1])
    scale = np.abs(w + 0.8).mean()
    np.testing.assert_allclose(y, scale * np.where(w >= w.mean(), 1, -1), rtol=1e-9)
    np.testing.assert_allclose(dw, scale * g, rtol=1e-9)
    _, dw, _ = pulled("bitnet-b1:rule=code", "weight", skewed, wg[1])
    np.testing.assert_allclose(dw, g, rtol=1e-9)
    y = np.asarray(quantizer("bitnet-b1:groups=2").apply(skewed))
    halves = [np.asarray(quantizer("bitnet-b1").apply(half)) for half in (skewed[:, :5], skewed[:, 5:])]
    np.testing.assert_allclose(y, np.concatenate(halves, 1), rtol=1e-12)


def test_bitnet_b1_activations_take_the_scale_of_the_tensor_or_of_the_token():
    x = jnp.array([[1.0, -0.5], [100.0, 3.0]])
    tensor, token = (quantizer(f"bitnet-b1:granularity={k}", "activation").apply(x) for k in ("tensor", "token"))
    np.testing.assert_allclose(tensor, np.clip(np.round(np.asarray(x) * 1.28), -128, 127) / 1.28, rtol=1e-6)
    assert float(token[0, 1]) == -0.5
    assert float(tensor[0, 1]) == pytest.approx(-0.78125)


def test_bitnet_a4_codes_a_constant_token_as_three_and_the_top_half_keeps_its_ties():
    x = jnp.array([[0.7, -0.7, 0.7, 0.7]])
    np.testing.assert_array_equal(quantizer("bitnet-a4", "activation").encode(x).codes, [[3, -3, 3, 3]])
    x = jnp.array([[4.0, 1.0, -3.0, 2.0], [1.0, 1.0, 1.0, 0.5]])
    codes = np.asarray(quantizer("bitnet-topk", "activation").encode(x).codes)
    np.testing.assert_array_equal(codes != 0, [[True, False, True, False], [True, True, True, False]])
    dx = jax.grad(lambda x: jnp.sum(quantizer("bitnet-topk", "activation").apply(x)))(x)
    np.testing.assert_allclose(dx, np.ones((2, 4)), rtol=1e-6)


def test_bitnet_v2_rotates_the_input_and_leaves_it_rotated(x64):
    x = jnp.asarray(RNG.standard_normal((5, 64)))
    h = np.array([[1.0]])
    while len(h) < 64:
        h = np.block([[h, h], [h, -h]]) / np.sqrt(2)
    rotated = np.asarray(x) @ h
    y, dx, _ = pulled("bitnet-v2:bits=8", "activation", x, jnp.ones_like(x))
    assert np.abs(y - rotated).max() <= np.abs(rotated).max() / 127
    np.testing.assert_allclose(dx, np.ones((5, 64)) @ h.T, atol=1e-9)
    beta = np.abs(rotated).mean(1, keepdims=True)
    y = quantizer("bitnet-v2:bits=4", "activation").apply(x)
    np.testing.assert_allclose(y, beta / 7**0.5 * np.clip(np.round(7**0.5 * rotated / beta), -8, 7), rtol=1e-9)


def test_the_first_position_of_a_cache_is_wider():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 16))
    q = quantizer("bitnet-kv:bits=3,first=4", "activation")
    codes = np.asarray(q.apply(x, {}, Ctx(positions=jnp.arange(3))))
    distinct = [max(len(np.unique(codes[b, t, h])) for b in range(2) for h in range(4)) for t in range(3)]
    assert distinct[0] > 7 >= distinct[1]
    later = q.apply(x, {}, Ctx(positions=jnp.arange(5, 8)))
    np.testing.assert_array_equal(later[:, 1:], codes[:, 1:])
    assert not np.array_equal(later[:, 0], codes[:, 0])


def test_irnet_standardises_and_takes_a_power_of_two(wg):
    w = np.asarray(wg[0])
    standard = (w - w.mean(0)) / w.std(0)
    scale = 2.0 ** np.round(np.log2(np.abs(standard).mean(0)))
    np.testing.assert_allclose(quantizer("irnet").apply(wg[0]), scale * np.where(standard >= 0, 1, -1), rtol=1e-9)


def test_adabin_ternaryllm_and_bit_equal_their_formulas(wg):
    w, g = (np.asarray(a) for a in wg)
    y, _, _ = pulled("adabin", "weight", *wg)
    np.testing.assert_allclose(y, w.mean(0) + w.std(0) * np.where(w >= w.mean(0), 1, -1), rtol=1e-9)

    start = {"gamma": jnp.full((1, 10), 0.9), "delta": jnp.full((1, 10), 0.1)}
    y, dw, dp = pulled("ternaryllm", "weight", *wg, start)
    t = np.clip(np.round((w - 0.1) / 0.9), -1, 1)
    np.testing.assert_allclose(y, 0.9 * t + 0.1, rtol=1e-9)
    np.testing.assert_allclose(dw, g, rtol=1e-9)
    np.testing.assert_allclose(dp["gamma"], (g * t).sum(0, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(dp["delta"], g.sum(0, keepdims=True), rtol=1e-9)

    start = {"alpha": jnp.full((1, 1), 0.7), "beta": jnp.full((1, 10), 0.2)}
    y, dx, dp = pulled("bit", "activation", *wg, start)
    moved = w + 0.2
    inside = np.abs(moved) <= 0.7
    np.testing.assert_allclose(y, 0.7 * np.where(moved >= 0, 1, -1), rtol=1e-9)
    np.testing.assert_allclose(dx, g * inside, rtol=1e-9)
    np.testing.assert_allclose(dp["beta"], (g * inside).sum(0, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(dp["alpha"][0, 0], (g * np.sign(moved)).sum() / np.sqrt(10), rtol=1e-9)
    start = {"alpha": jnp.full((1, 1), 0.7), "beta": jnp.full((1, 1), 0.2)}
    y, _, _ = pulled("bit:signed=false", "activation", *wg, start)
    np.testing.assert_allclose(y, 0.7 * np.round(np.clip(moved / 0.7, 0, 1)), rtol=1e-9)


def test_dual_binarization_starts_at_minus_s_0_s_2s_and_both_scales_learn(wg):
    w, g = (np.asarray(a) for a in wg)
    q = quantizer("dbllm:group=24")
    p = q.init(wg[0])
    s = (w.max(0) - w.min(0)) / 3
    y, dw, dp = pulled("dbllm:group=24", "weight", *wg)
    first, second = np.asarray(p["first"]), np.asarray(p["second"])
    b1 = w >= (first + second) / 2
    b2 = -(w - first * b1 - second / 2) >= 0
    np.testing.assert_allclose(y, first * b1 + second * b2, rtol=1e-9)
    assert set(np.unique((y / s).round(6))) == {-1, 0, 1, 2}
    np.testing.assert_allclose(dw, g, rtol=1e-9)
    np.testing.assert_allclose(dp["first"], (g * b1).sum(0, keepdims=True), rtol=1e-9)
    np.testing.assert_allclose(dp["second"], (g * b2).sum(0, keepdims=True), rtol=1e-9)


def test_lambda_warm_up_mixes_and_ends_exactly_at_the_quantizer(wg):
    w = wg[0]
    q, plain = quantizer("bitnet-b158:warmup=0.5"), quantizer("bitnet-b158").apply(w)
    np.testing.assert_allclose(q.apply(w, {}, Ctx(0.0)), w)
    np.testing.assert_allclose(q.apply(w, {}, Ctx(0.25)), 0.5 * w + 0.5 * plain, rtol=1e-12)
    np.testing.assert_array_equal(q.apply(w, {}, Ctx(0.5)), plain)
    np.testing.assert_allclose(jax.grad(lambda w: jnp.sum(q.apply(w, {}, Ctx(0.3))))(w), np.ones(w.shape), rtol=1e-9)


@pytest.mark.parametrize("text", ["absmax:bits=4,rounding=stochastic", "ste:bits=3,rounding=stochastic"])
def test_stochastic_rounding_needs_a_key_and_is_right_on_average(text):
    x = jnp.linspace(-1, 1, 41)[None, :]
    q, nearest = quantizer(text, "activation"), quantizer(text.replace(",rounding=stochastic", ""), "activation")
    np.testing.assert_array_equal(q.apply(x), nearest.apply(x))
    draws = jax.vmap(lambda k: q.apply(x, {}, Ctx(key=k)))(jax.random.split(jax.random.key(0), 4000))
    step = np.diff(np.unique(np.asarray(draws))).max()
    assert np.abs(np.asarray(draws) - np.asarray(x)).max() < step * 1.001
    np.testing.assert_allclose(draws.mean(0), x, atol=4 * step / 2 / np.sqrt(4000))


def test_stochastic_binaryconnect_draws_the_hard_sigmoid():
    w = jnp.array([[-1.5, -0.5, 0.0, 0.5, 1.5]])
    q = quantizer("binaryconnect:rounding=stochastic")
    draws = jax.vmap(lambda k: q.apply(w, {}, Ctx(key=k)))(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose((np.asarray(draws) > 0).mean(0), [[0, 0.25, 0.5, 0.75, 1]], atol=0.03)

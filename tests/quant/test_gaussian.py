"""Grids for a normal distribution: golden errors, clips and levels, by a quadrature of their own."""

import itertools

import numpy as np
import pytest

from fbi.quant import gaussian
from fbi.quant.methods.quest import fp4_levels

# Mean squared errors on N(0, 1): Gauss-Legendre on each cell gives every digit shown.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def integral(f, a, b):
    """Gauss-Legendre in 8 panels of [a, b], the tails cut at 12 deviations."""
    edges = np.linspace(max(a, -12), min(b, 12), 9)
    total = 0.0
    for lo, hi in itertools.pairwise(edges):
        z = (hi - lo) / 2 * NODES + (hi + lo) / 2
        total += (hi - lo) / 2 * np.sum(WEIGHTS * f(z) * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
    return total


def mse(levels, thresholds=None):
    inner = thresholds or [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    edges = [-np.inf, *inner, np.inf]
    return sum(integral(lambda z, v=v: (z - v) ** 2, a, b) for v, a, b in zip(levels, edges, edges[1:], strict=False))


def conditional_mean(a, b):
    return integral(lambda z: z, a, b) / integral(lambda z: np.ones_like(z), a, b)


E = np.sqrt(2 / np.pi)  # E|z|
GOLDEN = {
    "binary, mean|w|": (mse([-E, E]), 0.36338),
    "b1.58, absmean with its own scale": (mse([-E, 0, E]), 0.26338),
    "the same threshold, least-squares scale": (
        mse([-conditional_mean(E / 2, np.inf), 0, conditional_mean(E / 2, np.inf)], [-E / 2, E / 2]),
        0.21304,
    ),
    "TWN": (
        mse([-conditional_mean(0.7 * E, np.inf), 0, conditional_mean(0.7 * E, np.inf)], [-0.7 * E, 0.7 * E]),
        0.19163,
    ),
    "optimal ternary": (mse([-gaussian.OPTIMAL[1.58], 0, gaussian.OPTIMAL[1.58]]), 0.19017),
    "bell split": (mse([-1.5104, -0.4528, 0.4528, 1.5104], [-0.9816, 0, 0.9816]), 0.11748),
    "2 bits": (mse(gaussian.midrise(2, gaussian.OPTIMAL[2])), 0.11885),
    "3 bits": (mse(gaussian.midrise(3, gaussian.OPTIMAL[3])), 0.03744),
    "4 bits": (mse(gaussian.midrise(4, gaussian.OPTIMAL[4])), 0.01154),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_errors_are_reproduced_by_quadrature(name):
    found, golden = GOLDEN[name]
    assert found == pytest.approx(golden, abs=1e-5)


def test_greedy_residual_of_order_two_has_the_golden_error():
    # residual of |z| about E is binarised with its own mean magnitude
    second = integral(lambda z: np.abs(np.abs(z) - E), -np.inf, 0) + integral(lambda z: np.abs(z - E), 0, E)
    second += integral(lambda z: np.abs(z - E), E, np.inf)
    assert mse([-E - second, -E + second, E - second, E + second]) == pytest.approx(0.13045, abs=1e-4)


# The recomputed column of the published table of constants: bits -> (alpha*, error)
RECOMPUTED = {
    1: (0.797885, 0.363380), 2: (1.493530, 0.118846), 3: (2.051068, 0.0374397), 4: (2.514005, 0.0115429),
    5: (2.916151, 0.0034952), 6: (3.277985, 0.0010401), 7: (3.611097, 3.0433e-4), 8: (3.922204, 8.7686e-5),
}  # fmt: skip


@pytest.mark.parametrize("bits", RECOMPUTED)
def test_clips_are_those_of_least_error(bits):
    alpha, error = RECOMPUTED[bits]
    constant = gaussian.OPTIMAL[bits]
    assert constant == pytest.approx(alpha, abs=1e-6)
    assert gaussian.optimal_alpha(gaussian.midrise(bits, 1.0)) == pytest.approx(constant, abs=1e-9)
    assert mse(gaussian.midrise(bits, constant)) == pytest.approx(error, rel=1e-4)
    assert gaussian.squared_error(gaussian.midrise(bits, constant)) == pytest.approx(error, rel=1e-4)
    for nearby in (constant * 0.999, constant * 1.001):
        assert mse(gaussian.midrise(bits, nearby)) > mse(gaussian.midrise(bits, constant))
    assert gaussian.PUBLISHED[bits] == pytest.approx(constant, rel=0.011)


def test_ternary_and_fp4_constants_are_those_of_least_error():
    assert gaussian.optimal_alpha([-1, 0, 1]) == pytest.approx(gaussian.OPTIMAL[1.58], abs=1e-9)
    assert gaussian.optimal_alpha(fp4_levels()) == pytest.approx(gaussian.FP4_UNIT, abs=1e-9)
    assert mse([gaussian.FP4_UNIT * x for x in fp4_levels()]) == pytest.approx(0.012685, abs=1e-6)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.363380), (2, 0.117482), (3, 0.034548), (4, 0.009501)])
def test_lloyd_max_levels_are_converged(bits, error):
    upper = gaussian.LLOYD[bits]
    levels = [*(-x for x in reversed(upper)), *upper]
    np.testing.assert_allclose(levels, gaussian.lloyd_max(bits), atol=1e-9)
    edges = [-np.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), np.inf]
    means = [conditional_mean(a, b) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(levels, means, atol=1e-8)
    assert mse(levels) == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "golden"),
    [
        ("bitnet-b158", 0.26338), ("twn", 0.19163), ("quest:bits=1.58,block=0", 0.19017), ("xnor", 0.36338),
        ("quest:bits=2,block=0", 0.11885), ("quest:bits=3,block=0", 0.03744), ("quest:bits=4,block=0", 0.01154),
        ("quest:levels=lloyd,block=0", 0.009501), ("quest:levels=fp4,block=0", 0.012685), ("bitnet-a4", 0.0132),
    ],
)  # fmt: skip
def test_the_quantizers_reach_the_errors_on_quantiles_of_a_normal(text, golden):
    from statistics import NormalDist

    import jax.numpy as jnp

    from fbi.quant import quantizer

    z = np.array([NormalDist().inv_cdf((i + 0.5) / 40_000) for i in range(40_000)])
    role = "activation" if text == "bitnet-a4" else "weight"
    x = jnp.asarray(z[None] if role == "activation" else z[:, None], jnp.float32)
    relative = float(jnp.sum((quantizer(text, role).apply(x) - x) ** 2) / jnp.sum(x**2))
    assert relative == pytest.approx(golden, rel=8e-3)

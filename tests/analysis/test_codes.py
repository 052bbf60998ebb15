"""Diagnostics of codes and latents against numbers worked out on paper."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.analysis import entropy, flips, half_step, margin, masked, near_threshold, relative_error
from fbi.quant import quantizer

ALPHA = {"alpha": jnp.array([[1.0]])}  # of a whole tensor
SIGNS = quantizer("fbi:granularity=tensor,shift=false")
KEY = jax.random.key(0)


def share(ratio):
    return float(ratio.value)


def test_flips_are_the_share_of_codes_that_differ():
    before, after = jnp.array([[0, -1, 0, 1], [3, 3, -2, 0]], jnp.int8), jnp.array([[0, 0, 0, -1], [3, 2, -2, 0]], jnp.int8)  # fmt: skip  # noqa: E501
    assert (int(flips(before, after).total), float(flips(before, after).over)) == (3, 8.0)
    assert share(flips(before, before)) == 0.0


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        ([0, 0, 0, 0], 0.0),
        ([0, -1, -1, 0], 1.0),
        ([-1, 0, 1, -1, 0, 1], math.log2(3)),
        ([7, 7, 7, -8], 0.75 * math.log2(4 / 3) + 0.25 * 2),
        ([-128, 127, 0, 1], 2.0),
        (list(range(-128, 128)), 8.0),
    ],
)
def test_entropy_in_bits_per_entry(codes, bits):
    found = jax.jit(entropy)(jnp.array(codes, jnp.int8))
    assert share(found) == pytest.approx(bits, abs=1e-6)
    assert float(found.total) == pytest.approx(bits * len(codes), abs=1e-4)


def test_relative_error_of_four_numbers():
    # (0.5, 0.5, 1, 2) - mean|w| sign = -0.5, -0.5, 0, 1: 1.5 over 0.25 + 0.25 + 1 + 4
    w = jnp.array([[0.5, 0.5], [1.0, -2.0]])
    w_hat = SIGNS.apply(w, SIGNS.init(w))
    np.testing.assert_array_equal(w_hat, [[1, 1], [1, -1]])
    assert share(relative_error(w, w_hat)) == pytest.approx(1.5 / 5.5)


@pytest.mark.parametrize(
    ("method", "error"),
    # On N(0, 1) by quadrature: 1 - 2/pi for signs; ternary with s = mean|w|
    [("fbi:granularity=tensor,shift=false", 0.36338), ("bitnet-b158", 0.26338)],
)
def test_relative_error_of_a_gaussian_is_that_of_quadrature(method, error):
    q, w = quantizer(method), jax.random.normal(KEY, (1000, 1000))
    assert share(relative_error(w, q.apply(w, q.init(w)))) == pytest.approx(error, abs=1e-3)


def test_half_a_step_is_alpha_for_signs_and_half_the_scale_for_ternary():
    w = jnp.array([[0.2, 1.0], [-1.0, -0.2]])
    assert float(half_step(SIGNS, w, {"alpha": jnp.array([[0.3]])})) == pytest.approx(0.3)
    # mean|w| = 0.6 is the step; the entries at 0 and at +-1 alike are one step from their neighbour
    assert float(half_step(quantizer("bitnet-b158"), w, {})) == pytest.approx(0.3)
    shifted = quantizer("fbi:granularity=tensor")
    assert float(half_step(shifted, w, {"alpha": jnp.array([[0.3]]), "beta": jnp.array([[5.0]])})) == pytest.approx(0.3)
    # two scales: the root mean square of 0.3 and 0.4
    rows = quantizer("fbi:shift=false")
    assert float(half_step(rows, w, {"alpha": jnp.array([[0.3], [0.4]])})) == pytest.approx(math.sqrt(0.125))
    # one code alone still has a neighbour
    assert float(half_step(SIGNS, jnp.ones((2, 2)), {"alpha": jnp.array([[0.3]])})) == pytest.approx(0.3)


def test_the_margin_of_mean_scaled_signs_is_one_and_of_ternary_two():
    w = jnp.array([[0.2, 1.0], [-1.0, -0.2]])
    assert share(margin(SIGNS, w, SIGNS.init(w))) == pytest.approx(1.0)
    assert share(margin(quantizer("bitnet-b158"), w, {})) == pytest.approx(2.0)
    assert share(margin(SIGNS, w, {"alpha": jnp.array([[0.1]])})) == pytest.approx(6.0)


def test_latents_near_the_threshold_of_a_sign():
    w = jnp.array([[0.099, -0.099, 0.101, -0.5], [0.0, 3.0, -0.01, 0.2]])
    assert share(near_threshold(SIGNS, w, ALPHA, KEY)) == pytest.approx(4 / 8)  # +-0.099, 0, -0.01
    assert share(near_threshold(SIGNS, w, {"alpha": jnp.array([[1.5]])}, KEY)) == pytest.approx(5 / 8)


def test_latents_near_a_threshold_of_a_gaussian():
    w = jax.random.normal(KEY, (1000, 1000))
    # ternary with s = 0.79788: thresholds at +-s/2, half a step is s/2, so 0.9 s/2 to 1.1 s/2 on both sides
    cdf = lambda x: 0.5 * math.erf(x / math.sqrt(2))
    expected = 2 * (cdf(1.1 * 0.39894) - cdf(0.9 * 0.39894))
    found = near_threshold(quantizer("bitnet-b158"), w, {}, jax.random.key(1))  # another than that of w
    assert share(found) == pytest.approx(expected, abs=2e-3)


def test_the_masked_share_is_that_of_the_surrogate():
    # clip passes |w| <= 1: three of eight are outside; alpha scales the gradient without masking
    w = jnp.array([[0.5, -1.5, 1.0, 2.0], [-1.0, 0.0, -3.0, 0.9]])
    clipped = quantizer("fbi:surrogate=clip,shift=false")
    alpha = {"alpha": jnp.array([[0.01], [100.0]])}
    assert share(masked(clipped, w, alpha)) == pytest.approx(3 / 8)
    assert share(masked(quantizer("fbi:shift=false"), w, alpha)) == 0.0
    # mean|w| = 1.2375; the clip of ternary codes passes |w| <= s: 1.5, 2 and 3 are outside
    assert share(masked(quantizer("bitnet-b158:surrogate=clip"), w, {})) == pytest.approx(3 / 8)


@pytest.mark.parametrize("method", ["fbi", "bitnet-b158:surrogate=clip", "absmax:bits=3"])
def test_a_stack_of_sharded_layers_gives_what_each_layer_gives_alone(method):
    q = quantizer(method)
    stack = jax.random.normal(KEY, (3, 16, 32))
    qparams = jax.vmap(q.init)(stack)

    def measure(w, p):
        codes = q.encode(w, p).codes
        return entropy(codes), relative_error(w, q.apply(w, p)), masked(q, w, p), margin(q, w, p), near_threshold(q, w, p, KEY)  # fmt: skip  # noqa: E501

    alone = [jax.jit(measure)(stack[i], jax.tree.map(lambda x, i=i: x[i], qparams)) for i in range(3)]
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"))):
        placed = jax.device_put(stack, jax.P(None, "data", "model"))
        together = jax.device_get(jax.jit(jax.vmap(measure))(placed, jax.vmap(q.init)(placed)))
    for i in range(3):
        ours = jax.tree.map(lambda x, i=i: float(x[i]), together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, jax.device_get(alone[i]))

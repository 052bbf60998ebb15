"""The published quantizers' own outputs and gradients (tests/reference/README.md), in [in, out] layout."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.quant import Ctx, quantizer

pytestmark = pytest.mark.usefixtures("optimized")

VECTORS = np.load(Path(__file__).parents[1] / "reference" / "quantizers.npz")
GRANULARITY = {"column": "input", "row": "output", "single": "tensor"}


def case(name):
    return {key.split("/")[1]: VECTORS[key] for key in VECTORS.files if key.startswith(name + "/")}


def as_in_out(scale):
    """A scale of the reference's [out, in] layout (or its scalar) as ours."""
    return jnp.asarray(scale).reshape(1, 1) if scale.ndim == 0 else jnp.asarray(scale).T


@pytest.mark.parametrize("inputs", ["normal", "heavy"])
@pytest.mark.parametrize("pattern", GRANULARITY)
def test_fbi_linear_agrees_forward_and_in_every_gradient(pattern, inputs):
    ref = case(f"FBILinear-{pattern}-{inputs}")
    q = quantizer(f"fbi:granularity={GRANULARITY[pattern]}")
    w = jnp.asarray(ref["W"]).T
    qparams = {name: as_in_out(ref[name]) for name in ("alpha", "beta")}

    y, pull = jax.vjp(lambda x, w, p: x @ q.apply(w, p), jnp.asarray(ref["x"]), w, qparams)
    dx, dw, dp = pull(jnp.asarray(ref["g"]))
    for ours, theirs in [
        (y, ref["y"]),
        (dx, ref["dx"]),
        (dw, ref["dW"].T),
        (dp["alpha"], as_in_out(ref["dalpha"])),
        (dp["beta"], as_in_out(ref["dbeta"])),
    ]:
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_bitnet_quantizers_agree_up_to_counted_flips(rule):
    flips = entries = 0
    for inputs in ("normal", "heavy"):
        weight, act, shared = (case(f"{n}-{inputs}") for n in ("BitNet158Weight", "BitNetAct8", "inputs"))
        for role, ref, source in (("weight", weight, weight), ("activation", act, shared)):
            q = quantizer(f"bitnet-b158:rule={rule}", role=role)
            y, pull = jax.vjp(lambda x, q=q: q.apply(x), jnp.asarray(source["x"]))
            (dx,) = pull(jnp.asarray(source["g"]))
            np.testing.assert_allclose(dx, ref["dx"], rtol=1e-5, atol=1e-6)
            wrong = ~np.isclose(y, ref["y"], rtol=1e-5, atol=1e-7)
            flips, entries = flips + int(wrong.sum()), entries + y.size
    assert entries == 4096
    assert flips <= entries / 10_000


def test_sign_of_zero_is_plus_one_and_a_negative_alpha_works():
    q = quantizer("fbi")
    w = jnp.array([[-2.0, 0.0, 3.0], [0.5, -0.0, -0.5]])
    qparams = {"alpha": jnp.array([[-0.5], [2.0]]), "beta": jnp.array([[0.1], [-0.2]])}
    np.testing.assert_allclose(q.apply(w, qparams), [[0.6, -0.4, -0.4], [1.8, 1.8, -2.2]], rtol=1e-6)

    g = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    _, pull = jax.vjp(q.apply, w, qparams)
    dw, dp = pull(g)
    np.testing.assert_allclose(dw, [[-0.5, -1.0, -1.5], [8.0, 10.0, 12.0]])  # alpha G, no mask
    np.testing.assert_allclose(dp["alpha"], [[-1 + 2 + 3], [4 + 5 - 6]])  # sum of G sign(w)
    np.testing.assert_allclose(dp["beta"], [[6.0], [15.0]])  # sum of G


def test_fbi_starts_from_the_centred_mean_magnitude_of_each_input_feature():
    w = jnp.array([[1.0, -1.0, 3.0], [2.0, 2.0, -1.0]])
    qparams = quantizer("fbi").init(w)
    np.testing.assert_allclose(qparams["beta"], [[1.0], [1.0]])
    np.testing.assert_allclose(qparams["alpha"], [[4 / 3], [4 / 3]])


def test_ternary_ties_round_half_to_even_and_clip_at_one():
    w = jnp.array([[0.5, -0.5, 1.5, -1.5, 2.5, -0.51, 0.51, 0.48]])
    scaled = w / jnp.mean(jnp.abs(w))
    q = quantizer("bitnet-b158:rule=code")
    np.testing.assert_array_equal(q.apply(scaled), [[0, 0, 1, -1, 1, -1, 1, 0]])


def test_absmax_ties_round_half_to_even():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    codes = quantizer("absmax:rule=code", role="activation").encode(x).codes
    np.testing.assert_array_equal(codes, [[127, 0, 2, 2, 0, -2, -127]])


def test_a_token_of_zeros_and_a_matrix_of_zeros_stay_zero():
    zeros = jnp.zeros((3, 4))
    for text in ("absmax", "absmax:rule=code", "bitnet-b158", "bitnet-b158:rule=code"):
        for role in ("weight", "activation"):
            np.testing.assert_array_equal(quantizer(text, role=role).apply(zeros), zeros)


def test_a_matrix_below_the_guard_of_the_code_is_scaled_by_the_guard_and_its_gradient_stays_one():
    w = jnp.array([[2e-6, -1e-6, 3e-6, -2e-6]])  # mean |w| = 2e-6
    np.testing.assert_allclose(quantizer("bitnet-b158").apply(w), [[2e-6, 0, 2e-6, -2e-6]], rtol=1e-5)
    np.testing.assert_array_equal(quantizer("bitnet-b158:rule=code").apply(w), [[0, 0, 0, 0]])
    for text in ("bitnet-b158", "bitnet-b158:rule=code", "absmax"):
        q = quantizer(text)
        for x in (w, w * 0):
            grad = jax.grad(lambda x, q=q: jnp.sum(q.apply(x)))(x)
            np.testing.assert_allclose(grad, jnp.ones_like(x), rtol=1e-6)


def test_clip_masks_the_gradient_outside_the_grid_and_identity_does_not():
    w = jnp.array([[-1.5, -1.0, 0.5, 2.0]])
    qparams = {"alpha": jnp.full((1, 1), 2.0)}
    for surrogate, slope in (("identity", [1, 1, 1, 1]), ("clip", [0, 1, 1, 0])):
        q = quantizer(f"fbi:shift=false,granularity=tensor,surrogate={surrogate}")
        grad = jax.grad(lambda w, q=q: jnp.sum(q.apply(w, qparams)))(w)
        np.testing.assert_array_equal(grad, 2.0 * np.array([slope]))


def test_frozen_scales_get_no_gradient_and_the_same_values():
    w = jax.random.normal(jax.random.key(0), (6, 4))
    live, frozen = quantizer("fbi"), quantizer("fbi:frozen=true")
    qparams = live.init(w)
    np.testing.assert_array_equal(frozen.apply(w, qparams), live.apply(w, qparams))
    grads = jax.grad(lambda p: jnp.sum(frozen.apply(w, p) ** 2))(qparams)
    assert all(not g.any() for g in jax.tree.leaves(grads))


def test_progress_and_key_may_be_traced_without_changing_a_method_that_ignores_them():
    w = jax.random.normal(jax.random.key(1), (6, 4))
    q = quantizer("bitnet-b158:surrogate=clip")
    grad = jax.jit(jax.grad(lambda w, t, key: jnp.sum(q.apply(w, {}, Ctx(t, key)) ** 2)))
    a, b = grad(w, 0.1, jax.random.key(0)), grad(w, 0.9, jax.random.key(1))
    np.testing.assert_array_equal(a, b)
    assert jax.grad(lambda t: jnp.sum(q.apply(w, {}, Ctx(t))))(0.5) == 0

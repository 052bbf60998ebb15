"""QuEST's published quantizers: their outputs and gradients (tests/reference/README.md), and where they are wrong."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.quant import gaussian, quantizer
from fbi.quant.transform import IDENTITY, Hadamard

pytestmark = pytest.mark.usefixtures("optimized")

VECTORS = np.load(Path(__file__).parents[1] / "reference" / "quantizers.npz")
QUEST = "quest:clips=published,bits={bits}"
# The published class -> our text, and the role whose last or first axis is its row.
CLASSES = {
    "TrustQuantizer": (QUEST + ",block=0,surrogate=trust", "activation"),
    "HadamardTrustQuantizer": (QUEST + ",rotate=back,surrogate=trust", "activation"),
    "HalfHadamardTrustQuantizer": (QUEST + ",rotate=stay,surrogate=trust", "activation"),
    "ClipQuantizer": (QUEST + ",block=0,surrogate=clip,clip=1.3", "activation"),
    "HadamardClipQuantizer": (QUEST + ",rotate=back,surrogate=clip,clip=1.3", "activation"),
    "HalfHadamardClipQuantizer": (QUEST + ",rotate=stay,surrogate=clip,clip=1.3", "activation"),
    "STEQuantizer": ("ste:bits={bits},scale=rms,clips=published", "activation"),
    "LSQQuantizer": ("lsq:bits={bits},grid=midrise", "weight"),
    "LSQPlusWeightQuantizer": ("lsqplus:bits={bits},init=gaussian,clips=published", "weight"),
    "HadamardFourEightTrustQuantizer": (QUEST + ",rotate=back,surrogate=trust,sparsity=4:8", "activation"),
}
CASES = sorted({key.split("/")[0] for key in VECTORS.files if key.split("-")[0] in CLASSES})


def test_every_quantizer_among_the_vectors_is_asserted_here_or_beside():
    beside = {"FBILinear", "BitNet158Weight", "BitNetAct8", "inputs"}
    assert {key.split("-")[0] for key in VECTORS.files} == set(CLASSES) | beside
    assert len(CASES) == 88


def compare(name):
    """(entries of y and dx that differ, entries in all), after asserting the step's gradient where there is one."""
    kind, bits, inputs = name.split("-")
    text, role = CLASSES[kind]
    x, g = (jnp.asarray(VECTORS[f"inputs-{inputs}/{part}"]) for part in "xg")
    turn = (lambda a: a.T) if role == "weight" else (lambda a: a)
    q = quantizer(text.format(bits=bits), role)
    qparams = q.init(turn(x))
    y, pull = jax.vjp(q.apply, turn(x), qparams)
    dx, dp = pull(turn(g))
    if dp:
        np.testing.assert_allclose(qparams["step"].squeeze(), VECTORS[f"{name}/p_alpha_weight"], rtol=1e-5)
        np.testing.assert_allclose(dp["step"].squeeze(), VECTORS[f"{name}/d_alpha_weight"], rtol=1e-4, atol=1e-6)
    wrong = entries = 0
    for ours, theirs in ((y, VECTORS[f"{name}/y"]), (dx, VECTORS[f"{name}/dx"])):
        close = np.isclose(turn(ours), theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
        wrong, entries = wrong + int((~close).sum()), entries + close.size
    return wrong, entries


def test_all_cases_agree_up_to_counted_flips_at_rounding_boundaries():
    counted = {name: compare(name) for name in CASES}
    wrong, entries = (sum(pair[i] for pair in counted.values()) for i in (0, 1))
    assert entries == len(CASES) * 2 * 4 * 256
    assert wrong <= entries / 10_000, {name: pair for name, pair in counted.items() if pair[0]}


def levels(text, x=None, role="activation"):
    x = jax.random.normal(jax.random.key(0), (1, 4096)) if x is None else x
    return np.unique(np.asarray(quantizer(text, role).apply(x)).round(5))


def test_ternary_has_three_levels_where_the_published_formula_gives_four():
    x = jax.random.normal(jax.random.key(0), (1, 4096))
    ours = levels("quest:bits=1.58,block=0", x)
    rms = float(jnp.sqrt(jnp.mean(x**2)))
    np.testing.assert_allclose(ours, [-1.2240 * rms, 0, 1.2240 * rms], rtol=1e-4, atol=1e-6)
    n = 2**1.585  # as published: round(x / step + 1/2) - 1/2 with step = 2 alpha / (n - 1)
    step = 2 * 1.224008952 / (n - 1)
    published = np.unique(np.round(np.clip(np.asarray(x), -1.224, 1.224) / step + 0.5) - 0.5)
    assert len(published) == 4


def test_one_bit_lsq_and_pact_are_finite_and_pass_gradients_where_the_published_classes_do_not():
    x = jax.random.normal(jax.random.key(0), (4, 64))
    for text in ("lsq:bits=1", "pact:bits=2,range=symmetric", "pact:bits=4"):
        q = quantizer(text, "activation")
        p = q.init(x)
        dx, dp = jax.grad(lambda x, p, q=q: jnp.sum(q.apply(x, p)), argnums=(0, 1))(x, p)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dx, dp)))
        assert np.mean(np.asarray(dx) != 0) > 0.3  # the published PACT passes to no entry at all


def test_the_fp4_trust_radius_is_the_widest_half_gap_and_the_published_one_by_option():
    x = jax.random.normal(jax.random.key(1), (4, 65536))
    masked = {}
    for clips in ("optimal", "published"):
        q = quantizer(f"quest:levels=fp4,block=0,clips={clips}", "activation")
        dx = jax.grad(lambda x, q=q: jnp.sum(q.apply(x)))(x)
        masked[clips] = float(np.mean(np.asarray(dx) == 0))
    edge = (6 + 1) * gaussian.FP4_UNIT  # top level and one half gap
    assert masked["optimal"] == pytest.approx(math.erfc(edge / math.sqrt(2)), rel=0.15)
    assert masked["optimal"] == pytest.approx(6.5e-4, rel=0.2)
    assert masked["published"] == pytest.approx(0.015, rel=0.1)


def test_uniform_grids_mask_the_share_that_the_closed_form_says():
    x = jax.random.normal(jax.random.key(2), (4, 65536))
    for bits, share in ((1, 0.1105), (2, 0.0464), (3, 0.0191), (4, 0.0073)):
        q = quantizer(f"quest:bits={bits},block=0,surrogate=trust", "activation")
        dx = np.asarray(jax.grad(lambda x, q=q: jnp.sum(q.apply(x)))(x))
        assert np.mean(dx == 0) == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(("block", "outer"), [(128, 1.30), (0, 1.25)])
def test_one_bit_clips_at_its_outer_clip_with_and_without_rotation(block, outer):
    x = jax.random.normal(jax.random.key(3), (64, 128))
    rotation = Hadamard(block) if block else IDENTITY
    q = quantizer(f"quest:bits=1,block={block}", "activation")
    _, pull = jax.vjp(q.apply, x)
    (dx,) = pull(rotation.inverse(jnp.ones_like(x), -1))  # ones in the basis of the mask
    mask, rotated = np.asarray(rotation.forward(dx, -1)), np.asarray(rotation.forward(x, -1))
    rms = np.sqrt(np.mean(rotated**2, -1, keepdims=True))
    np.testing.assert_allclose(mask, np.abs(rotated) <= outer * 0.7978845608 * rms, atol=1e-5)


def test_rotating_back_and_staying_rotated_give_the_same_product_and_gradients():
    x, w = jax.random.normal(jax.random.key(0), (8, 256)), 0.1 * jax.random.normal(jax.random.key(1), (256, 16))

    def product(rotate):
        a, b = quantizer(f"quest:rotate={rotate}", "activation"), quantizer(f"quest:rotate={rotate}", "weight")
        return lambda x, w: a.apply(x) @ b.apply(w)

    for f in (lambda h: h(x, w), lambda h: jax.grad(lambda *z: jnp.sum(h(*z) ** 2), argnums=(0, 1))(x, w)):
        back, stay = f(product("back")), f(product("stay"))
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(stay), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(a).max()))


def test_a_lone_rotated_weight_rotates_back_where_the_published_layer_stays():
    w = jax.random.normal(jax.random.key(1), (128, 16))
    auto, stay = (quantizer(f"quest:bits=8,rotate={r}").apply(w) for r in ("auto", "stay"))
    assert float(jnp.mean((auto - w) ** 2)) < 2e-4
    assert float(jnp.mean((stay - w) ** 2)) > 0.5  # another basis


def test_pair_sparsity_zeroes_half_and_keeps_the_pairs_of_largest_norm():
    x = jnp.asarray([[3.0, 0.1, 0.2, 0.2, -1.0, 1.0, 0.0, 0.5]])
    y = quantizer("quest:sparsity=4:8,block=0", "activation").apply(x)
    np.testing.assert_array_equal(y[0] == 0, [False, False, True, True, False, False, True, True])
    assert quantizer("quest:sparsity=4:8,block=0").bits((128, 64)).code == 2.5
    z = jax.random.normal(jax.random.key(0), (4, 65536))
    q = quantizer("quest:sparsity=4:8,block=0", "activation")
    y, dx = np.asarray(q.apply(z)), np.asarray(jax.grad(lambda z: jnp.sum(q.apply(z)))(z))
    assert np.mean(y == 0) == 0.5
    assert np.mean((y - z) ** 2) == pytest.approx(0.215, rel=0.02)
    assert np.mean(dx == 0) == pytest.approx(0.41, abs=0.01)

"""Bop, latent clipping and frozen scales, by numbers worked out on paper; and in a step on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fbi import optim
from fbi.errors import InputError
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.optim.bop import bop, clip_latents
from fbi.optim.groups import is_latent, is_scale, mask
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.checkpoint import Checkpoints
from fbi.train.compose import check
from fbi.train.run import Run
from fbi.train.step import abstract_state, init_state, make_step

SHAPE = ModelConfig(vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ff=64, context=32)
CONFIG = optim.OptimizerConfig(warmup=0.0)


def latent(values):
    return {"layers_0_1": {"mlp": {"up": {"w": jnp.asarray(values)}}}}


def test_bop_flips_where_the_mean_gradient_has_the_sign_of_the_weight_and_is_large_enough():
    tx = bop(0.5, 0.3)
    w = {"w": jnp.array([0.7, -0.7, 0.7, 0.7, -0.2, 0.0])}
    g = {"w": jnp.array([1.0, 1.0, 0.5, -1.0, -4.0, 1.0])}
    updates, state = tx.update(g, tx.init(w), w)
    # m = g / 2: 0.5 flips, the sign differs, 0.25 is not above 0.3, the sign differs, -2 flips, zero stays zero
    np.testing.assert_allclose(state.mean["w"], [0.5, 0.5, 0.25, -0.5, -2.0, 0.5])
    w = optax.apply_updates(w, updates)
    np.testing.assert_allclose(w["w"], [-0.7, -0.7, 0.7, 0.7, 0.2, 0.0])
    updates, state = tx.update({"w": jnp.array([0.0, 0.0, 0.5, 0.0, 8.0, 0.0])}, state, w)
    # m = m / 2 + g / 2: 0.25, 0.25, 0.375 (flips), -0.25, 3 (flips back), 0.25
    np.testing.assert_allclose(state.mean["w"], [0.25, 0.25, 0.375, -0.25, 3.0, 0.25])
    np.testing.assert_allclose(optax.apply_updates(w, updates)["w"], [-0.7, -0.7, -0.7, 0.7, -0.2, 0.0])


def test_a_mean_at_the_threshold_does_not_flip():
    tx, w = bop(1.0, 0.5), {"w": jnp.array([1.0, 1.0])}
    updates, _ = tx.update({"w": jnp.array([0.5, 0.5001])}, tx.init(w), w)
    np.testing.assert_array_equal(updates["w"], [0.0, -2.0])


def test_latents_are_clipped_after_the_update_and_nothing_else_is():
    params = latent([0.5, -0.5, 0.9, 1.5]) | {"embed": jnp.array([0.9])}
    updates = latent([0.25, -1.0, 0.25, 0.0]) | {"embed": jnp.array([0.25])}
    tx = clip_latents(1.0)
    after = optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])
    np.testing.assert_allclose(after["layers_0_1"]["mlp"]["up"]["w"], [0.75, -1.0, 1.0, 1.0])
    np.testing.assert_allclose(after["embed"], [1.15])


def test_paths_tell_a_scale_from_the_weight_of_the_site_q():
    params = {
        "embed": 0,
        "head": {"w": 1, "q": {"alpha": 2}},
        "layers_0_2": {
            "attn": {"q": {"w": 3, "q": {"alpha": 4, "beta": 5}, "a": {"step": 6}, "norm": {"scale": 7}}},
            "mlp": {"up": {"w": 8, "r": {"g": 9}}},
            "mlp_norm": {"scale": 10},
        },
    }
    chosen = lambda kind: [n for n, m in zip(jax.tree.leaves(params), jax.tree.leaves(mask(kind)(params)), strict=True) if m]  # fmt: skip  # noqa: E501
    assert sorted(chosen(is_scale)) == [2, 4, 5, 6, 9]
    assert sorted(chosen(is_latent)) == [3, 8]


@pytest.mark.parametrize("decay", ["latent", "everything"])
def test_frozen_scales_stay_and_leave_the_norm_of_the_gradient_to_the_others(decay):
    config = dataclasses.replace(CONFIG, freeze="scales", decay=decay, lr=1.0)
    site = {"w": jnp.array([1.0, 1.0]), "q": {"alpha": jnp.array([2.0])}}
    params = {"layers_0_1": {"mlp": {"up": site}}}
    gradients = {"layers_0_1": {"mlp": {"up": {"w": jnp.array([0.6, 0.8]), "q": {"alpha": jnp.array([99.0])}}}}}
    tx = optim.build(config, 10)
    updates, state = tx.update(gradients, tx.init(params), params)
    moved = updates["layers_0_1"]["mlp"]["up"]
    assert float(moved["q"]["alpha"][0]) == 0.0
    # Adam's first step is sign(g); decay adds 0.1 w; times -lr
    np.testing.assert_allclose(moved["w"], [-1.1, -1.1], rtol=1e-5)
    mean = state[2].mu["layers_0_1"]["mlp"]["up"]["w"]
    np.testing.assert_allclose(mean, [0.06, 0.08], rtol=1e-5)  # (1 - b1) g, of norm 1: nothing was clipped


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("bop_gamma", 0.0, "optimizer.bop_gamma=0.0 is out of range; it must be above 0"),
        ("bop_gamma", 1.5, "optimizer.bop_gamma=1.5 is out of range; it must be at least 0 and at most 1"),
        ("bop_threshold", -1e-9, "optimizer.bop_threshold=-1e-09 is out of range; it must be at least 0"),
        ("latent_clip", -1.0, "optimizer.latent_clip=-1.0 is out of range; it must be at least 0"),
    ],
)
def test_values_out_of_range_are_refused(field, value, says):
    with pytest.raises(InputError) as error:
        optim.build(dataclasses.replace(CONFIG, **{field: value}), 10)
    assert str(error.value) == says


def test_bop_is_refused_where_a_matrix_of_a_block_keeps_full_precision():
    bops = dataclasses.replace(CONFIG, latent="bop")
    run = Run(policy="layers.0.mlp.*: w=none | layers.*: w=fbi", optimizer=bops)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.gate has no quantized weight; give every matrix"):
        check(run)
    check(dataclasses.replace(run, policy="fbi"))


def stepped(mesh_text, tmp_path=None, dtype="float32", **optimizer):
    """Parameters before and after one step; through a checkpoint where a folder is given."""
    model = Model(dataclasses.replace(SHAPE, dtype=dtype), Policy.parse("fbi"))
    tx = optim.build(dataclasses.replace(CONFIG, **optimizer), 10)
    mesh = meshes.make(meshes.parse(mesh_text, jax.device_count()))
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
    with jax.set_mesh(mesh):
        state = init_state(model, tx, jax.random.key(0))
        before = jax.device_get(state["params"])
        step = make_step(model, Loss.parse("ce"), tx)
        state, _ = step(state, None, meshes.put_batch(tokens, mesh), jnp.float32(0))
        abstract = abstract_state(model, tx)
        like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)
        assert like(abstract) == like(state)
        if tmp_path:
            checkpoints = Checkpoints(tmp_path / "checkpoints")
            checkpoints.save(1, state, {})
            checkpoints.close()
            _, restored, _ = Checkpoints(tmp_path / "checkpoints").restore(abstract, print)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
            state = restored
        return before, jax.device_get(state["params"])


@pytest.mark.slow
def test_a_step_of_bop_flips_signs_alone_and_is_the_same_on_every_mesh(x64):
    options = {"dtype": "float64", "latent": "bop", "bop_gamma": 1.0, "bop_threshold": 1e-6, "lr": 1e-3}
    before, after = stepped("data=1", **options)
    flipped = 0
    for name in ("attn", "mlp"):
        for site, leaves in after["layers_0_2"][name].items():
            old = before["layers_0_2"][name][site]
            np.testing.assert_array_equal(np.abs(leaves["w"]), np.abs(old["w"]))
            flipped += np.sum(leaves["w"] != old["w"])
            assert np.all(leaves["q"]["alpha"] != old["q"]["alpha"])  # AdamW's
    assert 0 < flipped < 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert np.any(before["embed"] != after["embed"])
    _, elsewhere = stepped("data=2,model=2", **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), after, elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"latent": "bop"}, {"latent_clip": 0.01, "freeze": "scales"}], ids=str)
def test_a_sharded_state_goes_through_a_checkpoint(options, tmp_path):
    before, after = stepped("data=2,model=2", tmp_path, **options)
    assert max(np.abs(leaves["w"]).max() for leaves in before["layers_0_2"]["mlp"].values()) > 0.05
    if "freeze" in options:
        for leaves in after["layers_0_2"]["mlp"].values():
            assert np.abs(leaves["w"]).max() == pytest.approx(0.01)
        for site, leaves in after["layers_0_2"]["attn"].items():
            jax.tree.map(np.testing.assert_array_equal, leaves["q"], before["layers_0_2"]["attn"][site]["q"])

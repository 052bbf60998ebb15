"""What a batch shows: alignment of the gradient and statistics of the activations, against direct computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.analysis import Diagnostics, Ratio, without_activations
from fbi.analysis.batch import activations, alignment, on_part
from fbi.analysis.gradients import cosine, gradient_alignment, restacked
from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.model.axes import mesh_1x1
from fbi.model.convert import adapt
from fbi.policy import Policy
from fbi.train.step import documents_of, make_objective

SHAPE = ModelConfig(vocab=64, dim=32, layers=3, heads=4, kv_heads=2, head_dim=8, ff=64, context=32)
MIXED = "layers.0.*: w=fbi;a=absmax:bits=2 | layers.*: w=fbi"
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)


def mean_loss(model, params):
    return make_objective(Loss.parse("ce"))(model, params, None, jnp.asarray(TOKENS), jnp.float32(1))[0]


def test_a_cosine_by_hand():
    a, b = jnp.array([[3.0, 4.0]]), jnp.array([[4.0, 3.0]])
    assert float(cosine(a, b).value) == pytest.approx(24 / 25)
    assert float(cosine(a, -2 * a).value) == pytest.approx(-1.0)


def test_a_policy_without_its_activations():
    policy = Policy.parse("layers.*.attn.kv: a=absmax | layers.*.attn.*: w=fbi;a=absmax:bits=4 | head: w=fbi")
    expected = "layers.*.attn.kv: w=none | layers.*.attn.*: w=fbi | head: w=fbi"
    assert without_activations(policy) == Policy.parse(expected)
    assert str(without_activations(policy)) == expected


def test_alignment_is_the_cosine_to_the_gradient_without_activation_methods_across_stacks():
    model, plain = (Model(SHAPE, Policy.parse(policy)) for policy in (MIXED, "layers.*: w=fbi"))
    with jax.set_mesh(mesh_1x1()):
        params = model.init(0)
        assert set(params) - set(plain.init(0)) == {"layers_0_1", "layers_1_3"}
        jax.tree.map(np.testing.assert_array_equal, restacked(params, model, plain), adapt(params, model, plain))
        found = jax.device_get(jax.jit(lambda p: gradient_alignment(model, p, mean_loss))(params))
        ours = jax.device_get(jax.jit(jax.grad(lambda p: mean_loss(model, p)))(params))
        theirs = jax.device_get(jax.jit(jax.grad(lambda p: mean_loss(plain, p)))(adapt(params, model, plain)))
    assert len(found) == 3 * 7
    for layer in range(3):
        a = ours["layers_0_1" if layer == 0 else "layers_1_3"]["mlp"]["up"]["w"][max(layer - 1, 0)].ravel()
        b = theirs["layers_0_3"]["mlp"]["up"]["w"][layer].ravel()
        expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        ratio = found[f"layers.{layer}.mlp.up"]
        assert ratio.total / ratio.over == pytest.approx(expected, rel=1e-4)
        assert 0.1 < expected < 0.999


def test_without_activation_methods_every_gradient_is_aligned():
    model = Model(SHAPE, Policy.parse("fbi"))
    with jax.set_mesh(mesh_1x1()):
        found = jax.device_get(jax.jit(lambda p: gradient_alignment(model, p, mean_loss))(model.init(0)))
    for ratio in found.values():
        assert ratio.total / ratio.over == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_rows_of_all_diagnostics_on_a_mesh(mesh):
    config = dataclasses.replace(SHAPE, layers=2)
    model = Model(config, Policy.parse("bitnet-b158"))
    documents = lambda inputs: documents_of(inputs, 3)
    batch = {
        "activations": on_part(activations(model, documents), 2),
        "alignment": on_part(alignment(model, make_objective(Loss.parse("ce"), separator=3)), 2),
    }
    diagnostics = Diagnostics(model, "flips, entropy,margin,error,masked,activations,alignment", batch)
    with jax.set_mesh(jax.make_mesh(mesh, ("data", "model"), devices=jax.devices()[: mesh[0] * mesh[1]])):
        params = model.init(0)
        tokens = jax.device_put(TOKENS, jax.P("data", None))
        inputs = jax.device_put(TOKENS[::2, :-1], jax.P("data", None))  # the first of the two parts
        inside = jax.jit(lambda p, x: model.features(p, x, documents(x), wanted=["mlp.down"])[1])(params, inputs)
        held = diagnostics.before(params, None, tokens, jnp.float32(0))
        flipped = jax.tree_util.tree_map_with_path(
            lambda path, x: -x if path[-1].key == "w" and path[-2].key == "down" else x, params
        )
        rows = diagnostics.rows(diagnostics.after(held, flipped, jnp.float32(0)), 5)
    by_site = {row["site"]: row for row in rows}
    assert len(rows) == len(by_site) == 2 * 7 + 2
    weights = {"flips", "entropy", "margin", "near", "error", "masked"}
    outliers = {"kurtosis", "peak", "top_energy", "rms"}
    assert set(by_site["head"]) == {"kind", "step", "site"} | outliers
    for name in ("layers.0.attn.q", "layers.1.mlp.down", "all"):
        assert set(by_site[name]) == {"kind", "step", "site", "alignment"} | weights | outliers
    zeros = 1 - 2 * (1 - 0.655)  # P(|x| < s / 2) of a Gaussian with s = mean|x|: codes that a sign does not change
    assert by_site["layers.0.mlp.down"]["flips"] == pytest.approx(1 - zeros, abs=0.03)
    assert by_site["layers.0.mlp.up"]["flips"] == 0
    changed = 2 * 64 * 32 * (by_site["layers.0.mlp.down"]["flips"] + by_site["layers.1.mlp.down"]["flips"]) / 2
    assert by_site["all"]["flips"] == pytest.approx(changed / (2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)))
    assert by_site["layers.1.attn.o"]["entropy"] == pytest.approx(1.583, abs=0.01)  # of a Gaussian
    assert by_site["layers.1.attn.o"]["margin"] == pytest.approx(2.0, rel=1e-5)
    x = np.asarray(inside["mlp.down"][1], np.float64)
    expected = np.mean((x - x.mean()) ** 4) / x.var() ** 2
    assert by_site["layers.1.mlp.down"]["kurtosis"] == pytest.approx(expected, rel=1e-3)
    assert by_site["layers.1.mlp.down"]["rms"] == pytest.approx(np.sqrt(np.mean(x**2)), rel=1e-4)
    assert 0.9 < by_site["all"]["alignment"] < 1


def test_a_quotient_that_is_none_is_none():
    model = Model(dataclasses.replace(SHAPE, layers=1), Policy.parse("layers.0.mlp.up: w=fbi"))
    nothing = lambda *batch: {"layers.0.mlp.up": {"x": Ratio(jnp.float32(0), jnp.float32(0))}}
    diagnostics = Diagnostics(model, "alignment", {"alignment": nothing})
    with jax.set_mesh(mesh_1x1()):
        params = model.init(0)
        held = diagnostics.before(params, None, jnp.asarray(TOKENS), jnp.float32(0))
        rows = diagnostics.rows(diagnostics.after(held, params, jnp.float32(0)), 1)
    assert [(row["site"], row["x"]) for row in rows] == [("layers.0.mlp.up", None), ("all", None)]

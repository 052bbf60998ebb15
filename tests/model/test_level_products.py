"""Products formed from levels: those of the values, really formed in the narrow type, or plainly not."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.loss import Loss
from fbi.model import Model, ModelConfig
from fbi.model.axes import Axes, mesh_1x1
from fbi.model.codes import FORMS, Seen
from fbi.model.dense import Product
from fbi.policy import Policy
from fbi.quant import Ctx
from fbi.train import mesh as meshes
from fbi.train.step import make_objective, on_mesh

SHAPE = ModelConfig(vocab=64, dim=32, layers=2, heads=4, kv_heads=4, head_dim=8, ff=64, context=32, dtype="float64")
B158 = "layers.*: w=bitnet-b158;a=absmax:bits=8"
QUEST = "layers.*: w=quest:bits=4,block=8;a=quest:bits=4,block=8"
ONE, FOUR = {"data": 1, "model": 1}, {"data": 2, "model": 2}
SPLIT = {"data": 1, "model": 4, "sequence": True}
WIDE = {"integers": "int32", "float8": "float32"}


def methods_of(text):
    """The quantizers of weight and activation that a policy's rule gives a layer."""
    return Policy.parse(f"layers.*: {text}").at("layers.0.mlp.up", 2).build()


def narrow_products(text):
    """How many products of a program have sums of these types, which the model itself asks for nowhere (float64)."""
    return collections.Counter(re.findall(r"preferred_element_type=(int32|float32)", text))


def losses(config, policy, product, sizes):
    """Loss and gradients of a step, and the program that is traced for them."""
    with jax.set_mesh(mesh := meshes.make(sizes)):
        axes = Axes(product=product, sequence="model" if "sequence" in sizes else None)
        model = Model(config, Policy.parse(policy), axes=axes)
        rng = np.random.default_rng(0)
        draw = lambda leaf: jax.device_put(0.3 * rng.uniform(0.5, 1.5, leaf.shape), leaf.sharding)
        params = jax.tree.map(draw, on_mesh(model.abstract()))
        params = jax.tree.map(lambda leaf: leaf * jnp.where(jnp.sin(1e3 * leaf) > 0, 1, -1), params)
        tokens = meshes.put_batch(rng.integers(0, 64, (4, 17)).astype(np.int32), mesh)
        objective = make_objective(Loss.parse("ce"))
        step = jax.jit(jax.value_and_grad(lambda params: objective(model, params, None, tokens, jnp.asarray(0.5))[0]))
        return *step(params), step.trace(params).jaxpr.pretty_print()


@pytest.mark.parametrize(
    ("policy", "product", "changes", "sizes"),
    [
        pytest.param(B158, "integers", {}, ONE, id="b158"),
        pytest.param(B158, "integers", {"norm": "inner"}, FOUR, id="b158-mesh"),
        pytest.param(QUEST, "integers", {}, FOUR, id="quest-mesh"),
        pytest.param(QUEST, "float8", {}, ONE, id="quest-float8"),
        pytest.param(B158, "integers", {}, SPLIT, id="b158-split-by-position"),
        pytest.param("layers.*: w=bitnet-b158;a=lsq:bits=4", "integers", {}, ONE, id="learned-step"),
    ],
)
def test_loss_and_gradients_are_those_of_the_values_in_float64(policy, product, changes, sizes, x64):
    config = dataclasses.replace(SHAPE, **changes)
    one, slopes, plain = losses(config, policy, "values", sizes)
    other, gradients, text = losses(config, policy, product, sizes)
    assert not narrow_products(plain)
    assert narrow_products(text) == {WIDE[product]: 7}  # of the block that is scanned; not those of its gradients
    assert abs(float(one) - float(other)) < 1e-12
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(gradients), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("policy", "product"),
    [
        pytest.param("fbi", "integers", id="activations without a grid"),
        pytest.param("layers.*: w=fbi:shift=false;a=absmax:bits=8", "integers", id="a scale for each input"),
        pytest.param("layers.*: w=quest:bits=8,block=8;a=quest:bits=8,block=8", "integers", id="halves of eight bits"),
        pytest.param(B158, "float8", id="eight bits in float8"),
    ],
)
def test_what_does_not_fit_is_formed_from_values(policy, product, x64):
    one, _, _ = losses(SHAPE, policy, "values", ONE)
    other, _, text = losses(SHAPE, policy, product, ONE)
    assert not narrow_products(text)
    assert float(one) == float(other)


def test_sums_that_the_wide_type_would_not_hold_are_those_of_values():
    text = "absmax:bits=8"
    x, w = np.ones((1, 1, 2**18), np.float32), np.ones((2**18, 1), np.float32)
    weight, activation = methods_of(f"w={text};a={text}")
    product, spec = Product(jnp.asarray(x), jnp.asarray(w), jnp.asarray(w)), jax.P(None, None)
    for width, fits in ((2**10, True), (2**18, False)):
        seen = (Seen(activation, x[..., :width], {}, Ctx()), Seen(weight, w[:width], {}, Ctx()))
        with jax.set_mesh(mesh_1x1()):
            placed = [s._replace(x=jax.device_put(s.x, jax.P(*[None] * s.x.ndim))) for s in seen]
            own = product._replace(x=placed[0].x, w=placed[1].x, full=placed[1].x)
            assert (FORMS["integers"](own, *placed, spec) is not own) == fits

"""Rotations against the matrix itself, in every form that a platform may take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.quant import transform
from fbi.quant.transform import Hadamard, sylvester
from fbi.train import mesh as meshes

FORMS = ["_multiplied", "_summed"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "axis"), [((3, 16), 1), ((64, 5), 0), ((2, 3, 128), 2), ((2, 32, 3), 1), ((2, 512), 1)]
)
def test_every_form_is_the_product_with_the_matrix_and_its_own_inverse(form, shape, axis, x64):
    x = np.random.default_rng(0).standard_normal(shape)
    rotate = lambda x: getattr(transform, form)(x, axis=axis)
    expected = np.moveaxis(np.tensordot(x, sylvester(shape[axis]), (axis, 0)), -1, axis)
    np.testing.assert_allclose(rotate(jnp.asarray(x)), expected, atol=1e-12)
    np.testing.assert_allclose(rotate(rotate(jnp.asarray(x))), x, atol=1e-12)
    y = np.random.default_rng(1).standard_normal(shape)
    gradient = jax.grad(lambda x: jnp.vdot(rotate(x), y))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, rotate(jnp.asarray(y)), atol=1e-12)  # the matrix is symmetric


@pytest.mark.parametrize(("shape", "axis", "block"), [((4, 8, 256), -1, 128), ((256, 6), 0, 32), ((2, 256), 1, -1)])
def test_blocks_are_rotated_apart_under_compilation_and_remat(shape, axis, block, x64):
    rotation, axis = Hadamard(block), axis % len(shape)
    x = jnp.asarray(np.random.default_rng(2).standard_normal(shape))
    width = rotation.width(shape[axis])
    parts = np.split(np.asarray(x), shape[axis] // width, axis)
    expected = np.concatenate(
        [np.moveaxis(np.tensordot(p, sylvester(width), (axis, 0)), -1, axis) for p in parts], axis
    )
    np.testing.assert_allclose(jax.jit(lambda x: rotation.forward(x, axis))(x), expected, atol=1e-12)
    again = jax.checkpoint(lambda x: rotation.inverse(jnp.sin(rotation.forward(x, axis)), axis))
    plain = lambda x: rotation.inverse(jnp.sin(rotation.forward(x, axis)), axis)
    slopes = [jax.jit(jax.grad(lambda x, f=f: jnp.sum(f(x) ** 3)))(x) for f in (again, plain)]
    np.testing.assert_allclose(*slopes, atol=1e-12)


def test_a_split_tensor_is_rotated_where_it_lies(x64):
    x = np.random.default_rng(3).standard_normal((4, 6, 256))
    with jax.set_mesh(meshes.make(meshes.parse("data=2,model=2", 8))):
        for spec in (jax.P("data", None, "model"), jax.P("data", None, None)):
            split = jax.device_put(x, spec)
            rotated = jax.jit(lambda x: Hadamard(128).forward(x, -1))(split)
            assert rotated.sharding.spec == spec
            np.testing.assert_allclose(
                rotated, transform._multiplied(jnp.asarray(x.reshape(4, 6, 2, 128)), 3).reshape(x.shape), atol=1e-12
            )


def test_other_platforms_get_one_product():
    """The program of a TPU, lowered here, and the one that this CPU runs."""
    rotate, x = jax.jit(lambda x: Hadamard(128).forward(x, -1)), jnp.ones((4, 256))
    products = [
        line
        for line in rotate.trace(x).lower(lowering_platforms=("tpu",)).as_text().splitlines()
        if "stablehlo.dot_general" in line
    ]
    assert len(products) == 1
    assert "tensor<128x128xf32>" in products[0]
    compiled = rotate.lower(x).compile().as_text()
    assert "128,128" not in compiled
    assert "32,32" in compiled

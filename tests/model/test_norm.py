"""RMSNorm: its written gradient is autodiff's, on every mesh; it keeps x and no wide copy of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.model.norm import rms_norm
from fbi.train import mesh as meshes

EPS = 1e-5


def published(x, scale):
    """Zhang & Sennrich, eq. 4, as it stands there."""
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale[None, None]


@pytest.mark.parametrize("axes", [(None, None), ("model", None), (None, "model")])
def test_value_and_gradients_are_those_of_the_formula_in_float64(axes, x64):
    layout = jax.P("data", *axes)
    rng = np.random.default_rng(0)
    x, weigh = rng.standard_normal((2, 4, 8, 16))
    scale = rng.standard_normal(16)
    x[0, 0] = 0.0
    wanted = jax.value_and_grad(lambda x, scale: jnp.sum(weigh * published(x, scale)), (0, 1))(x, scale)
    with jax.set_mesh(meshes.make({"data": 2, "model": 4})):
        across = jax.device_put(x, layout)
        step = jax.jit(jax.value_and_grad(lambda x, scale: jnp.sum(weigh * rms_norm(x, scale, EPS)), (0, 1)))
        found = step(across, jax.device_put(scale, jax.P(None)))
        assert found[1][0].sharding.spec == layout
        assert found[1][1].sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, wanted)


def test_the_backward_pass_keeps_x_in_its_own_type_and_a_number_a_row():
    x, scale = jnp.ones((4, 8, 256), jnp.bfloat16), jnp.ones(256)
    kept = jax.tree.leaves(jax.vjp(lambda x, scale: rms_norm(x, scale, EPS), x, scale)[1])
    assert sum(leaf.nbytes for leaf in kept) == x.nbytes + scale.nbytes + 4 * 8 * 4

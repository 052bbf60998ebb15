import dataclasses

import jax
import numpy as np
import pytest

from fbi.model import Model, ModelConfig
from fbi.model.axes import mesh_in_use
from fbi.model.convert_layout import leaves, on

TINY = ModelConfig(vocab=64, dim=32, layers=3, heads=4, kv_heads=4, head_dim=8, ff=48, context=64)


@pytest.fixture
def tiny():
    """A model config of a few thousand parameters, with changes: `tiny(kv_heads=2)`."""
    return lambda **changes: dataclasses.replace(TINY, **changes)


@pytest.fixture(scope="session")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 16), 0, TINY.vocab)


@pytest.fixture
def drawn():
    """Random parameters of a model: no norm is one, no two layers are alike, no learned scale is where it starts.

    Nothing is compiled, unlike in `Model.init`.
    """

    def draw(model: Model, seed: int = 0):
        rng, abstract = np.random.default_rng(seed), model.abstract()
        values = []
        for path, leaf in leaves(abstract):
            noise = rng.standard_normal(leaf.shape, np.float32)
            value = np.exp(0.3 * noise) if path.endswith(".scale") else 0.2 * noise
            value = np.abs(value) if path.endswith(".alpha") else value
            values.append(jax.device_put(value, on(mesh_in_use(), leaf)))
        return jax.tree.unflatten(jax.tree.structure(abstract), values)

    return draw


@pytest.fixture
def equal():
    """Asserts that two trees have the same structure, types and bits."""

    def check(a, b):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)

    return check

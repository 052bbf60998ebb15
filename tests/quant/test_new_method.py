"""The recipe of CONTRIBUTING.md adds a method in under fifteen lines, and everything takes it as it is."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fbi
from fbi.quant import REGISTRY, catalogue, decode
from fbi.quant.registry import _built

GUIDE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


@pytest.fixture
def mine():
    """The guide's method, registered for one test."""
    recipe = GUIDE.partition("## Add a quantization method")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", recipe, re.DOTALL)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) < 15
    exec(compile(code, "CONTRIBUTING.md", "exec"), {})
    yield "mine"
    del REGISTRY["mine"]
    _built.cache_clear()


def test_the_guides_method_works_as_text_codes_bits_gradients_and_in_a_model(mine):
    x = jax.random.normal(jax.random.key(0), (64, 8))
    q = fbi.quantizer("mine:width=1.0")
    rms = np.sqrt(np.mean(np.asarray(x) ** 2, 0, keepdims=True))
    np.testing.assert_allclose(q.apply(x), rms * np.clip(np.round(np.asarray(x) / rms), -1, 1), rtol=1e-5)
    assert np.asarray(jax.jit(decode)(jax.jit(q.encode)(x))).tobytes() == np.asarray(jax.jit(q.apply)(x)).tobytes()
    assert q.bits((64, 8)).stored == -(-64 * 8 // 5) + 4 * 8
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(q.apply(x)))(x), np.abs(x) <= rms, rtol=1e-5)

    model = fbi.model("nano", "layers.*.mlp.*: w=mine;a=mine:width=1.4")
    tokens = jnp.zeros((1, 8), jnp.int32)
    assert jnp.isfinite(model.apply(model.init(0), tokens)).all()
    assert "| `mine` | W+A | 1.58 |" in catalogue.markdown()
    with pytest.raises(ValueError, match="valid: width"):
        fbi.quantizer("mine:bits=2")


def test_the_page_of_methods_is_current():
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text() == catalogue.markdown(), "run `make methods-doc`"

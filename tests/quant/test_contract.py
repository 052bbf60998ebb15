"""What every method promises: exact codes, honest bits, its own dtype, one custom derivative in all."""

import re
from pathlib import Path

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import fbi.quant
from fbi.quant import REGISTRY, Method, decode, packed, quantizer, unpacked

# Every method, with options that change its path.
VARIANTS = {
    "none": ["none"],
    "fbi": ["fbi", "fbi:granularity=output", "fbi:granularity=tensor", "fbi:shift=false", "fbi:surrogate=clip"],
    "absmax": ["absmax:bits=2", "absmax:bits=3", "absmax:bits=6", "absmax", "absmax:rule=code"],
    "bitnet-b158": ["bitnet-b158", "bitnet-b158:rule=code"],
}
CASES = [(text, role) for name, texts in VARIANTS.items() for text in texts for role in REGISTRY[name].roles]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def test_every_registered_method_is_among_the_cases():
    assert set(VARIANTS) == set(REGISTRY)


def draw(shape, dtype, seed, kind):
    x = np.random.default_rng(seed).standard_normal(shape)
    x = {"normal": x, "heavy": x * np.exp(2 * x), "ties": np.round(x * 2) / 2, "zero": x * 0}[kind]
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(("text", "role"), CASES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.sampled_from([1, 3, 40]), st.sampled_from([2, 5, 64])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["normal", "heavy", "ties", "zero"]),
)
def test_decoding_the_codes_gives_the_applied_tensor_bit_for_bit(text, role, shape, dtype, seed, kind):
    with jax.enable_x64(dtype == "float64"):
        x = draw(shape, dtype, seed, kind)
        q = quantizer(text, role)
        qparams = jax.jit(q.init)(x)
        encoded = jax.jit(q.encode)(x, qparams)
        applied = jax.jit(q.apply)(x, qparams)
        assert applied.dtype == jnp.promote_types(dtype, "float32")
        assert applied.shape == x.shape
        assert np.asarray(jax.jit(decode)(encoded)).tobytes() == np.asarray(applied).tobytes()

        arrays = packed(encoded)
        assert sum(a.nbytes for a in arrays.values()) == q.bits(shape, dtype).stored
        restored = unpacked(arrays, encoded)
        assert np.asarray(jax.jit(decode)(restored)).tobytes() == np.asarray(applied).tobytes()


@pytest.mark.parametrize(("text", "role"), CASES)
def test_the_output_is_on_a_grid_of_the_declared_size(text, role):
    x = jax.random.normal(jax.random.key(0), (512, 3))
    x = x if role == "weight" else x.T
    q = quantizer(text, role)
    codes = q.encode(x, q.init(x)).codes
    report = q.bits(x.shape)
    if text != "none":
        assert len(np.unique(codes)) <= round(2**report.code)
        assert report.paper_per_weight >= report.code
    assert report.weights == x.size


@pytest.mark.parametrize(("text", "role"), CASES)
def test_the_gradient_has_the_shape_and_type_of_the_latent_tensor(text, role):
    for dtype in ("float32", "bfloat16"):
        x = jnp.linspace(-1, 1, 24).reshape(6, 4).astype(dtype)
        q = quantizer(text, role)
        grad = jax.grad(lambda x, q=q: jnp.sum(q.apply(x, q.init(x)) ** 2))(x)
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
        assert np.isfinite(np.asarray(grad, np.float32)).all()


def test_the_identity_surrogate_keeps_nothing_for_the_backward_pass_and_clip_keeps_a_mask():
    w = jax.random.normal(jax.random.key(0), (8, 8))
    for text, dtypes in (("bitnet-b158", set()), ("bitnet-b158:surrogate=clip", {"bool"})):
        q = quantizer(text)
        _, pull = jax.vjp(q.apply, w)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(pull) if leaf.shape == w.shape} == dtypes


def test_fbi_quant_defines_exactly_one_custom_derivative():
    source = "".join(p.read_text() for p in Path(fbi.quant.__file__).parent.glob("*.py"))
    assert len(re.findall(r"jax\.custom_(?:vjp|jvp)", source)) == 1
    assert "stop_gradient(q -" not in source


@pytest.mark.parametrize("text", [t for texts in VARIANTS.values() for t in texts])
def test_a_method_round_trips_through_text_and_data(text):
    method = Method.parse(text)
    assert str(method) == text
    assert Method.parse(str(method)) == Method.from_json(method.to_json()) == method


def test_paper_bits_of_fbi_count_sixteen_for_each_scale_and_shift():
    report = quantizer("fbi").bits((768, 768))
    assert report.paper_per_weight == 1 + 32 / 768
    assert report.stored == 768 * 768 // 8 + 2 * 4 * 768


def test_five_ternary_codes_take_a_byte():
    assert quantizer("bitnet-b158").bits((10, 7)).stored == 14 + 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fbbi", "did you mean 'fbi'"),
        ("fbi:granularity=column", "allowed: input|output|tensor"),
        ("fbi:groups=3", "valid: frozen, granularity, shift, surrogate"),
        ("absmax:bits=9", "allowed: 2 to 8"),
        ("absmax:bits=4.5", "allowed: int"),
        ("absmax:bits", "write absmax:bits=VALUE"),
        ("absmax:bits=4,bits=5", "given twice"),
    ],
)
def test_a_wrong_method_says_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantizer(text)


def test_a_method_in_the_wrong_role_lists_those_that_fit():
    with pytest.raises(ValueError, match="absmax, bitnet-b158, none"):
        quantizer("fbi", role="activation")
    with pytest.raises(ValueError, match="valid: activation, weight"):
        quantizer("fbi", role="output")

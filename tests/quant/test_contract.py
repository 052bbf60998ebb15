"""What every method promises: exact codes, honest bits, its own dtype, one custom derivative in all."""

import itertools
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
from fbi.quant.registry import variants

# Every registered method in every role with every value of its options: a new method is picked up by itself.
PAIRS = [(name, role) for name in REGISTRY for role in REGISTRY[name].roles]
WIDTH = 128  # of the contraction axis: a Hadamard block, a group


def quantizers(name, role):
    """(text, quantizer) of each variant of a method; those that are refused in combination are left out."""
    built = []
    for method in variants(name):
        try:
            built.append((str(method), method.build(role)))
        except ValueError:
            assert method != Method(name)
    return built


def some_quantizers(name, role):
    """Those variants that are not a bit-width between the lowest and the highest: they run the same code."""
    built = quantizers(name, role)
    middle = re.compile(r":bits=[3-7]$")
    return [(text, q) for text, q in built if not middle.search(text)]


def draw(shape, dtype, seed, kind):
    x = np.random.default_rng(seed).standard_normal(shape)
    x = {"normal": x, "heavy": x * np.exp(2 * x), "ties": np.round(x * 2) / 2, "zero": x * 0}[kind]
    return jnp.asarray(x, dtype)


def each(function, built, **options):
    """One compiled program that applies a function of (quantizer, *arguments) to all variants: one compilation."""
    return jax.jit(lambda rows: [function(q, *row) for (_, q), row in zip(built, rows, strict=True)], **options)


def there_and_back(encoded):
    """The packed bytes of each, and what comes of them."""
    dense = [packed(e) for e in encoded]
    return dense, [unpacked(parts, e) for parts, e in zip(dense, encoded, strict=True)]


# Fused and contracted as users have it (level 3 gives the same bits as 1, at nearly twice the compilation).
EXACT = {"compiler_options": {"xla_backend_optimization_level": 1}}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("name", "role"), PAIRS)
def test_decoding_the_codes_gives_the_applied_tensor_bit_for_bit(name, role):
    cases = [("normal", "float32"), ("heavy", "bfloat16"), ("ties", "float32"), ("zero", "float16")]
    shape, built = (WIDTH, 12) if role == "weight" else (12, WIDTH), quantizers(name, role)
    built = built + built[:1] * (len(cases) - 1)  # the method as it stands meets every case
    xs = [draw(shape, dtype, 1, kind) for kind, dtype in itertools.islice(itertools.cycle(cases), len(built))]
    qparams = each(lambda q, x: q.init(x), built, **EXACT)([(x,) for x in xs])
    rows = list(zip(xs, qparams, strict=True))
    encoded = each(lambda q, x, p: q.encode(x, p), built, **EXACT)(rows)
    applied = each(lambda q, x, p: q.apply(x, p), built, **EXACT)(rows)
    decoded = jax.jit(lambda es: [decode(e) for e in es], **EXACT)(encoded)
    dense, restored = jax.jit(there_and_back)(encoded)
    for (text, q), x, e, a, d, parts, r in zip(built, xs, encoded, applied, decoded, dense, restored, strict=True):
        assert (a.dtype, a.shape) == (jnp.promote_types(x.dtype, "float32"), x.shape), text
        assert np.asarray(d).tobytes() == np.asarray(a).tobytes(), text
        assert np.array_equal(r.codes, e.codes), text
        stored, around = q.bits(x.shape, x.dtype).stored, sum(np.prod(s) for s in q.around.shapes(x.shape))
        assert sum(part.nbytes for part in parts.values()) + 4 * around == stored, text
        if e.grid is not None:
            codes = np.asarray(e.codes)
            assert e.grid.low <= codes.min(), text
            assert codes.max() <= e.grid.high, text


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(("text", "role"), [("fbi", "weight"), ("absmax", "activation"), ("quest", "weight")])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.sampled_from([1, 3, 40]), st.sampled_from([2, 5, 64])),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64"]),
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["normal", "heavy", "ties", "zero"]),
)
def test_codes_are_exact_for_any_shape_and_type(text, role, shape, dtype, seed, kind):
    with jax.enable_x64(dtype == "float64"):
        x = draw(shape, dtype, seed, kind)
        q = quantizer(f"{text}:block=0" if text == "quest" else text, role)
        qparams = jax.jit(q.init)(x)
        encoded = jax.jit(q.encode)(x, qparams)
        applied = jax.jit(q.apply)(x, qparams)
        (dense,), (restored,) = jax.jit(there_and_back)([encoded])
        assert np.asarray(jax.jit(decode)(restored)).tobytes() == np.asarray(applied).tobytes()
        assert sum(part.nbytes for part in dense.values()) == q.bits(shape, dtype).stored


@pytest.mark.parametrize(("name", "role"), PAIRS)
def test_extreme_tensors_give_finite_values_and_gradients(name, role):
    shape = (WIDTH, 3) if role == "weight" else (3, WIDTH)
    base = np.random.default_rng(0).standard_normal(shape)
    kinds = [base * 0, base * 0 + 1, base * 0 - 2.5, base * 1e-20, base * 1e15, base * 1e-20 + (base > 2), base]
    xs = jnp.asarray(np.stack(kinds), jnp.float32)
    built = some_quantizers(name, role)

    def both(q, x):
        def total(x, p):
            y = q.apply(x, p)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))), y

        def one(x):
            p = q.init(x)
            (_, y), g = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, p)
            return y, p, g

        return jax.vmap(one)(x), [one(row.astype(jnp.bfloat16)) for row in x[-1:]]

    for (text, _), (stacked, narrow) in zip(built, each(both, built)([(xs,)] * len(built)), strict=True):
        for leaf in jax.tree.leaves(stacked):
            for kind, values in enumerate(np.asarray(leaf, np.float64)):
                assert np.isfinite(values).all(), (text, kind)
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(narrow)), text
        assert narrow[0][0].dtype == jnp.float32, text
        assert narrow[0][2][0].dtype == jnp.bfloat16, text


@pytest.mark.parametrize(("name", "role"), PAIRS)
def test_vmap_over_layers_equals_a_loop(name, role, x64):
    shape = (2, WIDTH, 6) if role == "weight" else (2, 6, WIDTH)
    xs = jnp.asarray(np.random.default_rng(0).standard_normal(shape))
    built = quantizers(name, role)[:1]

    def both(q, xs):
        def one(x):
            p = q.init(x)
            return q.apply(x, p), jax.grad(lambda x: jnp.sum(q.apply(x, p) ** 2))(x)

        return jax.vmap(one)(xs), [one(x) for x in xs]

    for (text, _), (stacked, looped) in zip(built, each(both, built)([(xs,)] * len(built)), strict=True):
        for layer, values in enumerate(looped):
            for a, b in zip(stacked, values, strict=True):
                np.testing.assert_allclose(a[layer], b, rtol=1e-9, atol=1e-12, err_msg=text)


def test_the_levels_of_a_grid_are_those_of_its_codes():
    grids = set()
    for name, role in PAIRS:
        x = jax.ShapeDtypeStruct((WIDTH, 8) if role == "weight" else (8, WIDTH), jnp.float32)
        for _, q in some_quantizers(name, role):
            jax.eval_shape(lambda x, q=q: grids.add(q.encode(x, q.init(x)).grid), x)
    grids.discard(None)
    assert {type(grid).__name__ for grid in grids} >= {"Binary", "Integers", "HalfIntegers", "Levels", "PairSparse"}
    for grid in grids:
        codes = jnp.arange(grid.low, grid.high + 1, dtype=jnp.float32)
        np.testing.assert_array_equal(np.asarray(grid.levels, np.float32), grid.level(codes), err_msg=str(grid))
        assert grid.reach == (min(grid.levels), max(grid.levels))


def test_a_group_of_one_element_keeps_its_magnitude():
    x = jnp.array([[-0.3], [0.7], [2.0]])
    for text in ("fbi:granularity=input,shift=false", "absmax", "xnor"):
        role = "weight" if text.startswith("fbi") else "activation"
        q = quantizer(text, role)
        np.testing.assert_allclose(q.apply(x, q.init(x)), x, rtol=1e-6, err_msg=text)


@pytest.mark.parametrize(
    ("text", "shape", "remedy"),
    [
        ("quest", (576, 4), "use block=64"),
        ("bitnet-v2:block=48", (96, 4), "use block=32"),
        ("dbllm:group=100", (576, 4), "use group=96"),
        ("bitnet-b1:groups=5", (8, 64), "use groups=4"),
        ("quest:sparsity=4:8,block=0", (12, 4), "multiple of 8"),
    ],
)
def test_a_shape_that_does_not_fit_names_the_remedy(text, shape, remedy):
    role = "activation" if text.startswith("bitnet-v2") else "weight"
    x = jnp.ones(shape if role == "weight" else shape[::-1])

    def used():
        q = quantizer(text, role)
        return q.apply(x, q.init(x))

    with pytest.raises(ValueError, match=remedy):
        used()


def test_the_identity_surrogate_keeps_nothing_for_the_backward_pass_and_clip_keeps_a_mask():
    w = jax.random.normal(jax.random.key(0), (8, 8))
    for text, dtypes in (("bitnet-b158", set()), ("bitnet-b158:surrogate=clip", {"bool"})):
        q = quantizer(text)
        _, pull = jax.vjp(q.apply, w)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(pull) if leaf.shape == w.shape} == dtypes


def test_fbi_quant_defines_exactly_one_custom_derivative():
    source = "".join(p.read_text() for p in Path(fbi.quant.__file__).parent.rglob("*.py"))
    assert len(re.findall(r"jax\.custom_(?:vjp|jvp)", source)) == 1
    assert "stop_gradient(q -" not in source


@pytest.mark.parametrize("name", REGISTRY)
def test_a_method_round_trips_through_text_and_data(name):
    for method in variants(name):
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
        ("absmax:bits=9", "allowed: 2|3|4|5|6|7|8"),
        ("absmax:bits=4.5", "allowed: 2|3|4|5|6|7|8"),
        ("absmax:bits", "write absmax:bits=VALUE"),
        ("absmax:bits=4,bits=5", "given twice"),
    ],
)
def test_a_wrong_method_says_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        quantizer(text)


def test_a_method_in_the_wrong_role_lists_those_that_fit():
    with pytest.raises(ValueError, match="absmax, adabin, bibert"):
        quantizer("fbi", role="activation")
    with pytest.raises(ValueError, match="valid: activation, weight"):
        quantizer("fbi", role="output")

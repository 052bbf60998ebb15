"""What a block computes: against a plain reference, with norms where they belong, within documents, at any depth."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.model import Model, ModelConfig
from fbi.model.attention import LONG
from fbi.model.axes import mesh_1x1
from fbi.policy import Policy

SHAPE = ModelConfig(vocab=64, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, ff=48, context=512)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, 64, (2, 12)))


def reference(params, tokens, config):
    """The same decoder in plain NumPy, float64, a loop over everything."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rms = lambda x, n: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * n["scale"]
    act = {"silu": lambda x: x / (1 + np.exp(-x)), "relu2": lambda x: np.maximum(x, 0) ** 2}[config.activation]
    layers = p[f"layers_0_{config.layers}"]
    out = []
    for row in np.asarray(tokens):
        x = p["embed"][row]
        t, half = len(row), config.head_dim // 2
        angles = np.arange(t)[:, None] * config.rope_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angles), np.sin(angles)
        rotate = lambda y: np.concatenate(
            [y[:, :half] * cos - y[:, half:] * sin, y[:, half:] * cos + y[:, :half] * sin], 1
        )
        for i in range(config.layers):
            at = jax.tree.map(lambda leaf: leaf[i], layers)
            linear = lambda site, y: (rms(y, site["norm"]) if config.norm == "inner" else y) @ site["w"]
            h = x if config.norm == "inner" else rms(x, at["attn_norm"])
            q, k, v = (linear(at["attn"][n], h) for n in "qkv")
            heads = []
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                cut = lambda y, n: y[:, n * config.head_dim : (n + 1) * config.head_dim]
                scores = rotate(cut(q, head)) @ rotate(cut(k, group)).T / np.sqrt(config.head_dim)
                scores[np.triu_indices(t, 1)] = -np.inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                heads.append(weights / weights.sum(-1, keepdims=True) @ cut(v, group))
            mixed = np.concatenate(heads, 1)
            mixed = rms(mixed, at["attn"]["sub_norm"]) if config.norm == "sub" else mixed
            x = x + linear(at["attn"]["o"], mixed)
            h = x if config.norm == "inner" else rms(x, at["mlp_norm"])
            hidden = act(linear(at["mlp"]["gate"], h)) * linear(at["mlp"]["up"], h)
            hidden = rms(hidden, at["mlp"]["sub_norm"]) if config.norm == "sub" else hidden
            x = x + linear(at["mlp"]["down"], hidden)
        x = rms(x, p["norm"])
        out.append(x @ (p["embed"].T if config.tied else p["head"]["w"]))
    return np.stack(out)


@pytest.mark.parametrize("changes", [{}, {"norm": "inner"}, {"norm": "sub", "activation": "relu2"}, {"tied": True}])
def test_logits_equal_a_plain_reference(changes):
    config = dataclasses.replace(SHAPE, init_std=0.2, **changes)
    model = Model(config)
    params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), model.init(0))
    np.testing.assert_allclose(model.apply(params, TOKENS), reference(params, TOKENS, config), rtol=2e-4, atol=2e-4)


def test_attention_within_documents_is_that_of_each_document_alone():
    model = Model(dataclasses.replace(SHAPE, layers=1))
    params = model.init(0)
    documents = jnp.asarray([[0] * 5 + [1] * 7] * 2)
    masked = model.apply(params, TOKENS, documents)
    np.testing.assert_allclose(masked[:, :5], model.apply(params, TOKENS[:, :5]), rtol=1e-4, atol=1e-5)
    # Rotary positions are relative: the second document does not notice where it starts.
    np.testing.assert_allclose(masked[:, 5:], model.apply(params, TOKENS[:, 5:]), rtol=1e-4, atol=1e-5)
    assert not np.allclose(masked[:, 5:], model.apply(params, TOKENS)[:, 5:], atol=1e-3)


def test_long_sequences_are_computed_in_turn_with_the_same_result_and_gradient():
    model = Model(dataclasses.replace(SHAPE, layers=1))
    params = model.init(0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(1, 64, (2, LONG)))
    short = model.apply(params, tokens[:, : LONG - 1])  # below the threshold: all sequences at once
    np.testing.assert_allclose(model.apply(params, tokens)[:, : LONG - 1], short, rtol=1e-4, atol=1e-5)

    def total(params, tokens, upto):
        return jnp.sum(
            jnp.where(jnp.arange(tokens.shape[1])[None, :, None] < upto, model.apply(params, tokens) ** 2, 0)
        )

    a = jax.grad(total)(params, tokens, LONG - 1)
    b = jax.grad(total)(params, tokens[:, : LONG - 1], LONG - 1)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), a, b)


def test_a_layer_starts_alike_under_every_policy_and_depth_cuts_the_stack():
    whole = Model(dataclasses.replace(SHAPE, layers=4)).init(3)
    cut = Model(dataclasses.replace(SHAPE, layers=4), Policy.parse("layers.{0,-1}.*: w=none | layers.*: w=fbi")).init(3)
    assert [name for name in sorted(cut) if name.startswith("layers")] == ["layers_0_1", "layers_1_3", "layers_3_4"]
    stacked = [cut[name]["mlp"]["up"]["w"] for name in ("layers_0_1", "layers_1_3", "layers_3_4")]
    np.testing.assert_array_equal(np.concatenate(stacked), whole["layers_0_4"]["mlp"]["up"]["w"])
    assert "q" not in cut["layers_0_1"]["mlp"]["up"]
    assert cut["layers_1_3"]["mlp"]["up"]["q"]["alpha"].shape == (2, 32, 1)


@pytest.mark.parametrize("policy", ["layers.*.attn.kv: a=absmax:bits=3", "layers.*.attn.probs: a=absmax:bits=2",
                                    "head: w=absmax;a=absmax", "embed: w=absmax:bits=2"])  # fmt: skip
def test_every_kind_of_site_is_quantized_when_named(policy):
    plain, quantized = Model(SHAPE), Model(SHAPE, Policy.parse(policy))
    params = plain.init(0)
    assert not np.allclose(quantized.apply(params, TOKENS), plain.apply(params, TOKENS), atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights():
    model = Model(dataclasses.replace(SHAPE, dtype="bfloat16"), Policy.parse("fbi"))
    params = model.init(0)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    logits = model.apply(params, TOKENS)
    assert logits.dtype == jnp.float32
    close = Model(SHAPE, Policy.parse("fbi")).apply(params, TOKENS)
    np.testing.assert_allclose(logits, close, atol=0.05)
    assert "bf16" in jax.jit(model.apply).lower(params, TOKENS).as_text()


def test_recomputation_and_unrolling_change_nothing(x64):
    config = dataclasses.replace(SHAPE, dtype="float64")
    plain = Model(config)
    params = plain.init(0)

    def grads(model):
        return jax.grad(lambda p: jnp.sum(model.apply(p, TOKENS) ** 2))(params)

    expected = grads(plain)
    for kept in ("nothing", "products"):
        found = grads(Model(config, remat=True, remat_keeps=kept, unroll=2))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), found, expected)


def test_products_that_are_kept_are_not_computed_again():
    def products(**options):
        model = Model(SHAPE, **options)
        loss = lambda p: jnp.sum(model.apply(p, TOKENS) ** 2)
        with jax.set_mesh(mesh_1x1()):
            return str(jax.make_jaxpr(jax.grad(loss))(model.abstract())).count("dot_general[")

    everything, products_kept, nothing = (
        products(), products(remat=True, remat_keeps="products"), products(remat=True)
    )  # fmt: skip
    assert nothing - everything == 7 + 2 - 1  # of a layer the seven and the attention's two, the last one unused
    assert products_kept - everything == 2

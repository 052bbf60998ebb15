"""Attention by blocks: the softmax's values and gradients, and no scores kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.model.attention import Where, attention, softmax_weights
from fbi.model.causal import BLOCKS, SHORTEST, blocks, causal

HEADS, GROUPS, WIDTH = 4, 2, 8


def published(q, k, v, document):
    """softmax(q k^T / sqrt(width)) v; Vaswani et al., arXiv 1706.03762, eq. 1, where queries may look."""
    scores = jnp.einsum("grtk,gsk->grts", q, k) / WIDTH**0.5
    allowed = np.tri(q.shape[2], dtype=bool) & (document[:, None] == document[None, :])
    return jnp.einsum("grts,gsk->grtk", jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf), -1), v)


def drawn(length, *lead):
    rng = np.random.default_rng(length)
    q, g = rng.standard_normal((2, *lead, GROUPS, HEADS // GROUPS, length, WIDTH))
    k, v = rng.standard_normal((2, *lead, GROUPS, length, WIDTH))
    return 3 * q, k, v, g


def test_blocks_cover_every_query_once():
    for length in (1, 63, 64, 65, 300, 512, 520, 4096):
        found = blocks(length)
        assert [n for at in found for n in range(length)[at]] == list(range(length))
        assert len(found) <= BLOCKS
        assert length <= SHORTEST or all(at.stop - at.start >= SHORTEST for at in found[:-1])


@pytest.mark.parametrize("length", [1, 64, 65, 150, 520])
@pytest.mark.parametrize("documents", [False, True])
def test_values_and_gradients_are_those_of_the_softmax_in_float64(length, documents, x64):
    q, k, v, g = map(jnp.asarray, drawn(length))
    document = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 4, length)))

    @jax.jit
    def both(q, k, v):
        alone = jnp.zeros_like(document)
        fns = (
            lambda *qkv: causal(*qkv, document if documents else None),
            lambda *qkv: published(*qkv, document if documents else alone),
        )
        return [(fn(q, k, v), jax.vjp(fn, q, k, v)[1](g)) for fn in fns]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), *both(q, k, v))


def test_scores_beyond_the_range_of_the_exponential_are_harmless():
    q, k, v, g = (jnp.asarray(x, jnp.float32) for x in drawn(130))
    value, gradients = jax.jit(lambda *qkv: (causal(*qkv), jax.vjp(causal, *qkv)[1](g)))(1e4 * q, k, v)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (value, *gradients))
    np.testing.assert_allclose(value[:, :, 0], jnp.broadcast_to(v[:, None, 0], value[:, :, 0].shape), rtol=1e-6)


def test_the_backward_pass_keeps_no_scores():
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in drawn(512))
    kept = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(causal, *qkv)[1], q, k, v))
    sizes = sorted(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert sizes == sorted([q.nbytes, k.nbytes, v.nbytes, q.nbytes, 4 * HEADS * 512])  # the output, a number a query


@pytest.mark.parametrize("length", [40, 300])
def test_it_is_what_any_other_rule_of_weights_gets_its_scores_by(length, x64):
    q, k, v, g = drawn(length, 2)
    q, g = (x.reshape(2, HEADS, length, WIDTH).transpose(0, 2, 1, 3) for x in (q, g))
    document = np.sort(np.random.default_rng(1).integers(0, 3, (2, length)))
    where = Where(jnp.arange(length), jnp.arange(length), jnp.asarray(document))

    @jax.jit
    def both(q, k, v):
        rules = (None, lambda scores, allowed, needs: softmax_weights(scores, allowed))
        fns = [lambda *qkv, rule=rule: attention(*qkv, where, rule) for rule in rules]
        return [(fn(q, k, v), jax.vjp(fn, q, k, v)[1](g)) for fn in fns]

    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1])):
        found, wanted = both(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11), found, wanted)

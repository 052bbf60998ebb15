"""Losses in chunks of tokens: the value and the gradient of the whole, without its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fbi.errors import InputError
from fbi.loss import KINDS, Loss, Outputs, Readout, chunked, read_out
from fbi.model import Model, ModelConfig
from fbi.model.dense import Product
from fbi.policy import Policy
from fbi.train import mesh as meshes
from fbi.train.step import make_objective, on_mesh

B, T, D, V = 4, 6, 5, 8
EVERY = "0.5*ce + 0.5*ad:temperature=2,top_k=3 + kl + 2*rkl:temperature=2 + 0.7*cakld:beta=0.3 + 0.1*hidden"
SHAPE = ModelConfig(vocab=64, dim=32, layers=1, heads=4, kv_heads=4, head_dim=8, ff=64, context=32, dtype="float64")


def arrays(batch=B, tokens=T, width=D, vocab=V, dtype="float64"):
    """Final hidden states and heads of a student and a teacher, and labels."""
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape), dtype)
    x, known = normal(batch, tokens, width), normal(batch, tokens, width)
    return x, normal(width, vocab), known, normal(width, vocab), jnp.asarray(draw.integers(0, vocab, (batch, tokens)))


def whole(loss, x, w, known, head, out):
    logits = lambda x, w: jnp.dot(x, w, out_sharding=jax.P("data", None, "model"))
    return loss(out._replace(logits=logits(x, w), teacher_logits=logits(known, head)))


def cut(loss, x, w, known, head, out, size):
    full = jax.sharding.reshard(w, jax.P(None, "model"))
    student, teacher = Product(x, w, jax.lax.stop_gradient(full)), Product(known, head, head)
    same = lambda y, product: y
    return chunked(loss, out, Readout(student, same), read_out(teacher, same), size)


def floats(sums):
    return {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize(
    ("mesh_text", "dtype", "tolerance"), [("data=2,model=2", "float64", 1e-12), ("data=1", "float32", 1e-5)]
)
def test_every_loss_over_logits_and_its_gradient_are_those_of_the_whole(mesh_text, dtype, tolerance, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    loss = Loss.parse(EVERY)
    mesh = meshes.make(meshes.parse(mesh_text, 8))
    features = jnp.asarray(np.random.default_rng(1).standard_normal((2, 2, B, T, D)), dtype)
    with jax.set_mesh(mesh):
        put = lambda x, *spec: jax.device_put(x, jax.P(*spec))
        x, w, known, head, labels = arrays(dtype=dtype)
        x, known, labels = put(x, "data"), put(known, "data"), put(labels, "data", None)
        w, head = put(w, None, ("model", "data")), put(head, None, "model")
        own, other = put(features, None, None, "data")
        out = Outputs(None, labels, None, {"out": own}, {"out": other})

        def gradient(total):
            return jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w, out)

        (expected, sums), slopes = gradient(lambda x, w, out: whole(loss, x, w, known, head, out))
        # 24 tokens: in chunks of 5 the last is filled up; in chunks of 100 there is one.
        for size in (5, 100):
            part = lambda x, w, out, size=size: cut(loss, x, w, known, head, out, size)
            (found, found_sums), found_slopes = gradient(part)
            assert float(found) == pytest.approx(float(expected), rel=tolerance)
            assert floats(found_sums) == pytest.approx(floats(sums), rel=tolerance)
            for ours, theirs in zip(found_slopes, slopes, strict=True):
                assert jax.typeof(ours) == jax.typeof(theirs)
                np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)
    assert {term.kind for term in loss.terms} >= {name for name, k in KINDS.items() if not k.features({})}


def test_the_objective_of_a_model_is_the_same(x64):
    """A head whose method adds to its product, over a split vocabulary; a teacher whose head is its embedding."""
    policy = Policy.parse("layers.*: w=fbi | head: w=binarymos:experts=2")
    model, teacher = Model(SHAPE, policy), Model(dataclasses.replace(SHAPE, tied=True))
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh := meshes.make(meshes.parse("data=2,model=2", 8))):
        draw = lambda leaf: jax.device_put(0.3 * rng.standard_normal(leaf.shape), leaf.sharding)
        params, known = (jax.tree.map(draw, on_mesh(some.abstract())) for some in (model, teacher))
        tokens = meshes.put_batch(rng.integers(0, 64, (4, 18)).astype(np.int32), mesh)
        found = []
        for chunk in (0, 7):
            objective = make_objective(Loss.parse("0.5*ce + 0.5*ad + hidden"), teacher=teacher, chunk=chunk)
            total = lambda params, objective=objective: objective(model, params, known, tokens, jnp.asarray(0.5))
            found.append(jax.jit(jax.value_and_grad(total, has_aux=True))(params))
    ((expected, sums), slopes), ((value, ours), gradients) = found
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert floats(ours) == pytest.approx(floats(sums), rel=1e-12)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
        assert jax.typeof(a) == jax.typeof(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * float(jnp.abs(b).max()))


def test_what_cannot_be_cut_is_refused():
    *given, labels = arrays(dtype="float32")
    with (
        jax.set_mesh(meshes.make({"data": 1, "model": 1})),
        pytest.raises(InputError, match=r"cakld looks at the whole batch, which loss_chunk=5 computes in parts; use"),
    ):
        cut(Loss.parse("ce + cakld"), *given, Outputs(None, labels), 5)


def test_no_more_logits_exist_than_those_of_a_chunk(optimized):
    """With 512 tokens, a chunk of 16 and a vocabulary that is 256 times the width: under 1/8 of the memory."""
    tokens, size, vocab = 512, 16, 4096
    loss = Loss.parse("mix")
    with jax.set_mesh(meshes.make({"data": 1, "model": 1})):
        shapes = jax.eval_shape(lambda: arrays(1, tokens, 16, vocab, "float32"))
        specs = [jax.P("data")] * 2 + [jax.P(None, "model")] * 2
        used = {}
        for name, function in {"whole": whole, "chunks": lambda *a: cut(*a, size)}.items():

            def total(x, w, known, head, labels, function=function):
                return function(loss, x, w, known, head, Outputs(None, labels))[0]

            mesh = jax.sharding.get_mesh()
            spread = (specs[0], specs[2], specs[1], specs[3], jax.P("data", None))
            given = [
                jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.NamedSharding(mesh, spec))
                for s, spec in zip(shapes, spread, strict=True)
            ]
            compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*given).compile()
            used[name] = compiled.memory_analysis().temp_size_in_bytes
            assert (f"f32[1,{tokens},{vocab}]" in compiled.as_text()) is (name == "whole")
    assert used["whole"] > 2 * 4 * tokens * vocab  # student and teacher
    assert used["chunks"] < used["whole"] / 8

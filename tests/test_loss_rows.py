"""A teacher known at its likeliest tokens and by the mass of all others: its losses, and how it is stored."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_support import B, T, V, close, outputs, softmax

from fbi.data.table import Layout, Rows
from fbi.errors import InputError
from fbi.loss import Loss, Outputs, Readout, chunked, completed, distillation, forward_kl, from_rows
from fbi.model.dense import Product
from fbi.train import mesh as meshes
from fbi.train.likeliest import sampled, top

OVER_LOGITS = "0.5*ce + 0.5*ad:temperature=2 + kl + 2*rkl + 0.7*cakld:beta=0.3"


def coarse(logits, rows):
    """Soft cross-entropy in which the tokens outside the table are one outcome, written out."""
    q = jax.nn.log_softmax(logits, -1)
    kept = jnp.take_along_axis(q, rows.indices, -1)
    others = jnp.log1p(-jnp.sum(jnp.exp(kept), -1))
    return -jnp.sum(jnp.exp(rows.logp) * kept, -1) - jnp.exp(rows.tail) * others


def test_the_student_spreads_what_is_left_by_hand():
    rows = Rows(jnp.array([[[2]]]), jnp.log(jnp.array([[[0.5]]])), jnp.log(jnp.array([[0.5]])))
    own = jnp.log(jnp.array([[[0.6, 0.2, 0.2]]])) + 7  # of the other two, the first is three times as likely
    close(jnp.exp(completed(own, rows)), [[[0.375, 0.125, 0.5]]], 1e-6)
    out = Outputs(own, jnp.array([[0]]), completed(own, rows))
    close(forward_kl(out), [[0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)]], 1e-6)


@pytest.mark.parametrize("text", ["ad", "mix", "kl", "rkl", "ad:temperature=2", "cakld", "kl:temperature=3"])
def test_with_the_whole_vocabulary_every_loss_is_that_of_the_whole_teacher(text, x64):
    out, loss = outputs(), Loss.parse(text)
    rows = Rows(*top(out.teacher_logits, V))
    assert bool(jnp.all(jnp.isneginf(rows.tail)))

    def offline(logits):
        return loss(out._replace(logits=logits, teacher_logits=completed(logits, rows)))[0]

    live = lambda logits: loss(out._replace(logits=logits))[0]
    close(offline(out.logits), live(out.logits))
    close(jax.grad(offline)(out.logits), jax.grad(live)(out.logits))


def test_the_gradient_is_that_of_the_loss_with_one_outcome_for_all_others(x64):
    out, k = outputs(), 3
    rows = Rows(*top(out.teacher_logits, k))
    found = jax.grad(lambda x: jnp.sum(distillation(out._replace(logits=x, teacher_logits=completed(x, rows)))))(
        out.logits
    )
    close(found, jax.grad(lambda x: jnp.sum(coarse(x, rows)))(out.logits))
    p, q = softmax(out.teacher_logits), softmax(out.logits)
    kept = p >= np.sort(p, -1)[..., -k][..., None]
    p_tail, q_tail = (np.where(kept, 0, x).sum(-1, keepdims=True) for x in (p, q))
    close(found, np.where(kept, q - p, q * (1 - p_tail / q_tail)))
    whole = jax.grad(lambda x: jnp.sum(distillation(out._replace(logits=x))))(out.logits)
    off = np.abs(np.asarray(found - whole)).sum(-1)
    assert (off <= 2 * p_tail[..., 0]).all()
    assert off.max() > 1e-3


def test_the_divergence_is_too_small_by_that_within_the_tail(x64):
    out = outputs()
    rows = Rows(*top(out.teacher_logits, 3))
    p, q = softmax(out.teacher_logits), softmax(out.logits)
    tail = p < np.sort(p, -1)[..., -3][..., None]
    p, q = np.where(tail, p, 0), np.where(tail, q, 0)
    within = np.where(tail, p * (np.log(np.where(tail, p, 1)) - np.log(np.where(tail, q, 1))), 0).sum(-1)
    within -= p.sum(-1) * np.log(p.sum(-1) / q.sum(-1))
    found = forward_kl(out._replace(teacher_logits=completed(out.logits, rows)))
    close(forward_kl(out) - found, within)
    assert (within > 0).all()


def expected_by(out, k, drawn, function, grid=2000):
    """The mean of what `function` makes of drawn rows, over a grid of where the draws start."""
    starts = (np.arange(grid) + 0.5) / grid
    rows = lambda start: Rows(*sampled(out.teacher_logits, k, drawn, jnp.full((B, T), start)))
    return jnp.mean(jax.lax.map(lambda start: function(rows(start)), starts), 0)


def test_what_is_drawn_expects_the_teacher_and_every_gradient_linear_in_it(x64):
    out, k, drawn = outputs(), 5, 3
    p = expected_by(out, k, drawn, lambda rows: jax.nn.softmax(completed(out.logits, rows), -1))
    close(p, softmax(out.teacher_logits), 2e-3)
    for text in ("ad", "kl", "mix"):
        loss = Loss.parse(text)
        assert all(term.registered.linear(dict(term.options)) for term in loss.terms if term.registered.needs_teacher)
        slope = jax.grad(lambda x, logits, loss=loss: loss(out._replace(logits=x, teacher_logits=logits))[0])
        found = expected_by(out, k, drawn, lambda rows, slope=slope: slope(out.logits, completed(out.logits, rows)))
        close(found, slope(out.logits, out.teacher_logits), 2e-3)
    lumped = completed(out.logits, Rows(*top(out.teacher_logits, k)))
    assert float(jnp.abs(jax.nn.softmax(lumped, -1) - softmax(out.teacher_logits)).max()) > 0.02
    for text in ("rkl", "cakld:beta=0.5", "ad:temperature=2", "ad:top_k=3", "kl:temperature=2"):
        (term,) = Loss.parse(text).terms
        assert not term.registered.linear(dict(term.options))


def test_draws_are_spread_over_the_tail_by_hand():
    """Of the tail 0.2, 0.1, 0.1 (in the order of ids) four draws find the first twice, the others once each."""
    p = jnp.array([[[0.2, 0.6, 0.1, 0.1]]])
    for start in (0.0, 0.3, 0.999):
        rows = Rows(*sampled(jnp.log(p), 5 - 1, 3, jnp.full((1, 1), start)))
        assert rows.indices[0, 0, 0] == 1
        close(jnp.sum(jnp.exp(rows.logp), -1), [[1.0]], 1e-6)
        assert bool(jnp.all(jnp.isneginf(rows.tail)))
    rows = Rows(*sampled(jnp.log(p), 5, 4, jnp.full((1, 1), 0.5)))
    np.testing.assert_array_equal(rows.indices, [[[1, 0, 0, 2, 3]]])
    close(jnp.exp(rows.logp), [[[0.6, 0.2, 0, 0.1, 0.1]]], 1e-6)
    own = jnp.zeros((1, 1, 4))
    read = Layout(1, 4, 4).unpack(Layout(1, 4, 4).pack(Rows(*sampled(jnp.log(p), 4, 3, jnp.full((1, 1), 0.4)))))
    assert bool(jnp.all(jnp.isfinite(read.logp)))
    close(jnp.sum(jax.nn.softmax(completed(own, Rows(*map(jnp.asarray, read))), -1)[..., 1]), 0.6, 1e-3)


def test_draws_from_no_mass_have_none():
    logits = jnp.array([[[0.0, 1.0, -jnp.inf, -jnp.inf, -jnp.inf]]])
    rows = Rows(*sampled(logits, 4, 2, jnp.full((1, 1), 0.7)))
    np.testing.assert_array_equal(jnp.exp(rows.logp[..., 2:]), [[[0, 0]]])
    close(jax.nn.softmax(completed(jnp.zeros((1, 1, 5)), rows), -1), jax.nn.softmax(logits), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_stored_rows_give_the_loss_back(dtype, tolerance):
    out = outputs()
    for k in (V, 3):
        layout, rows = Layout(T, V, k, dtype), Rows(*top(out.teacher_logits, k))
        records = layout.pack(rows)
        assert [len(record) for record in records] == [T * layout.bytes_per_token] * B
        read = layout.unpack(records)
        assert (read.indices.dtype, read.logp.dtype) == (np.uint16, np.dtype(dtype))
        np.testing.assert_array_equal(read.indices, rows.indices)
        np.testing.assert_allclose(np.exp(read.tail), np.exp(rows.tail), rtol=2 * tolerance)
        expected = out._replace(teacher_logits=completed(out.logits, rows))
        found = out._replace(teacher_logits=completed(out.logits, Rows(*map(jnp.asarray, read))))
        close(distillation(found), distillation(expected), tolerance)
        close(Loss.parse("rkl")(found)[0], Loss.parse("rkl")(expected)[0], 10 * tolerance)


def test_what_a_type_cannot_hold_stays_finite():
    """A token or a tail of no probability: the least that float16 holds, and no loss is lost to it."""
    teacher = jnp.array([[[0.0, -1e5, -2e5, -2e5]]])
    layout = Layout(1, 4, 2)
    read = layout.unpack(layout.pack(Rows(*top(teacher, 2))))
    np.testing.assert_array_equal(read.logp, [[[0, -65504]]])
    np.testing.assert_array_equal(read.tail, [[-65504]])
    own = jnp.zeros((1, 1, 4))
    out = Outputs(own, jnp.array([[0]]), completed(own, Rows(*map(jnp.asarray, read))))
    assert all(bool(jnp.isfinite(x)) for x in Loss.parse(OVER_LOGITS)(out)[1].values())
    close(distillation(out), [[math.log(4)]], 1e-6)


def test_a_token_costs_so_many_bytes():
    assert Layout(128, 32_000, 64).bytes_per_token == 64 * (2 + 2) + 2
    assert Layout(128, 65_536, 64).index == np.uint16
    assert Layout(128, 65_537, 64, "float32").bytes_per_token == 64 * (4 + 4) + 4
    with pytest.raises(InputError, match="k=65 must be at least 1 and at most the vocabulary of 64 tokens"):
        Layout(128, 64, 65)
    with pytest.raises(InputError, match="unknown type of log-probabilities 'bf16'; valid: float16, float32"):
        Layout(128, 64, 4, "bf16")
    with pytest.raises(InputError, match="drawn=4 must be at least 0 and below k=4, of which it is a part"):
        Layout(128, 64, 4, drawn=4)


@pytest.mark.slow
def test_a_split_vocabulary_and_chunks_change_nothing(x64):
    loss, out, width = Loss.parse(OVER_LOGITS), outputs(), 5
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((B, T, width)), rng.standard_normal((width, V))
    rows = Rows(*top(out.teacher_logits, 3))
    alone = loss(out._replace(logits=jnp.asarray(x @ w), teacher_logits=completed(jnp.asarray(x @ w), rows)))[1]
    with jax.set_mesh(meshes.make(meshes.parse("data=2,model=2", 8))):
        x, w = jax.device_put(x, jax.P("data")), jax.device_put(w, jax.P(None, "model"))
        labels = jax.device_put(out.labels, jax.P("data", None))
        rows = Rows(*(jax.device_put(part, jax.P("data")) for part in rows))
        same = lambda y, product: y

        def whole(x, w):
            own = jnp.dot(x, w, out_sharding=jax.P("data", None, "model"))
            return loss(Outputs(own, labels, from_rows(rows)(own)))

        def cut(x, w):
            student = Readout(Product(x, w, jax.lax.stop_gradient(w)), same)
            return chunked(loss, Outputs(None, labels), student, from_rows(rows), 2)

        found = [jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(x, w) for total in (whole, cut)]
        (_, sums), slopes = found[0]
        (_, cut_sums), cut_slopes = found[1]
    for name, value in alone.items():
        close(sums[name], value)
        close(cut_sums[name], value)
    for ours, theirs in zip(cut_slopes, slopes, strict=True):
        close(ours, theirs)

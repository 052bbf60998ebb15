"""LTE's losses over router scores, against their formulas in NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_support import B, T, close, normal, outputs, slope

from fbi.errors import InputError
from fbi.loss import Loss, efficiency, separability

LAYERS, EXPERTS = 2, 5


def scored(scores, teacher=False):
    return outputs(teacher)._replace(features={"mlp.router": scores})


def drawn(seed=0):
    return jax.nn.sigmoid(normal(seed, (LAYERS, B, T, EXPERTS)))


def test_terms_are_their_formulas_and_by_hand(x64):
    scores = drawn()
    g = np.asarray(scores)
    close(efficiency(scored(scores)), (g**2).mean((0, 3)))
    close(separability(scored(scores)), (1 / np.maximum((g - 0.5) ** 2, 0.01)).mean((0, 3)))
    close(separability(scored(scores), tau=0.3, floor=1e-3), (1 / np.maximum((g - 0.3) ** 2, 1e-3)).mean((0, 3)))
    hand = scored(jnp.broadcast_to(jnp.array([0.0, 1.0, 0.9, 0.5, 0.25]), (1, B, T, 5)))
    close(efficiency(hand), np.full((B, T), (1 + 0.81 + 0.25 + 0.0625) / 5))
    # 1 / 0.25, twice; 1 / 0.16; the floor's 100; 1 / 0.0625
    close(separability(hand), np.full((B, T), (4 + 4 + 6.25 + 100 + 16) / 5))


def test_the_task_of_a_loss_is_what_its_regularizers_leave(x64):
    out = scored(drawn())
    loss = Loss.parse("0.5*ce + 0.5*efficiency + 2*separability")
    sums = {name: float(value) for name, value in loss(out)[1].items()}
    assert loss.task(sums) == 0.5 * sums["ce"] < sums["loss"] - 1
    for text in ("ce", "efficiency + separability"):  # nothing to leave out, nothing left
        sums = {name: float(value) for name, value in Loss.parse(text)(out)[1].items()}
        assert Loss.parse(text).task(sums) == sums["loss"]


@pytest.mark.parametrize("text", ["efficiency", "separability", "separability:tau=0.3,floor=0.001"])
def test_gradients_are_the_finite_differences(text, x64):
    loss, scores = Loss.parse(text), drawn(1)
    direction = normal(2, scores.shape)
    gradient = jax.grad(lambda s: loss(scored(s))[0])(scores)
    expected = slope(lambda s: loss(scored(s))[0], scores, direction, 1e-7)
    assert float(jnp.sum(gradient * direction)) == pytest.approx(expected, rel=1e-6)


def test_losses_are_sums_with_weights_that_may_be_given_anew(x64):
    out = scored(drawn(), teacher=True)
    loss = Loss.parse("ad + 0.5*efficiency + 0.02*separability")
    assert loss.features == ("layers.*.mlp.router",)
    assert loss.teacher_features == ()  # a dense teacher has no routers
    total, sums = loss(out)
    assert float(total) == pytest.approx(float(sums["ad"] + 0.5 * sums["efficiency"] + 0.02 * sums["separability"]))
    moved, same = loss(out, {"efficiency": jnp.asarray(3.0)})
    assert float(moved - total) == pytest.approx(2.5 * float(sums["efficiency"]))
    assert float(same["efficiency"]) == float(sums["efficiency"])
    assert Loss.parse("hidden + efficiency").teacher_features == ("layers.*.out",)


def test_scores_at_the_threshold_and_fresh_routers_have_finite_losses_and_gradients():
    loss = Loss.parse("efficiency + separability")
    value, gradient = jax.value_and_grad(lambda s: loss(scored(s))[0])(jnp.full((LAYERS, B, T, EXPERTS), 0.5))
    assert float(value) == pytest.approx(B * T * 100.25, rel=1e-6)
    assert bool(jnp.isfinite(gradient).all())
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, 16)), jnp.float32)

    def of_router(w, b):
        return loss(scored(jax.nn.sigmoid(x @ w + b[None, None, :])[None]))[0]

    scales = 10.0 ** rng.uniform(-6, 3, (1000, 1, 1))  # from scores that all lie at the threshold to saturated ones
    w = jnp.asarray(scales * rng.standard_normal((1000, 16, EXPERTS)), jnp.float32)
    b = jnp.asarray(scales[:, 0] * rng.integers(0, 2, (1000, EXPERTS)), jnp.float32)
    found = jax.jit(jax.vmap(jax.value_and_grad(of_router, argnums=(0, 1))))(w, b)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("separability:tau=1", "tau=1.0 must be above 0 and below 1"),
        ("separability:floor=0", "floor=0.0 must be above 0 and finite"),
        ("efficiency:tau=0.5", "unknown efficiency option 'tau'"),
    ],
)
def test_options_out_of_range_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        Loss.parse(text)

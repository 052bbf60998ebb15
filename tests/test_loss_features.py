"""Losses over intermediate values, against their formulas in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_support import PROJECTIONS, B, T, close, featured, normal, outputs, slope

from fbi.errors import InputError
from fbi.loss import Loss, direction_matching, hidden_states, matched_layers, similarity


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def gram(x):
    """X X^T over its Frobenius norm, of each sequence of [b, t, x]."""
    x = np.asarray(x, np.float64)
    p = np.einsum("bti,bsi->bts", x, x)
    return p / np.sqrt((p**2).sum((1, 2), keepdims=True))


def test_hidden_states_are_compared_by_direction(x64):
    out = featured()
    student, teacher = out.features["out"], out.teacher_features["out"]
    expected = ((unit(teacher) - unit(student)) ** 2).sum((0, -1))
    close(hidden_states(out), expected)
    close(hidden_states(out), 2 * 2 - 2 * (unit(teacher) * unit(student)).sum((0, -1)))  # two layers, 2 - 2 cos each
    close(hidden_states(out, layers=1), ((unit(teacher) - unit(student))[1] ** 2).sum(-1))
    scales = jnp.exp(normal(3, (2, B, T, 1)))
    for scaled in (out._replace(features={"out": scales * student}),
                   out._replace(teacher_features={"out": scales * teacher})):  # fmt: skip
        close(hidden_states(scaled), expected)
    close(hidden_states(out._replace(features={"out": -teacher})), np.full((B, T), 8.0))  # opposite: 4 per layer
    assert hidden_states(out).shape == (B, T)


def test_hidden_states_by_hand_and_at_zero():
    out = outputs()._replace(
        features={"out": jnp.zeros((1, B, T, 2)).at[:, 0].set(jnp.array([3.0, 4.0]))},
        teacher_features={"out": jnp.zeros((1, B, T, 2)).at[..., 0].set(1.0)},
    )
    close(hidden_states(out), [[0.8] * T, [1.0] * T], 1e-6)  # (1 - 0.6)² + 0.8²; a zero vector stays zero
    gradient = jax.grad(lambda x: hidden_states(out._replace(features={"out": x})).sum())(out.features["out"])
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [(3, 3, [0, 1, 2]), (2, 4, [1, 3]), (2, 3, [1, 2]), (3, 2, [0, 1, 1]), (1, 5, [4]), (4, 1, [0] * 4),
     (6, 12, [1, 3, 5, 7, 9, 11])],
)  # fmt: skip
def test_layers_are_matched_evenly_the_last_with_the_last(student, teacher, layers):
    assert matched_layers(student, teacher) == layers


def test_models_of_unlike_depth_are_matched(x64):
    out = featured((2, 4), (5, 4))
    close(hidden_states(out),
          ((unit(out.teacher_features["out"])[[2, 4]] - unit(out.features["out"])) ** 2).sum((0, -1)))  # fmt: skip
    close(hidden_states(out, layers=1),
          ((unit(out.teacher_features["out"][4]) - unit(out.features["out"][1])) ** 2).sum(-1))  # fmt: skip


def test_direction_matching_is_its_formula_at_any_width_and_depth(x64):
    out = featured((2, 4), (4, 6))
    distance = lambda name: sum(
        ((gram(out.features[name][i]) - gram(out.teacher_features[name][j])) ** 2).sum((1, 2))
        for i, j in ((0, 1), (1, 3))
    )
    expected = sum(map(distance, PROJECTIONS))
    close(direction_matching(out, hidden=0.0), np.repeat(expected[:, None], T, 1))
    close(direction_matching(out, hidden=0.5), np.repeat((expected + 0.5 * distance("out"))[:, None], T, 1))
    close(Loss.parse("dmd")(out)[0] / (B * T), np.mean(expected + distance("out")))  # a mean over sequences
    last = sum(((gram(out.features[n][1]) - gram(out.teacher_features[n][3])) ** 2).sum((1, 2)) for n in PROJECTIONS)
    close(direction_matching(out, hidden=0.0, layers=1)[:, 0], last)


def test_a_similarity_knows_neither_scale_nor_basis_nor_width(x64):
    x = normal(0, (B, T, 4))
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 4)))[0].T  # into six dimensions, lengths kept
    close(similarity(x), gram(x))
    close(similarity(7.0 * x @ jnp.asarray(turn)), gram(x))
    close(jnp.sum(similarity(x) ** 2, (1, 2)), [1.0] * B)
    out = featured()
    turned = {name: jnp.exp(normal(9, (2, B, 1, 1))) * (x @ jnp.asarray(turn)) for name, x in out.features.items()}
    close(direction_matching(out._replace(features=turned)), direction_matching(out))
    close(direction_matching(out._replace(teacher_features=turned)), np.zeros((B, T)))


@pytest.mark.parametrize("text", ["hidden", "dmd", "dmd:hidden=0", "hidden:layers=1"])
def test_gradients_at_the_features_are_the_finite_differences(text, x64):
    out = featured((2, 4), (3, 4))
    loss = Loss.parse(text)
    assert set(loss.features) == {f"layers.*.{name}" for name in (() if "hidden=0" in text else ("out",))
                                  + (PROJECTIONS if "dmd" in text else ())}  # fmt: skip
    function = lambda features: loss(out._replace(features=features))[0]
    gradient = jax.grad(function)(out.features)
    for name, x in out.features.items():
        if f"layers.*.{name}" not in loss.features:
            assert not gradient[name].any()  # only what it declares
            continue
        direction = normal(8, x.shape)
        expected = slope(lambda x, n=name: function(out.features | {n: x}), x, direction)
        assert float(jnp.sum(gradient[name] * direction)) == pytest.approx(expected, rel=1e-6), name


def test_features_that_cannot_be_compared_are_refused():
    with pytest.raises(InputError, match=r"width 4 \(student\) and 6 \(teacher\); use a teacher of the same model.dim"):
        Loss.parse("hidden")(featured((2, 4), (2, 6)))
    for text in ("hidden:layers=3", "dmd:layers=3"):
        with pytest.raises(InputError, match="layers=3 is more than the student's 2; use 0 for all"):
            Loss.parse(text)(featured((2, 4), (5, 4)))

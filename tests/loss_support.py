"""Random outputs of a student and a teacher, and the formulas that tests of several losses share."""

import jax.numpy as jnp
import numpy as np

from fbi.loss import Outputs

B, T, V = 2, 3, 8
PROJECTIONS = ("attn.q.out", "attn.k.out", "attn.v.out")


def normal(seed, shape=(B, T, V), scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape))


def outputs(teacher=True, seed=0):
    labels = jnp.asarray(np.random.default_rng(seed + 7).integers(0, V, (B, T)))
    return Outputs(normal(seed), labels, normal(seed + 1) if teacher else None)


def featured(student=(2, 4), teacher=(2, 4), seed=20):
    """Outputs with features of (layers, width) of student and teacher."""
    draw = lambda shape, at: {
        name: normal(at + i, (shape[0], B, T, shape[1])) for i, name in enumerate((*PROJECTIONS, "out"))
    }
    return outputs()._replace(features=draw(student, seed), teacher_features=draw(teacher, seed + 10))


def softmax(x):
    e = np.exp(np.asarray(x, np.float64))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x):
    return np.log(softmax(x))


def close(found, expected, tolerance=1e-12):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=tolerance, atol=tolerance)


def slope(function, x, direction, step=1e-5):
    """The derivative of `function` at x along a direction, by central differences."""
    return float(function(x + step * direction) - function(x - step * direction)) / (2 * step)

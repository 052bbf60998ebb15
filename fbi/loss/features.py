"""Terms over intermediate values of student and teacher, layer by layer; no gradient flows to the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fbi.errors import InputError
from fbi.loss.outputs import Outputs

PROJECTIONS = ("attn.q.out", "attn.k.out", "attn.v.out")
TINY = 1e-24  # the least squared norm that is divided by: a zero vector stays zero


def matched_layers(student: int, teacher: int) -> list[int]:
    """The teacher's layer for each of the student's: evenly spaced, the last for the last.

    Layer l of L_S, counted from 1, learns from layer ceil(l L_T / L_S): with L_T = n L_S from each n-th, as in
    BiBERT's code.
    """
    return [-(-(layer + 1) * teacher // student) - 1 for layer in range(student)]


def _pair(out: Outputs, name: str, layers: int) -> tuple[Float[Array, "l b t x"], Float[Array, "l b t y"]]:
    """A feature of the student and of the teacher, of matched layers: the student's last `layers`, or all for 0."""
    student, teacher = out.features[name], jax.lax.stop_gradient(out.teacher_features[name])
    count = student.shape[0]
    if layers > count:
        raise InputError(f"layers={layers} is more than the student's {count}; use 0 for all of them")
    if count != teacher.shape[0]:
        teacher = teacher[np.array(matched_layers(count, teacher.shape[0]))]
    return (student[-layers:], teacher[-layers:]) if layers else (student, teacher)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _unit(x: Array, axes: tuple[int, ...]) -> Array:
    """x over its Euclidean norm along `axes`."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axes, keepdims=True), TINY))


def hidden_states(out: Outputs, *, layers: int = 0) -> Float[Array, "b t"]:
    """sum_l || q_T / ||q_T|| - q_S / ||q_S|| ||² of the residual stream after each block, per position.

    OneBit, arXiv 2402.11295 (their L_MSE), at most 4 per layer. The paper takes the hidden state of every
    layer, which is done here; its code takes the inputs of the blocks. Models of another depth are matched as
    `matched_layers` says, and `layers` takes the student's last ones only (0: all). `InputError` for another width.
    """
    student, teacher = (_wide(x) for x in _pair(out, "out", layers))
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"the loss term 'hidden' compares hidden states of width {student.shape[-1]} (student) and "
            f"{teacher.shape[-1]} (teacher); use a teacher of the same model.dim, or 'dmd', which compares any widths"
        )
    return jnp.sum(jnp.square(_unit(teacher, (-1,)) - _unit(student, (-1,))), (0, -1))


def similarity(x: Float[Array, "b t x"]) -> Float[Array, "b t t"]:
    """P = X X^T / ||X X^T||_F of each sequence: how alike its positions are, whatever the width, scale and basis."""
    x = _wide(x)
    batch = jax.typeof(x).sharding.spec[0]
    whole = None if jax.sharding.get_abstract_mesh().empty else jax.P(batch, None, None)
    return _unit(jnp.einsum("btx,bsx->bts", x, x, out_sharding=whole), (1, 2))


def _distance(student: Float[Array, "l b t x"], teacher: Float[Array, "l b t y"]) -> Float[Array, " b"]:
    """sum_l || P_S - P_T ||_F² of each sequence; one layer at a time, since P has a row and a column per position."""

    @jax.checkpoint
    def layer(pair: tuple[Array, Array]) -> Array:
        return jnp.sum(jnp.square(similarity(pair[0]) - similarity(pair[1])), (1, 2))

    return jnp.sum(jax.lax.map(layer, (student, teacher)), 0)


def direction_matching(out: Outputs, *, hidden: float = 1.0, layers: int = 0) -> Float[Array, "b t"]:
    """sum over layers and over F in {Q, K, V} of || P_F,S - P_F,T ||_F² with P_F = F F^T / ||F F^T||_F.

    BiBERT's direction-matching distillation, arXiv 2203.06390. F is the output of a projection, all heads
    side by side, before rotary positions; `hidden` weighs the same distance of the residual stream after each block
    (0: none). Widths may differ, depths are matched as in `hidden_states`. The value of a sequence stands at each of
    its positions, so that the mean over positions is the mean over sequences. The authors' code takes the root of each
    distance, keeps heads apart and norms a batch as a whole; here nothing depends on how a batch is cut.
    """
    weights = dict.fromkeys(PROJECTIONS, 1.0) | ({"out": hidden} if hidden else {})
    distances = [weight * _distance(*_pair(out, name, layers)) for name, weight in weights.items()]
    return jnp.broadcast_to(sum(distances[1:], distances[0])[:, None], out.labels.shape)

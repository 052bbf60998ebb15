"""Binary transformers of the BERT era: BiT's elastic activations, BiBERT's boolean attention."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fbi.quant.field import Affine, Field
from fbi.quant.grid import Binary, Integers
from fbi.quant.methods.classical import plain_sign, scaled_sign
from fbi.quant.quantizer import Quantizer, compose
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, Choices, method
from fbi.quant.scale import LEAST, QParams, Scale, mean_abs, per_unit, safe
from fbi.quant.ste import Ctx, straight_through
from fbi.quant.surrogate import Clip, regraded


def _elastic(*, signed: bool) -> Scale:
    """Learned alpha per tensor, beta per channel (unsigned: per tensor): BiT, arXiv 2205.13016, eq. 5 to 9.

    The last axis of attention probabilities has the length of the sequence, which is no channel.
    """

    def channels(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * (len(shape) - 1) + (shape[-1] if signed else 1,)

    def init(x: Float[Array, "..."]) -> QParams:
        alpha = mean_abs(x, tuple(range(x.ndim))) * (1 if signed else 2)
        return {"alpha": jnp.maximum(alpha, LEAST), "beta": jnp.zeros_like(x, shape=channels(x.shape))}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        factor = x.shape[-1] ** -0.5  # LSQ's grading, N the features of an activation and Q = 1
        alpha = safe(regraded(qparams["alpha"].astype(x.dtype), factor))
        moved = x + qparams["beta"].astype(x.dtype)
        units = moved / jax.lax.stop_gradient(alpha) if signed else per_unit(moved, alpha)
        return units, Affine(alpha)

    def shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(1,) * len(shape)]

    return Scale(init, solve, shapes)


@method(
    "bit",
    roles=BOTH,
    paper="BiT, arXiv 2205.13016, eq. 5 to 9",
    choices=Choices(
        "activations: alpha learned per tensor, beta per channel; weights mean|w| per output",
        "binary; unsigned: {0, 1}",
        "clip",
        around="loss: kl + hidden; a chain of teachers 32 -> ... -> 1 bit",
    ),
)
def bit(role: str, *, signed: bool = True) -> Quantizer:
    """Elastic binarization: alpha sign((x + beta) / alpha), or alpha round(clip((x + beta) / alpha, 0, 1)).

    The unsigned set is for what is never negative: attention probabilities, outputs of a ReLU.
    """
    axis = CONTRACTION_AXIS[role]
    if role == "weight":
        return scaled_sign(Clip(), axis, centred=True)
    grid = Binary() if signed else Integers(0, 1)
    return compose(scale=_elastic(signed=signed), grid=grid, surrogate=Clip(), axis=axis)


@method(
    "bibert",
    roles=BOTH,
    paper="BiBERT, arXiv 2203.06390, eq. 3 to 8",
    choices=Choices(
        "mean|w| of the uncentred weight per output",
        "binary; attention {0, 1}",
        "clip",
        transform="centring of weights",
        around="boolean attention in place of the softmax; loss: ce + dmd",
    ),
)
def bibert(role: str, *, normalize: bool = False) -> Quantizer:
    """mean|w| sign(w - mean); activations sign(x); at the site attn.probs [score >= 0] in place of the softmax.

    `normalize` divides the attention by the number of keys attended to; the paper does not.
    """
    axis = CONTRACTION_AXIS[role]
    if role == "weight":
        return scaled_sign(Clip(), axis, centred=True)

    def weigh(scores: Float[Array, "*s"], allowed: Bool[Array, "*s"], qparams: QParams, ctx: Ctx) -> Float[Array, "*s"]:
        del qparams
        # (sign + 1) / 2 in {0, 1}: the boolean of eq. 7, its gradient that of the sign within 1.
        chosen = jnp.where(allowed, (jnp.asarray(straight_through(Binary(), Clip(), scores, ctx)) + 1) / 2, 0)
        if not normalize:
            return chosen
        return chosen / jnp.maximum(jax.lax.stop_gradient(jnp.sum(chosen, -1, keepdims=True)), 1)

    return plain_sign(Clip(), axis)._replace(weigh=weigh)

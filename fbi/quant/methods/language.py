"""Quantization-aware training of pretrained language models: LLM-QAT, ParetoQ, TernaryLLM."""

from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant.field import Affine, Field
from fbi.quant.grid import Binary, HalfIntegers, Integers
from fbi.quant.methods.baselines import LowBits, absmax
from fbi.quant.methods.learned import elastic_sign
from fbi.quant.quantizer import Quantizer, compose
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, WEIGHT, Choices, method
from fbi.quant.scale import (
    LEAST,
    Axes,
    QParams,
    Scale,
    learned,
    max_abs,
    mean_abs,
    reduced_axes,
    safe,
    shaped,
    statistic,
)
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Clip, Within, identity


@method(
    "llmqat",
    roles=BOTH,
    paper="LLM-QAT, arXiv 2305.17888, eq. 1 and 2; 1 and 2 bits from its code",
    choices=Choices(
        "max|x| per output or token; 1 bit mean|w|, 2 bits 2 mean|w|",
        "integers; 2 bits mid-rise",
        "identity",
        around="loss: kl",
    ),
)
def llmqat(role: str, *, bits: LowBits = 4) -> Quantizer:
    """Symmetric absmax integers; below 3 bits the branches of the published code."""
    axis = CONTRACTION_AXIS[role]
    if bits > 2:
        return absmax(role, bits=bits)
    if bits == 1:
        return compose(scale=statistic(mean_abs, "output", axis), grid=Binary(), surrogate=identity, axis=axis)
    return compose(scale=statistic(mean_abs, "output", axis), grid=HalfIntegers.of(2), surrogate=identity, axis=axis)


SEQ_LIMIT = 0.99  # of the range, beyond which a value is clipped


@method(
    "paretoq",
    roles=WEIGHT,
    paper="ParetoQ, arXiv 2502.02631, eq. 3 to 5",
    choices=Choices(
        "learned per output",
        "1 bit: sign; 1.58 and 2 bits: stretched (SEQ); 3 and 4 bits: integers",
        "clip",
        notes="its code calls ternary 0 bits, and grades the scales by the size of the whole matrix, as here",
    ),
)
def paretoq(role: str, *, bits: Annotated[float, (1, 1.58, 2, 3, 4)] = 2.0) -> Quantizer:
    """One recipe from 1 to 4 bits: elastic sign, stretched elastic quantizer, LSQ.

    SEQ: a (round(clip(w / a, -0.99, 0.99) L - h) + h) / L with L = 1.5, h = 0 (ternary) or L = 2, h = 1/2 (2 bits).
    """
    axis = CONTRACTION_AXIS[role]
    top = 1 if bits < 3 else 2 ** (int(bits) - 1) - 1
    if bits == 1:
        return elastic_sign("output", axis)

    def graded(shape: tuple[int, ...]) -> float:
        return (shape[0] * shape[-1] * top) ** -0.5

    if bits >= 3:
        start = lambda x, axes: max_abs(x, axes) / top  # noqa: E731
        scale = learned(start, "output", axis, graded=graded)
        return compose(scale=scale, grid=Integers(-top - 1, top), surrogate=Clip(), axis=axis)
    stretch, grid = (1.5, Integers(-1, 1)) if bits == 1.58 else (2.0, HalfIntegers.of(2))
    scale = learned(max_abs, "output", axis, top=stretch, graded=graded)
    return compose(scale=scale, grid=grid, surrogate=Within(SEQ_LIMIT * stretch), axis=axis)


def _learned_ternary(axis: int) -> Scale:
    """gamma and delta per output: TernaryLLM's dual learnable ternarization, arXiv 2406.07177, eq. 5 and 6.

    Started from the weight less its mean by TWN's rule. A gradient one to w inside and outside the levels.
    """

    def threshold(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        return 0.7 * mean_abs(x, axes) + LEAST

    def init(x: Float[Array, "..."]) -> QParams:
        axes = reduced_axes("output", x.ndim, axis)
        delta = jnp.mean(x, axes, keepdims=True)
        centred = x - delta
        above = jnp.abs(centred) > threshold(centred, axes)
        count = jnp.maximum(jnp.sum(above, axes, keepdims=True), 1)
        gamma = jnp.sum(jnp.where(above, jnp.abs(centred), 0), axes, keepdims=True) / count
        return {"gamma": jnp.maximum(gamma, LEAST), "delta": delta}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        gamma, delta = safe(qparams["gamma"].astype(x.dtype)), qparams["delta"].astype(x.dtype)
        return (x - jax.lax.stop_gradient(delta)) / jax.lax.stop_gradient(gamma), Affine(gamma, delta)

    return Scale(init, solve, shaped("output", axis, 2))


@method(
    "ternaryllm",
    roles=WEIGHT,
    paper="TernaryLLM, arXiv 2406.07177, eq. 5 and 6 (DLT)",
    choices=Choices(
        "learned scale and shift per output",
        "ternary",
        "identity",
        around="loss: kl + hidden",
        notes="code not released; the threshold is half the learned scale about the learned shift",
    ),
)
def ternaryllm(role: str) -> Quantizer:
    """gamma T + delta with ternary T, gamma and delta learned."""
    axis = CONTRACTION_AXIS[role]
    return compose(scale=_learned_ternary(axis), grid=Integers(-1, 1), surrogate=identity, axis=axis)

"""Learned steps, offsets and clip levels: LSQ, LSQ+, PACT, and the elastic sign."""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant.field import Affine, Field
from fbi.quant.gaussian import OPTIMAL, PUBLISHED
from fbi.quant.grid import Binary, Grid, HalfIntegers, Integers
from fbi.quant.methods.baselines import Bits, Granularity, LowBits, Rounding, rounded
from fbi.quant.quantizer import Quantizer, compose
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, Choices, method
from fbi.quant.scale import LEAST, Axes, QParams, Scale, learned, mean_abs, per_unit, rms, safe, shaped
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Clip, identity, regraded


def elastic_sign(granularity: str, axis: int, top: int = 1) -> Quantizer:
    """alpha sign(x), alpha learned; gradient within |x| <= alpha, that of alpha times 1 / sqrt(N top).

    The 1-bit branch of BiT, arXiv 2205.13016, and ParetoQ, 2502.02631.
    """
    scale = learned(mean_abs, granularity, axis, graded=_lsq_factor(axis, top), through=False)
    return compose(scale=scale, grid=Binary(), surrogate=Clip(), axis=axis)


def _lsq_factor(axis: int, top: float | int) -> Callable[[tuple[int, ...]], float]:
    """Of a shape, 1 / sqrt(N Q): N weights of a layer (axis 0), or features of an activation (axis -1)."""

    def factor(shape: tuple[int, ...]) -> float:
        count = shape[-1] if axis == -1 else max(1, math.prod(shape))
        return (count * top) ** -0.5

    return factor


def lsq_start(top: int):
    """2 mean|x| / sqrt(Q): LSQ, arXiv 1902.08153, section 2.1."""

    def start(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        return 2 * mean_abs(x, axes) / top**0.5

    return start


def uniform(bits: int, grid: str) -> Grid:
    """The signed uniform grid with a zero (mid-tread) or without (mid-rise)."""
    return Integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if grid == "midtread" else HalfIntegers.of(bits)


@method(
    "lsq",
    roles=BOTH,
    paper="LSQ, arXiv 1902.08153, eq. 1 to 3 and section 2.2",
    choices=Choices(
        "learned step, per tensor",
        "integers",
        "clip",
        notes="QuEST's baseline runs it on the mid-rise grid (grid=midrise) and divides by zero at 1 bit; "
        "here 1 bit is the elastic sign",
    ),
)
def lsq(
    role: str,
    *,
    bits: LowBits = 4,
    granularity: Granularity = "tensor",
    grid: Literal["midtread", "midrise"] = "midtread",
    frozen: bool = False,
) -> Quantizer:
    """Learned step size: s RoundClip(x / s, -Q - 1, Q), Q = 2^(bits - 1) - 1, the gradient of s times 1 / sqrt(N Q).

    N counts the weights of a layer, or the features of an activation.
    """
    axis = CONTRACTION_AXIS[role]
    if bits == 1:
        return elastic_sign(granularity, axis)
    top = 2 ** (bits - 1) - 1
    scale = learned(lsq_start(top), granularity, axis, name="step", graded=_lsq_factor(axis, top), frozen=frozen)
    return compose(scale=scale, grid=uniform(bits, grid), surrogate=Clip(), axis=axis)


def _offset_scale(axis: int, top: int) -> Scale:
    """Learned step and offset of one tensor: LSQ+, arXiv 2004.09576, eq. 4 to 6; started from its range."""

    def init(x: Float[Array, "..."]) -> QParams:
        low, high = jnp.min(x, keepdims=True), jnp.max(x, keepdims=True)
        return {"step": jnp.maximum((high - low) / top, LEAST), "offset": low}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        factor = _lsq_factor(axis, top)(x.shape)
        step, offset = (regraded(qparams[name].astype(x.dtype), factor) for name in ("step", "offset"))
        step = safe(step)
        return per_unit(x - offset, step), Affine(step, offset)

    return Scale(init, solve, shaped("tensor", axis, 2))


@method(
    "lsqplus",
    roles=BOTH,
    paper="LSQ+, arXiv 2004.09576, eq. 4 to 9",
    choices=Choices(
        "learned step; of activations also an offset",
        "integers",
        "clip",
        notes="init=gaussian is the published QuEST baseline's start, on its mid-rise grid",
    ),
)
def lsqplus(
    role: str,
    *,
    bits: Bits = 4,
    init: Literal["paper", "gaussian"] = "paper",
    clips: Literal["optimal", "published"] = "optimal",
) -> Quantizer:
    """LSQ with the start max|mean +- 3 std| / 2^(bits - 1) for weights, and a learned offset for activations."""
    axis = CONTRACTION_AXIS[role]
    if role == "activation":
        grid = Integers(0, 2**bits - 1)
        return compose(scale=_offset_scale(axis, 2**bits - 1), grid=grid, surrogate=Clip(), axis=axis)
    top = 2 ** (bits - 1) - 1
    alpha = (OPTIMAL if clips == "optimal" else PUBLISHED)[bits]

    def start(x: Float[Array, "..."], axes: Axes) -> Float[Array, "..."]:
        if init == "gaussian":
            return 2 * alpha * rms(x, axes) / (2**bits - 1)
        mean = jnp.mean(x, axes, keepdims=True)
        return (jnp.abs(mean) + 3 * rms(x - mean, axes)) / 2 ** (bits - 1)

    scale = learned(start, "tensor", axis, name="step", graded=_lsq_factor(axis, top))
    return compose(
        scale=scale, grid=uniform(bits, {"paper": "midtread"}.get(init, "midrise")), surrogate=Clip(), axis=axis
    )


def _clipped_at(axis: int, levels: int, *, signed: bool) -> Scale:
    """PACT's scale: x clipped at a learned alpha, then brought to `levels` steps with alpha held fixed.

    d/dx is one inside and zero outside; d/dalpha collects the gradient of what was clipped at the top (and, with its
    sign, at the bottom of a signed range): PACT, arXiv 1805.06085, eq. 1 and 3, by autodiff.
    """

    def init(x: Float[Array, "..."]) -> QParams:
        # The paper starts at a fixed 10 for images; a multiple of the deviation says the same of any scale.
        return {"alpha": jnp.maximum(3 * rms(x, tuple(range(x.ndim))), LEAST)}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        alpha = safe(qparams["alpha"].astype(x.dtype))
        fixed = jax.lax.stop_gradient(alpha)
        low = -alpha if signed else jnp.zeros_like(alpha)
        clipped = jnp.where(x >= alpha, alpha, jnp.where(x > low, x, low))
        return clipped / fixed * levels, Affine(fixed / levels)

    return Scale(init, solve, shaped("tensor", axis))


@method(
    "pact",
    roles=BOTH,
    paper="PACT, arXiv 1805.06085, eq. 1 to 3",
    choices=Choices(
        "learned clip level, per tensor",
        "integers from 0; symmetric for weights",
        "identity inside the learned clip",
        notes="QuEST's published class passes no gradient to its input at all; here it is one inside the range",
    ),
)
def pact(
    role: str,
    *,
    bits: Bits = 4,
    range: Literal["auto", "positive", "symmetric"] = "auto",
    rounding: Rounding = "nearest",
) -> Quantizer:
    """clip(x, 0, alpha) on 2^bits - 1 steps, alpha learned. `symmetric` clips at -alpha too: for signed inputs.

    `auto` is the paper's positive range for activations, the symmetric one for weights.
    """
    axis = CONTRACTION_AXIS[role]
    signed = range == "symmetric" or (range == "auto" and role == "weight")
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    grid = rounded(Integers(-levels if signed else 0, levels), rounding)
    return compose(scale=_clipped_at(axis, levels, signed=signed), grid=grid, surrogate=identity, axis=axis)

"""Full precision, and the uniform quantizers that tables compare with: absmax, STE, QuaRot, DoReFa."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fbi.quant.field import Affine, Field
from fbi.quant.gaussian import OPTIMAL, PUBLISHED
from fbi.quant.grid import Binary, Grid, HalfIntegers, Integers, Stochastic
from fbi.quant.quantizer import Quantizer, compose, full_precision
from fbi.quant.registry import BOTH, CONTRACTION_AXIS, Choices, method
from fbi.quant.scale import (
    LEAST,
    QParams,
    Scale,
    magnitude,
    max_abs,
    mean_abs,
    rms,
    shaped,
    statistic,
)
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Name, identity
from fbi.quant.surrogate import surrogate as by_name
from fbi.quant.transform import IDENTITY, Hadamard

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
LowBits = Literal[1, 2, 3, 4, 5, 6, 7, 8]
Rule = Literal["paper", "code"]
Rounding = Literal["nearest", "stochastic"]
Granularity = Literal["input", "output", "tensor"]


def rounded(grid: Grid, rounding: Rounding) -> Grid:
    """The grid, rounded as asked."""
    return Stochastic(grid) if rounding == "stochastic" else grid


@method("none", roles=BOTH, paper="full precision", choices=Choices("none", "none", "exact"))
def none(role: str) -> Quantizer:
    """Full precision: changes nothing."""
    del role
    return full_precision()


@method(
    "absmax",
    roles=BOTH,
    paper="BitNet a4.8, arXiv 2411.04965, section 2 (INT8 absmax)",
    choices=Choices("max|x| per token or output", "integers", "identity"),
)
def absmax(
    role: str,
    *,
    bits: Bits = 8,
    rule: Rule = "paper",
    rounding: Rounding = "nearest",
    surrogate: Name = "identity",
) -> Quantizer:
    """Symmetric integers scaled by the largest magnitude, per token of an activation, per output of a weight.

    (s / Q) RoundClip(Q / s x, -Q - 1, Q) with s = max|x| and Q = 2^(bits - 1) - 1; `rule` guards s against zero.
    """
    axis, top = CONTRACTION_AXIS[role], 2 ** (bits - 1) - 1
    scale = statistic(max_abs, "output", axis, rule=rule, top=top)
    grid = rounded(Integers(-top - 1, top), rounding)
    return compose(scale=scale, grid=grid, surrogate=by_name(surrogate), axis=axis)


@method(
    "ste",
    roles=BOTH,
    paper="QuEST, arXiv 2502.05003, table 1 (STE)",
    choices=Choices(
        "max|x| or Gaussian-optimal RMS per row",
        "mid-rise",
        "identity",
        notes="the published absmax class fails in training and passes values through in evaluation; here it quantizes",
    ),
)
def ste(
    role: str,
    *,
    bits: LowBits = 4,
    scale: Literal["absmax", "rms"] = "absmax",
    clips: Literal["optimal", "published"] = "optimal",
    rounding: Rounding = "nearest",
) -> Quantizer:
    """Plain straight-through rounding to 2^bits levels without a zero: gradient one everywhere."""
    axis, top = CONTRACTION_AXIS[role], (2**bits - 1) / 2
    alpha = (OPTIMAL if clips == "optimal" else PUBLISHED)[bits]
    solved = {
        "absmax": statistic(max_abs, "output", axis, top=top),
        "rms": statistic(rms, "output", axis, top=top / alpha),
    }[scale]
    return compose(scale=solved, grid=rounded(HalfIntegers.of(bits), rounding), surrogate=identity, axis=axis)


@method(
    "quarot",
    roles=BOTH,
    paper="QuaRot, arXiv 2404.00456, as the training baseline of QuEST, 2502.05003, table 1",
    choices=Choices("max|x| per row", "mid-rise", "identity", transform="block Hadamard"),
)
def quarot(role: str, *, bits: LowBits = 4, block: int = 128) -> Quantizer:
    """Block Hadamard rotation, absmax grid, straight-through."""
    axis = CONTRACTION_AXIS[role]
    scale = statistic(max_abs, "output", axis, top=(2**bits - 1) / 2)
    transform = Hadamard(block) if block else IDENTITY
    return compose(scale=scale, grid=HalfIntegers.of(bits), surrogate=identity, axis=axis, transform=transform)


def _tanh_scale(axis: int, levels: int) -> Scale:
    """DoReFa's weights: tanh(w) / max|tanh(w)| on [-1, 1]; the gradient flows through tanh, not through the maximum."""

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        squashed = jnp.tanh(x)
        top = jnp.max(jnp.abs(jax.lax.stop_gradient(squashed)), keepdims=True) + LEAST
        return squashed / top * (levels / 2), Affine(jnp.full_like(top, 2 / levels))

    return Scale(lambda x: {}, solve, shaped("tensor", axis))


def _unit_interval(levels: int, axis: int) -> Scale:
    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del qparams, ctx
        return x * levels, Affine(jnp.full_like(x, 1 / levels, shape=(1,) * x.ndim))

    return Scale(lambda x: {}, solve, shaped("tensor", axis))


@method(
    "dorefa",
    roles=BOTH,
    paper="DoReFa-Net, arXiv 1606.06160, eq. 7 to 11",
    choices=Choices(
        "max|tanh(w)| per tensor; activations on [0, 1]",
        "2^bits levels",
        "dorefa",
        notes="the quantized gradients of the paper are left out; rounding=stochastic is its rounding",
    ),
)
def dorefa(role: str, *, bits: LowBits = 4, rounding: Rounding = "nearest") -> Quantizer:
    """Weights 2 q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, 1 bit E|w| sign(w); activations q(clip(x, 0, 1)).

    q rounds to 2^bits - 1 steps.
    """
    axis, levels = CONTRACTION_AXIS[role], 2**bits - 1
    if role == "activation":
        grid = rounded(Integers(0, levels), rounding)
        return compose(scale=_unit_interval(levels, axis), grid=grid, surrogate=by_name("dorefa"), axis=axis)
    if bits == 1:
        return compose(scale=magnitude(mean_abs, "tensor", axis), grid=Binary(), surrogate=identity, axis=axis)
    grid = rounded(HalfIntegers.of(bits), rounding)
    return compose(scale=_tanh_scale(axis, levels), grid=grid, surrogate=identity, axis=axis)

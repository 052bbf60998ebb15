"""Full precision, and the uniform quantizers that tables compare with: absmax, STE, QuaRot, LSQ, LSQ+, PACT, DoReFa."""

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
    Axes,
    QParams,
    Scale,
    learned,
    magnitude,
    max_abs,
    mean_abs,
    per_unit,
    rms,
    safe,
    shaped,
    statistic,
)
from fbi.quant.ste import Ctx
from fbi.quant.surrogate import Clip, Name, identity, regraded
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


def elastic_sign(granularity: str, axis: int, top: int = 1) -> Quantizer:
    """alpha sign(x), alpha learned; gradient within |x| <= alpha, that of alpha times 1 / sqrt(N top).

    The 1-bit branch of BiT, arXiv 2205.13016, and ParetoQ, 2502.02631.
    """
    graded = lambda shape: _lsq_factor(shape, axis, top)  # noqa: E731
    scale = learned(mean_abs, granularity, axis, graded=graded, through=False)
    return compose(scale=scale, grid=Binary(), surrogate=Clip(), axis=axis)


def _lsq_factor(shape: tuple[int, ...], axis: int, top: float | int) -> float:
    """1 / sqrt(N Q): N weights of a layer (axis 0), or features of an activation (axis -1)."""
    count = shape[-1] if axis == -1 else max(1, _product(shape))
    return (count * top) ** -0.5


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


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
    graded = lambda shape: _lsq_factor(shape, axis, top)  # noqa: E731
    scale = learned(lsq_start(top), granularity, axis, name="step", graded=graded, frozen=frozen)
    return compose(scale=scale, grid=uniform(bits, grid), surrogate=Clip(), axis=axis)


def _offset_scale(axis: int, top: int) -> Scale:
    """Learned step and offset of one tensor: LSQ+, arXiv 2004.09576, eq. 4 to 6; started from its range."""

    def init(x: Float[Array, "..."]) -> QParams:
        low, high = jnp.min(x, keepdims=True), jnp.max(x, keepdims=True)
        return {"step": jnp.maximum((high - low) / top, LEAST), "offset": low}

    def solve(x: Float[Array, "..."], qparams: QParams, ctx: Ctx) -> tuple[Array, Field]:
        del ctx
        factor = _lsq_factor(x.shape, axis, top)
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

    graded = lambda shape: _lsq_factor(shape, axis, top)  # noqa: E731
    scale = learned(start, "tensor", axis, name="step", graded=graded)
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
